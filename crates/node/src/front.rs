//! The process that the user started: it begins the service, passes signals on, waits, and ends
//! as the service ends. The service does not need it: it may be killed at any moment.

use crate::bundle::{self, Purpose, Start};
use crate::clock::now_ns;
use crate::config::Config;
use crate::control::{Control, ControlError, Request, ask};
use crate::directory::{Claim, ClaimError, RunDirectory};
use crate::log;
use crate::news::{News, Sight};
use crate::notify::Notifier;
use crate::stage::host::HostLink;
use crate::status_page::{Identity, ServiceState, StatusPage, StatusPageError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use unbroken_sys::signalfd::SignalFd;

/// What `unbroken run` was asked for, checked.
pub struct Order {
    pub config: Config,
    pub directory: RunDirectory,
    /// Held from before anything else was made; every process of ours inherits it.
    pub claim: Claim,
    pub link: HostLink,
    /// Texts for the status page.
    pub command_text: String,
    pub address_text: String,
    pub published_text: String,
    /// Return as soon as the service is protected.
    pub detach: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    #[error("cannot {operation}: {cause}")]
    Io {
        operation: &'static str,
        cause: io::Error,
    },
    #[error(transparent)]
    StatusPage(#[from] StatusPageError),
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The service could not be started or kept alive.
    #[error("{0}")]
    Failed(String),
}

/// How `run` ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The service ended by itself; 128 + n for death by signal n.
    Service(u8),
    /// Detached: the service runs on.
    Detached,
    /// Detached, and it is not protected; why.
    Unprotected(String),
}

const FORWARDED: [i32; 5] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// A request to the primary waits this long: longer than any takeover.
const CONTROL_PATIENCE: Duration = Duration::from_secs(10);
/// Whoever detaches waits so long for protection that something stands in the way of.
const DETACH_PATIENCE_NS: u64 = 10_000_000_000;

/// Starts the service and waits for its end.
pub fn run(order: Order) -> Result<Ending, FrontError> {
    let failed = |operation| move |cause: io::Error| FrontError::Io { operation, cause };
    // Before anything else runs: a signal that arrives from now on waits in the descriptor.
    let signals = SignalFd::new(&FORWARDED).map_err(failed("receive signals"))?;
    let directory = &order.directory;
    let identity = Identity {
        command: &order.command_text,
        address: &order.address_text,
        published: &order.published_text,
    };
    let page = StatusPage::create(directory, &identity)?;
    page.set_front_pid(std::process::id().cast_signed());
    log::open(directory.path(), "front").map_err(failed("open the log of"))?;
    let control = Control::bind(directory)?;
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(io::Error::from)
        .map_err(failed("make an eventfd"))?;
    let (life, life_of_nodes) = pipe_with(PipeFlags::CLOEXEC)
        .map_err(io::Error::from)
        .map_err(failed("make a pipe"))?;
    let (stdout, stderr) = (io::stdout(), io::stderr());
    let descriptors = [
        (Purpose::Lock, order.claim.as_fd()),
        (Purpose::Control, control.as_fd()),
        (Purpose::FrontBell, bell.as_fd()),
        (Purpose::Life, life_of_nodes.as_fd()),
        (Purpose::HostTun, order.link.tun.as_fd()),
        (Purpose::Output, stdout.as_fd()),
        (Purpose::ErrorOutput, stderr.as_fd()),
    ];
    let (child, channel) = bundle::spawn(&order.config, Start::Launch, &descriptors)
        .map_err(failed("start the primary"))?;
    page.set_primary_pid(child.id().cast_signed());
    drop((channel, life_of_nodes));
    let front = Front {
        order: &order,
        page,
        bell,
        life,
        signals,
        child,
    };
    front.watch()
}

struct Front<'a> {
    order: &'a Order,
    page: StatusPage,
    bell: OwnedFd,
    /// Hangs up when no node lives. The status page cannot say that: while one node takes over from
    /// another it names first only dead ones, and a standby stands there only some time after it
    /// was started.
    life: OwnedFd,
    signals: SignalFd,
    child: std::process::Child,
}

impl Front<'_> {
    fn watch(mut self) -> Result<Ending, FrontError> {
        let failed = |operation| move |cause: io::Error| FrontError::Io { operation, cause };
        let notifier = Notifier::from_environment().unwrap_or_default();
        let mut news = News::new(&self.order.config.name, &self.order.address_text);
        let mut announced = None;
        let mut told_primary = 0;
        loop {
            if let Some(code) = self.page.exit() {
                notifier.stopping();
                return self.ended(code);
            }
            let sight = self.sight();
            news.look(&sight, now_ns())
                .iter()
                .for_each(|line| say(line));
            if announced != Some(sight.state) {
                self.tell_manager(&notifier, sight.state);
                announced = Some(sight.state);
            }
            if self.order.detach
                && let Some(ending) = detached(&sight, &news)
            {
                return Ok(ending);
            }
            let primary = self.page.primary_pid();
            if primary != told_primary {
                notifier.main_pid(primary);
                told_primary = primary;
            }
            let detach_due_ns = detach_due_ns(&news).filter(|_| self.order.detach);
            let due_ns = news.due_ns().into_iter().chain(detach_due_ns).min();
            self.sleep(due_ns).map_err(failed("wait for the service"))?;
            self.pass_signals_on().map_err(failed("read signals"))?;
            // The first node, which becomes a zombie of this process when it ends.
            let _ = self.child.try_wait();
            // In this order: who sets an exit code lives on for a moment.
            if !any_holder_lives(&self.life) && self.page.exit().is_none() {
                return self.lost();
            }
        }
    }

    fn sight(&self) -> Sight {
        let snapshot = self.page.snapshot(now_ns());
        Sight {
            state: snapshot.state,
            reason: snapshot.reason,
            takeovers: snapshot.takeovers,
            last_takeover_us: snapshot.last_takeover_us.unwrap_or_default(),
            last_takeover_cause: snapshot.last_takeover_cause.unwrap_or_default(),
        }
    }

    fn tell_manager(&self, notifier: &Notifier, state: ServiceState) {
        if state == ServiceState::Protected {
            let name = &self.order.config.name;
            notifier.ready(&format!(
                "{name} is protected at {}",
                self.order.address_text
            ));
        } else {
            notifier.status(state.name());
        }
    }

    /// Until a node rings, a signal arrives, the last node dies, or it is `due_ns`.
    fn sleep(&self, due_ns: Option<u64>) -> io::Result<()> {
        let left_ns = due_ns.map(|due_ns| due_ns.saturating_sub(now_ns()));
        let timeout = left_ns.map(|left_ns| rustix::time::Timespec {
            tv_sec: (left_ns / 1_000_000_000) as i64,
            tv_nsec: (left_ns % 1_000_000_000) as i64,
        });
        let mut watched = [
            PollFd::new(&self.bell, PollFlags::IN),
            PollFd::new(&self.signals, PollFlags::IN),
            // A hang-up is always told.
            PollFd::new(&self.life, PollFlags::empty()),
        ];
        match poll(&mut watched, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut count = [0; 8];
        // Nonblocking: empty when the wake-up was another's.
        let _ = rustix::io::read(&self.bell, &mut count);
        Ok(())
    }

    fn pass_signals_on(&self) -> io::Result<()> {
        while let Some(signal) = self.signals.next()? {
            let request = Request::Signal(signal);
            if let Err(error) = ask(&self.order.directory, request, CONTROL_PATIENCE) {
                log!("signal {signal} was not passed on: {error}");
            }
        }
        Ok(())
    }

    fn ended(&self, code: u8) -> Result<Ending, FrontError> {
        match self.page.state() {
            ServiceState::Failed => Err(FrontError::Failed(self.page.reason())),
            _ => Ok(Ending::Service(code)),
        }
    }

    /// Every node died without an end of the service.
    fn lost(&self) -> Result<Ending, FrontError> {
        let name = &self.order.config.name;
        let state = self.page.state();
        self.page
            .set_state(ServiceState::Failed, "every process of unbroken died");
        let _ = self.order.directory.remove();
        Err(FrontError::Failed(format!(
            "service {name} is gone: every process of unbroken died while it was {}",
            state.name()
        )))
    }
}

/// How `--detach` ends, if it can be said by now: what is not protected after a while, though no fill is
/// under way, will hardly be so without somebody's help.
fn detached(sight: &Sight, news: &News) -> Option<Ending> {
    match sight.state {
        ServiceState::Protected => Some(Ending::Detached),
        ServiceState::Unprotected if detach_due_ns(news)? <= now_ns() => {
            Some(Ending::Unprotected(sight.reason.clone()))
        }
        _ => None,
    }
}

fn detach_due_ns(news: &News) -> Option<u64> {
    Some(news.waiting_since_ns()? + DETACH_PATIENCE_NS)
}

fn say(line: &str) {
    // With standard error closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "unbroken: {line}");
}

/// Whether any process has the other end of a pipe open, or was sent it and has not received it yet.
fn any_holder_lives(pipe: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(pipe, PollFlags::empty())];
    let now = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut watched, Some(&now)), Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// (Found by torture: the status page named nobody who lived, and the front took a service away that
    /// a node had just taken over.)
    #[test]
    fn nodes_live_for_as_long_as_anyone_holds_their_end() {
        let (life, held) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        assert!(any_holder_lives(&life));
        let end = || Stdio::from(held.try_clone().unwrap());
        let sleeper = || Command::new("/bin/sleep").arg("1000").stdout(end()).spawn();
        let (mut first, mut second) = (sleeper().unwrap(), sleeper().unwrap());
        drop(held);
        for node in [&mut first, &mut second] {
            assert!(any_holder_lives(&life));
            node.kill().unwrap();
            node.wait().unwrap();
        }
        assert!(!any_holder_lives(&life));
    }
}
