//! The standby: applies epochs to a warm replica, and becomes the primary when the other one is
//! gone.
//!
//! Two threads, as in the primary. The tracer thread holds the replica: it reads the journal,
//! applies, and brings the replica to life; from then on it is a primary's tracer. The main thread
//! watches the primary and, after a takeover, carries the wire.

mod files;
pub mod follow;
pub mod image;

use crate::bundle::{Bundle, Purpose, Start};
use crate::log;
use crate::primary::mailbox::Mailbox;
use crate::primary::{Common, Primary, ServiceEnds};
use crate::stage::launch::Init;
use crate::status_page::ServiceState;
use crate::title;
use follow::Follower;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use unbroken_core::give_up::{GiveUp, GiveUpLimits};
use unbroken_core::role::{Action, Failure, Role};
use unbroken_link::{Cause, LocalLink};
use unbroken_sys::affinity;
use unbroken_tracee::{Bell, Death};

/// What the other node, the primary, left in our hands for the day it dies.
pub struct Predecessor {
    /// The connection to its stage init; the service lives while anybody holds one.
    pub init: Init,
    /// pidfd of that init.
    pub stage: OwnedFd,
    pub tun: OwnedFd,
    pub notify: OwnedFd,
    pub outputs: [Option<OwnedFd>; 2],
}

/// How the following of a primary ended.
pub enum Outcome {
    /// The service lives in this node's hands, which is the primary now.
    Live {
        ends: Box<ServiceEnds>,
        role: Role,
        actions: Vec<Action>,
        bell: Bell,
        /// How long the takeover took; `None` when the running service was adopted.
        took_ns: Option<u64>,
        cause: Cause,
        /// What the replica lacks that the service had, for people.
        shortcomings: Vec<String>,
    },
    /// The service is lost.
    Failed {
        failure: Failure,
        cause: Cause,
        /// What was tried in vain.
        why: Option<String>,
    },
    /// The replica is of no use any more.
    Void,
}

/// Shared with the tracer thread.
pub struct Watch {
    pub primary_died: AtomicBool,
    /// Rung when the tracer thread has an outcome.
    pub bell: OwnedFd,
}

/// Runs a standby until it has become a primary and that has ended, or it is of no use.
pub fn run(mut bundle: Bundle) -> io::Result<()> {
    let common = Common::of(&mut bundle)?;
    log::open(common.directory.path(), "standby")?;
    affinity::bind(0, &[common.config.spare_core])?;
    let role = role_of(&bundle)?;
    let primary = bundle.take(Purpose::Primary)?;
    let link = LocalLink::from_descriptors([
        bundle.take(Purpose::Epochs)?,
        bundle.take(Purpose::Inputs)?,
        bundle.take(Purpose::References)?,
    ])?;
    let watch = Arc::new(Watch {
        primary_died: AtomicBool::new(false),
        bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
    });
    let mailbox = Mailbox::new()?;
    let follower = Follower {
        config: common.config.clone(),
        host_tun: common.host_tun.try_clone()?,
        role,
        link: link.clone(),
        predecessor: predecessor_of(&mut bundle)?,
        tell: Arc::new(bundle.channel.as_fd().try_clone_to_owned()?.into()),
        watch: watch.clone(),
        mailbox: mailbox.clone(),
    };
    let (sender, outcomes) = mpsc::channel();
    let tracer = std::thread::Builder::new()
        .name("tracer".to_owned())
        .spawn(move || follower.run(&sender))?;
    let outcome = await_outcome(&primary, &outcomes, &watch, &link, &common)?;
    // The primary that this node may become must not seem to be one that watches itself.
    drop(primary);
    match outcome {
        Outcome::Live {
            ends,
            role,
            actions,
            bell,
            took_ns,
            cause,
            shortcomings,
        } => {
            // The old primary had it protected; whoever sees the takeover counted must see that
            // this is over.
            common.page.set_term(role.term());
            common
                .page
                .set_state(ServiceState::Unprotected, "a standby is being started");
            if let Some(took_ns) = took_ns {
                common
                    .page
                    .record_takeover(took_ns / 1000, &cause_text(&cause, &shortcomings));
            }
            if let Cause::Switchover(asker) = &cause {
                common.control.answer(asker, Ok(()));
            }
            drop(bundle);
            title::show(&common.config.name, "primary");
            Primary::new(common, *ends, role, mailbox, bell)?.run(actions)
        }
        Outcome::Failed {
            failure,
            cause,
            why,
        } => {
            let death = match cause {
                Cause::Killed(signal) | Cause::Crashed(signal) => Death::Killed(signal),
                Cause::PrimaryDied | Cause::Switchover(_) => Death::Killed(libc::SIGKILL),
            };
            crate::primary::close_failed(&common, failure, death, why.as_deref())
        }
        Outcome::Void => {
            log!("the replica is void");
            let _ = tracer.join();
            Ok(())
        }
    }
}

/// For people.
fn cause_text(cause: &Cause, shortcomings: &[String]) -> String {
    let cause = match cause {
        Cause::Killed(signal) => format!("the service was killed by signal {signal}"),
        Cause::Crashed(signal) => format!("the service crashed by signal {signal}"),
        Cause::Switchover(_) => "a switchover was asked for".to_owned(),
        Cause::PrimaryDied => "the process of unbroken that held the service died".to_owned(),
    };
    let others = shortcomings.iter().map(String::as_str);
    let parts: Vec<&str> = std::iter::once(&*cause).chain(others).collect();
    parts.join(", ")
}

fn role_of(bundle: &Bundle) -> io::Result<Role> {
    match bundle.start {
        Start::Standby {
            term,
            early_deaths,
            live_since_ns,
            ..
        } => {
            let limits = GiveUpLimits::default();
            Ok(Role::standby(
                term,
                GiveUp::continued(limits, early_deaths, live_since_ns),
            ))
        }
        Start::Launch => Err(io::Error::other("not started as a standby")),
    }
}

fn predecessor_of(bundle: &mut Bundle) -> io::Result<Predecessor> {
    let Start::Standby { init_pid, .. } = bundle.start else {
        return Err(io::Error::other("not started as a standby"));
    };
    Ok(Predecessor {
        init: Init::adopt(bundle.take(Purpose::StageControl)?, init_pid),
        stage: bundle.take(Purpose::StageInit)?,
        tun: bundle.take(Purpose::ServiceTun)?,
        notify: bundle.take(Purpose::ServiceNotify)?,
        outputs: [
            bundle.take_if_sent(Purpose::ServiceOutput),
            bundle.take_if_sent(Purpose::ServiceErrorOutput),
        ],
    })
}

/// Blocks until the tracer thread has an outcome; tells it when the primary has died.
fn await_outcome(
    primary: &OwnedFd,
    outcomes: &mpsc::Receiver<Outcome>,
    watch: &Watch,
    link: &LocalLink,
    common: &Common,
) -> io::Result<Outcome> {
    let mut watched = vec![
        PollFd::new(&watch.bell, PollFlags::IN),
        PollFd::new(primary, PollFlags::IN),
    ];
    loop {
        match poll(&mut watched, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if watched
            .get(1)
            .is_some_and(|primary| !primary.revents().is_empty())
        {
            common.page.set_state(ServiceState::TakingOver, "");
            watch.primary_died.store(true, Ordering::SeqCst);
            link.wake_standby()?;
            watched.truncate(1);
        }
        match outcomes.try_recv() {
            Ok(outcome) => return Ok(outcome),
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => return Ok(Outcome::Void),
        }
    }
}
