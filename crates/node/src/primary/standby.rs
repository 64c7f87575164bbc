//! The primary's hold on its standby: started, filled, replaced.

use super::{Primary, Source, watch};
use crate::bundle::{self, Purpose, Start};
use crate::channel;
use crate::clock::now_ns;
use crate::handshake::Step;
use crate::log;
use crate::primary::mailbox::Command;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use unbroken_core::role::{Event, Reason, RoleState};
use unbroken_link::{InputLogWriter, LocalLink};
use unbroken_sys::channel::Channel;

/// How long output may wait for a standby that is about to be complete.
const WARM_PATIENCE_NS: u64 = 10_000_000_000;

/// What a standby tells its primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Its empty replica stands: send memory.
    Empty,
    /// It has applied the epoch that completes the fill: it can take over.
    Warm,
    /// It cannot replicate this service.
    Refused(String),
}

pub(super) struct Standby {
    process: Child,
    channel: Channel,
    link: LocalLink,
    input_log: Option<InputLogWriter>,
    phase: Phase,
    /// Output waits for it to be ready, and not for longer than this.
    warm_until_ns: Option<u64>,
}

/// How far a standby is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It makes its stage and an empty replica.
    Preparing,
    /// It can be filled. Like one that prepares, it adopts the service if this node dies.
    Empty,
    /// It is being filled, or has been.
    Linked,
}

impl Standby {
    pub fn take_input_log(&mut self) -> Option<InputLogWriter> {
        self.input_log.take()
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what is wanted.
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The tracer may wait for it to make room, deaf to the service. It fails only for a bad
        // address.
        let _ = self.link.abandon();
    }
}

impl Primary {
    /// From the next attempt's time on there shall be a standby to which nothing has been sent.
    /// It is started at once all the same, unless standbys end before they are ready: whatever
    /// becomes of this node, it holds on to the service.
    pub(super) fn want_standby(&mut self) {
        self.end_linked_standby();
        let now = now_ns();
        let due = now + self.retry.next_wait_ns();
        self.standby_wanted_ns = Some(due);
        self.standby_start_ns = Some(if self.last_was_ready { now } else { due });
    }

    /// Ends a standby to which something has been sent; it has ended when this returns.
    pub(super) fn end_linked_standby(&mut self) {
        let standby = self.standby.as_ref();
        if standby.is_some_and(|standby| standby.phase == Phase::Linked) {
            self.standby = None;
            self.forget_standby();
        }
    }

    /// When [`Primary::tend_standby`] has something to do.
    pub(super) fn standby_due_ns(&self) -> Option<u64> {
        match &self.standby {
            None => self.standby_start_ns,
            Some(standby) if standby.phase == Phase::Empty && self.may_fill() => {
                self.standby_wanted_ns
            }
            Some(_) => None,
        }
    }

    /// Not while a capture is under way: it is of the standby before, and the tracer, which looks at
    /// commands first, would make its epoch for this one.
    fn may_fill(&self) -> bool {
        let state = self.role.state();
        self.capturing.seen() == Step::Idle
            && matches!(state, RoleState::Unprotected(reason) if reason != Reason::Forked)
    }

    /// Starts the standby that is wanted, and begins to fill it.
    pub(super) fn tend_standby(&mut self) -> io::Result<()> {
        if self.standby_due_ns().is_none_or(|due| due > now_ns()) {
            return Ok(());
        }
        if self.standby.is_some() {
            return self.begin_fill();
        }
        self.standby_start_ns = None;
        if let Err(error) = self.start_standby() {
            // The service runs on; perhaps memory or processes are short for a while.
            log!("no standby can be started: {error}");
            self.last_failure = Some(format!("start a standby: {error}"));
            self.standby_start_ns = Some(now_ns() + self.retry.next_wait_ns());
        }
        Ok(())
    }

    fn begin_fill(&mut self) -> io::Result<()> {
        let Some(standby) = &mut self.standby else {
            return Ok(());
        };
        let journal = standby.link.journal_writer(self.role.term())?;
        standby.phase = Phase::Linked;
        self.fill.0 += 1;
        let command = Command::Fill(journal, self.fill);
        self.mailbox.command(command, &self.bell);
        self.apply(Event::FillBegun)
    }

    fn start_standby(&mut self) -> io::Result<()> {
        self.standby = None;
        let common = &self.common;
        let bounds = common.config.bounds;
        let link = LocalLink::with_capacity(bounds.journal_bytes, bounds.input_log_bytes)?;
        let [journal, inputs, references] = link.descriptors();
        let own_pid = std::process::id().cast_signed();
        let own = Pid::from_raw(own_pid).ok_or_else(|| io::Error::other("no pid"))?;
        let own_pidfd = pidfd_open(own, PidfdFlags::empty())?;
        let mut descriptors = vec![
            (Purpose::Lock, common.claim.as_fd()),
            (Purpose::Control, common.control.as_fd()),
            (Purpose::FrontBell, common.front_bell.as_fd()),
            (Purpose::Life, common.life.as_fd()),
            (Purpose::HostTun, common.host_tun.as_fd()),
            (Purpose::Output, common.outputs[0].as_fd()),
            (Purpose::ErrorOutput, common.outputs[1].as_fd()),
            (Purpose::Epochs, journal),
            (Purpose::Inputs, inputs),
            (Purpose::References, references),
            (Purpose::StageInit, self.stage.as_fd()),
            (Purpose::StageControl, self.init.control()),
            (Purpose::Primary, own_pidfd.as_fd()),
            (Purpose::ServiceTun, self.traffic.service_tun()),
            (Purpose::ServiceNotify, self.notify.as_fd()),
        ];
        for (number, text) in self.traffic.texts() {
            let purposes = [Purpose::ServiceOutput, Purpose::ServiceErrorOutput];
            descriptors.extend(purposes.get(number).map(|&purpose| (purpose, text)));
        }
        let start = Start::Standby {
            primary_pid: own_pid,
            init_pid: self.init.host_pid,
            term: self.role.term(),
            early_deaths: self.role.give_up().early_deaths(),
            live_since_ns: self.role.give_up().live_since_ns(),
        };
        let (process, channel) = bundle::spawn(&common.config, start, &descriptors)?;
        log!("started standby {}", process.id());
        watch(&self.epoll, channel.as_fd(), Source::StandbyChannel)?;
        common.page.set_standby_pid(process.id().cast_signed());
        common.ring_front();
        let input_log = Some(link.input_log_writer()?);
        self.standby = Some(Standby {
            process,
            channel,
            link,
            input_log,
            phase: Phase::Preparing,
            warm_until_ns: None,
        });
        self.last_was_ready = false;
        Ok(())
    }

    pub(super) fn stop_standby(&mut self) {
        self.standby_start_ns = None;
        if self.standby.take().is_some() {
            self.forget_standby();
        }
    }

    /// Nothing of a link to a standby is used any more.
    fn forget_standby(&mut self) {
        self.mailbox.command(Command::Unlink, &self.bell);
        self.traffic.end_log();
        self.capturing.forget_fill();
        self.common.page.set_standby_pid(0);
        self.common.ring_front();
    }

    /// The link or the standby is of no use: another one, from the beginning.
    pub(super) fn replace_standby(&mut self) -> io::Result<()> {
        self.standby = None;
        self.forget_standby();
        self.apply(Event::StandbyDied)
    }

    /// All that a standby needs is on its way and output waits for it, which it must not do for
    /// ever: one that hangs is as good as dead.
    pub(super) fn expect_warmth(&mut self) {
        if let Some(standby) = &mut self.standby {
            standby.warm_until_ns = Some(now_ns() + WARM_PATIENCE_NS);
        }
    }

    pub(super) fn warm_due_ns(&self) -> Option<u64> {
        self.standby.as_ref()?.warm_until_ns
    }

    pub(super) fn give_up_slow_standby(&mut self) -> io::Result<()> {
        if self.warm_due_ns().is_none_or(|until| until > now_ns()) {
            return Ok(());
        }
        let seconds = WARM_PATIENCE_NS / 1_000_000_000;
        let why = format!("the standby was not ready within {seconds} s");
        log!("{why}");
        self.last_failure = Some(why);
        self.replace_standby()
    }

    /// Something came from the standby, or it is gone.
    pub(super) fn hear_standby(&mut self) -> io::Result<()> {
        let Some(standby) = &mut self.standby else {
            return Ok(());
        };
        match channel::receive::<Notice>(&standby.channel) {
            Ok((Notice::Empty, ..)) => {
                standby.phase = Phase::Empty;
                self.last_was_ready = true;
                self.tend_standby()
            }
            Ok((Notice::Warm, ..)) => self.standby_is_warm(),
            Ok((Notice::Refused(why), ..)) => {
                log!("the standby refused: {why}");
                self.unfit(why)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                log!("the standby is gone");
                self.replace_standby()
            }
            Err(error) => {
                log!("the standby's channel failed: {error}");
                self.replace_standby()
            }
        }
    }

    fn standby_is_warm(&mut self) -> io::Result<()> {
        if self.role.state() != RoleState::Sealing {
            return Ok(());
        }
        if let Some(standby) = &mut self.standby {
            standby.warm_until_ns = None;
        }
        self.retry.succeeded();
        (self.last_failure, self.hindrance) = (None, None);
        self.apply(Event::StandbyReady)?;
        if self.release_committed()? {
            self.capturing.want(now_ns());
        }
        Ok(())
    }
}

/// Kills the whole service behind a pidfd of pid 1 of its namespace.
pub(super) fn kill_stage(stage: &OwnedFd) {
    // It fails only when it has ended.
    let _ = rustix::process::pidfd_send_signal(stage, Signal::KILL);
}
