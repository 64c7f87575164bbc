//! The primary's main thread: the wire between host and service, and the decisions around it.
//!
//! One owner of state: the loop waits for an event and applies it in one step. The tracer thread
//! captures; everything else happens here, on the spare core.

mod capturing;
mod ending;
mod idleness;
pub mod launch;
pub mod mailbox;
mod standby;
pub mod tracer;
mod traffic;

use crate::bundle::{Bundle, Purpose};
use crate::clock::now_ns;
use crate::config::Config;
use crate::control::{Control, Request};
use crate::directory::{Claim, RunDirectory, ServiceName};
use crate::log;
use crate::stage::launch::Init;
use crate::status_page::{ServiceState, StatusPage};
use capturing::Capturing;
use ending::Ending;
pub use ending::close_failed;
use mailbox::{FillNumber, Mailbox, TracerReport};
use rustix::event::{Timespec, epoll};
pub use standby::Notice;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use traffic::Traffic;
use unbroken_core::retry::Retry;
use unbroken_core::role::{Action, Event, Reason, Role, RoleState};
use unbroken_tracee::Bell;
use unbroken_wire::exchange::Input;

/// What every node of a service holds, whatever its role.
pub struct Common {
    pub config: Config,
    pub directory: RunDirectory,
    pub page: StatusPage,
    pub claim: Claim,
    pub control: Control,
    pub front_bell: OwnedFd,
    /// Held as long as we live: the front hears by its closing that the last node has ended.
    pub life: OwnedFd,
    pub host_tun: OwnedFd,
    /// Our standard output and error, in this order.
    pub outputs: [OwnedFd; 2],
}

impl Common {
    /// Tells the front that the status page changed.
    pub fn ring_front(&self) {
        // It fails only when the counter is about to overflow: the front is awake then.
        let _ = rustix::io::write(&self.front_bell, &1u64.to_ne_bytes());
    }
}

/// The running service's ends in our hands.
pub struct ServiceEnds {
    pub tun: OwnedFd,
    /// Read ends of the service's standard output and error, nonblocking; `None` once closed.
    pub outputs: [Option<OwnedFd>; 2],
    /// The connection to its stage init; the service lives while anybody holds one.
    pub init: Init,
    /// pidfd of that init: killing it kills the whole service.
    pub stage: OwnedFd,
    /// The listener of the service's seccomp filter.
    pub notify: Arc<OwnedFd>,
    /// The first process, as the host numbers it.
    pub host_pid: i32,
    pub input: Input,
}

pub struct Primary {
    common: Common,
    init: Init,
    stage: OwnedFd,
    notify: Arc<OwnedFd>,
    host_pid: i32,
    role: Role,
    mailbox: Arc<Mailbox>,
    bell: Bell,
    traffic: Traffic,
    capturing: Capturing,
    standby: Option<standby::Standby>,
    /// The last fill that was begun.
    fill: FillNumber,
    /// Paces the attempts to fill a standby.
    retry: Retry,
    /// A standby is wanted from this time on: started if there is none, filled if it may be.
    standby_wanted_ns: Option<u64>,
    /// When one is to be started, if there is none.
    standby_start_ns: Option<u64>,
    /// Whether the standby before this one had got ready to be filled.
    last_was_ready: bool,
    /// Why the last standby came to nothing.
    last_failure: Option<String>,
    ending: Ending,
    /// Why the service cannot be replicated as it is.
    hindrance: Option<String>,
    epoll: OwnedFd,
}

/// What the loop sleeps on.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Source {
    Traffic = 1,
    MainBell,
    Control,
    StandbyChannel,
    StageEnd,
}

impl Primary {
    pub fn new(
        common: Common,
        service: ServiceEnds,
        role: Role,
        mailbox: Arc<Mailbox>,
        bell: Bell,
    ) -> io::Result<Primary> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let ServiceEnds {
            tun,
            outputs,
            init,
            stage,
            notify,
            host_pid,
            input,
        } = service;
        let traffic = Traffic::new(&common, tun, outputs, input, &mailbox, role.term())?;
        for source in traffic.sources() {
            watch(&epoll, source, Source::Traffic)?;
        }
        watch(&epoll, mailbox.main_bell(), Source::MainBell)?;
        watch(&epoll, common.control.as_fd(), Source::Control)?;
        watch(&epoll, stage.as_fd(), Source::StageEnd)?;
        Ok(Primary {
            init,
            stage,
            notify,
            host_pid,
            traffic,
            capturing: Capturing::new(common.config.spare_core),
            standby: None,
            fill: FillNumber::default(),
            retry: Retry::default(),
            standby_wanted_ns: None,
            standby_start_ns: None,
            last_was_ready: true,
            last_failure: None,
            ending: Ending::default(),
            hindrance: None,
            common,
            role,
            mailbox,
            bell,
            epoll,
        })
    }

    /// Carries the service until it ends or another node takes it over. `actions` are what the
    /// role wanted when it was made.
    pub fn run(mut self, actions: Vec<Action>) -> io::Result<()> {
        self.common
            .page
            .set_primary_pid(std::process::id().cast_signed());
        self.common.page.set_standby_pid(0);
        self.act(actions)?;
        while !self.is_over() {
            let mut busy = self.follow_capture()?;
            busy |= self.take_commits()?;
            busy |= self.carry()?;
            self.start_capture_if_due();
            while let Some(report) = self.mailbox.next_report() {
                busy = true;
                self.take_report(report)?;
            }
            self.tend_standby()?;
            self.give_up_slow_standby()?;
            self.end_if_due()?;
            if !busy {
                self.rest()?;
            }
        }
        self.close()
    }

    fn apply(&mut self, event: Event) -> io::Result<()> {
        let before = self.role.state();
        let actions = self.role.apply(event, now_ns());
        if self.role.state() != before {
            log!("{event:?}: {before:?} -> {:?}", self.role.state());
        }
        self.act(actions)
    }

    fn act(&mut self, actions: Vec<Action>) -> io::Result<()> {
        // Shown first: whoever acts on an action may look at the status page.
        self.show_state();
        for action in actions {
            match action {
                Action::StartStandby => {
                    self.want_standby();
                    self.tend_standby()?;
                }
                Action::StopStandby => self.stop_standby(),
                // The kernel is the arbiter: a standby that has ended goes on with nothing.
                Action::AskLeave => {
                    self.end_linked_standby();
                    self.apply(Event::LeaveGranted)?;
                }
                Action::PassOutput => self.traffic.pass(&self.role),
                Action::HandOver => self.hand_over(),
                Action::Retire => self.ending.retire(),
                Action::Fail(failure) => self.ending.fail(failure),
            }
        }
        Ok(())
    }

    fn show_state(&self) {
        let (state, reason) = match self.role.state() {
            RoleState::Starting => (ServiceState::Starting, String::new()),
            RoleState::Unprotected(reason) => (ServiceState::Unprotected, self.reason_text(reason)),
            RoleState::Syncing | RoleState::Sealing => (
                ServiceState::Syncing,
                self.hindrance.clone().unwrap_or_default(),
            ),
            RoleState::Protected => (ServiceState::Protected, String::new()),
            RoleState::Retired => (ServiceState::TakingOver, String::new()),
            _ => return,
        };
        self.common.page.set_term(self.role.term());
        self.common.page.set_state(state, &reason);
        self.common.ring_front();
    }

    fn reason_text(&self, reason: Reason) -> String {
        let text = match (reason, &self.hindrance) {
            (Reason::Forked | Reason::Unfit, Some(why)) => return why.clone(),
            (Reason::Forked, None) => "it has more than one process",
            (Reason::Unfit, None) => "it holds something that cannot be replicated",
            (Reason::NoStandbyYet, _) => "a standby is being started",
            (Reason::StandbyDied, _) => "the standby died; a new one is being started",
            (Reason::Adopted, _) => "the primary died; a standby is being started",
        };
        match &self.last_failure {
            Some(why) => format!("{text}; the last attempt failed: {why}"),
            None => text.to_owned(),
        }
    }

    fn take_report(&mut self, report: TracerReport) -> io::Result<()> {
        match report {
            TracerReport::ReadyToSeal(fill) => {
                if fill == self.fill && self.role.state() == RoleState::Syncing {
                    self.capturing.seal_next(now_ns());
                }
            }
            TracerReport::Unfit(why) => self.unfit(why)?,
            TracerReport::Forked(why) => {
                log!("{why}");
                self.hindrance = Some(why);
                self.apply(Event::Forked)?;
            }
            TracerReport::SingleAgain => {
                self.hindrance = None;
                self.apply(Event::SingleAgain)?;
            }
            TracerReport::Dying(death) => self.service_dies(death)?,
            TracerReport::Gone(death) => self.service_gone(death)?,
            TracerReport::Pids(pids) => self.take_processes(&pids),
            TracerReport::Broken(why) => {
                log!("replication failed: {why}");
                self.last_failure = Some(why);
                self.replace_standby()?;
            }
        }
        Ok(())
    }

    /// Something of the service cannot be replicated.
    fn unfit(&mut self, why: String) -> io::Result<()> {
        if self.hindrance.as_ref() != Some(&why) {
            log!("not to be replicated: {why}");
        }
        self.hindrance = Some(why);
        self.apply(Event::Unfit)
    }

    fn take_requests(&mut self) -> io::Result<()> {
        while let Some((request, asker)) = self.common.control.next_request()? {
            match request {
                Request::Signal(signal) => {
                    let sent = self.send_signal(signal).map_err(|error| error.to_string());
                    let outcome = sent.as_ref().map(|_| ()).map_err(String::as_str);
                    self.common.control.answer(&asker, outcome);
                }
                Request::Stop => self.stop_service(asker)?,
                Request::Switchover => self.switch_over(asker),
            }
        }
        Ok(())
    }

    /// Sleeps until something is to do, the tracer has made a step, or the next capture is due.
    /// Watching a capture awake would take the spare core from the standby.
    fn rest(&mut self) -> io::Result<()> {
        if !self
            .mailbox
            .handshake
            .main_falls_asleep(self.capturing.seen())
        {
            return Ok(());
        }
        let timeout = self.sleep_limit();
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 16];
        let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        self.mailbox.handshake.main_is_awake();
        for event in &events[..count] {
            let tag = event.data.u64();
            if tag == Source::MainBell as u64 {
                self.mailbox.answer();
            } else if tag == Source::Control as u64 {
                self.take_requests()?;
            } else if tag == Source::StandbyChannel as u64 {
                self.hear_standby()?;
            } else if tag == Source::StageEnd as u64 {
                self.stage_ended()?;
            }
        }
        Ok(())
    }

    fn sleep_limit(&self) -> Option<Timespec> {
        let due = [
            self.capture_due_ns(),
            self.standby_due_ns(),
            self.warm_due_ns(),
            self.ending.due_ns(),
        ]
        .into_iter()
        .flatten()
        .min()?;
        let left = due.saturating_sub(now_ns());
        Some(Timespec {
            tv_sec: (left / 1_000_000_000) as i64,
            tv_nsec: (left % 1_000_000_000) as i64,
        })
    }
}

fn watch(epoll: &OwnedFd, source: BorrowedFd<'_>, tag: Source) -> io::Result<()> {
    let data = epoll::EventData::new_u64(tag as u64);
    epoll::add(epoll, source, data, epoll::EventFlags::IN)?;
    Ok(())
}

impl Common {
    /// Takes what every node is given out of its bundle.
    pub fn of(bundle: &mut Bundle) -> io::Result<Common> {
        unbroken_sys::signalfd::unblock_all()?;
        let name = ServiceName::new(&bundle.config.name).map_err(io::Error::other)?;
        let directory = RunDirectory::new(name);
        Ok(Common {
            page: StatusPage::open(&directory).map_err(io::Error::other)?,
            claim: Claim::from_descriptor(bundle.take(Purpose::Lock)?),
            control: Control::from_descriptor(bundle.take(Purpose::Control)?),
            front_bell: bundle.take(Purpose::FrontBell)?,
            life: bundle.take(Purpose::Life)?,
            host_tun: bundle.take(Purpose::HostTun)?,
            outputs: [
                bundle.take(Purpose::Output)?,
                bundle.take(Purpose::ErrorOutput)?,
            ],
            config: bundle.config.clone(),
            directory,
        })
    }
}
