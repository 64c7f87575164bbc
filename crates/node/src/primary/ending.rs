//! How a service ends, and how this node lets it go.

use super::standby::kill_stage;
use super::{Common, Primary};
use crate::clock::now_ns;
use crate::log;
use crate::primary::mailbox::Command;
use crate::status_page::ServiceState;
use rustix::process::{Pid, Signal, kill_process};
use std::io;
use unbroken_core::give_up::Fault;
use unbroken_core::role::{Event, Failure, RoleState};
use unbroken_link::{Asker, Cause};
use unbroken_tracee::{Death, End};

/// A service that was asked to stop has this long before it is killed.
const STOP_PATIENCE_NS: u64 = 10_000_000_000;
/// What its sockets still hold has this long to reach the clients.
const LINGER_NS: u64 = 1_000_000_000;

#[derive(Default)]
pub(super) struct Ending {
    /// Signals that the user sent through us: dying of one is the service's own end.
    sent: Vec<i32>,
    stoppers: Vec<Asker>,
    kill_at_ns: Option<u64>,
    failure: Option<Failure>,
    /// The death that ends everything, and when the last packets have had their time.
    end: Option<(Death, u64)>,
    /// Why the standby is to take over, should it have to.
    cause: Option<Cause>,
    handed_over: bool,
    /// Another node has gone on with the service.
    retired: bool,
    /// Nobody is left to send the standby anything.
    tracer_is_gone: bool,
    switchover: Option<Asker>,
}

impl Ending {
    pub fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
    }

    pub fn retire(&mut self) {
        self.retired = true;
    }

    pub fn due_ns(&self) -> Option<u64> {
        [self.kill_at_ns, self.end.map(|(_, until)| until)]
            .into_iter()
            .flatten()
            .min()
    }
}

impl Primary {
    pub(super) fn is_over(&self) -> bool {
        self.ending.handed_over
            || self.ending.retired
            || self.ending.end.is_some_and(|(_, until)| now_ns() >= until)
    }

    /// Whether the service meant to end: by exit, or by a signal that asks for it.
    fn is_own_end(&self, death: Death) -> bool {
        match death {
            Death::Exited(_) => true,
            Death::Killed(signal) => {
                !self.ending.stoppers.is_empty() || self.ending.sent.contains(&signal)
            }
        }
    }

    /// The last process of the service begins to die; the tracer holds it until this returns an
    /// answer through the mailbox.
    pub(super) fn service_dies(&mut self, end: End) -> io::Result<()> {
        log!("the service dies: {end:?}");
        let death = end.death;
        if self.is_own_end(death) {
            // Its last words need no commit: nothing will go on from here.
            self.mailbox.command(Command::Retire, &self.bell);
            self.apply(Event::ServiceEnded)?;
            self.traffic.collect_output(true)?;
            self.traffic.pass(&self.role);
            self.send_released()?;
            return Ok(());
        }
        self.ending.cause = Some(cause_of(end));
        self.apply(Event::ServiceDied(fault_of(end)))?;
        if !self.ending.handed_over {
            self.mailbox.command(Command::Continue, &self.bell);
        }
        Ok(())
    }

    /// From here on this thread releases nothing: the standby may say everything again.
    pub(super) fn hand_over(&mut self) {
        self.ending.handed_over = true;
        let cause = self.ending.cause.take().unwrap_or(Cause::PrimaryDied);
        self.mailbox.command(Command::HandOver(cause), &self.bell);
    }

    /// No process of the service is left.
    pub(super) fn service_gone(&mut self, end: End) -> io::Result<()> {
        let death = end.death;
        self.ending.tracer_is_gone = true;
        if self.ending.end.is_none() && !self.ending.handed_over {
            if !self.is_own_end(death) {
                self.apply(Event::ServiceDied(fault_of(end)))?;
            } else {
                self.apply(Event::ServiceEnded)?;
            }
            self.ending.end = Some((death, now_ns() + LINGER_NS));
        }
        Ok(())
    }

    pub(super) fn stage_ended(&mut self) -> io::Result<()> {
        rustix::event::epoll::delete(&self.epoll, &self.stage)?;
        Ok(())
    }

    /// Signals the service's first process.
    pub(super) fn send_signal(&mut self, signal: i32) -> io::Result<()> {
        if !self.ending.sent.contains(&signal) {
            self.ending.sent.push(signal);
        }
        let pid = Pid::from_raw(self.host_pid).ok_or_else(|| io::Error::other("it has ended"))?;
        let signal =
            Signal::from_named_raw(signal).ok_or_else(|| io::Error::other("no such signal"))?;
        kill_process(pid, signal)?;
        Ok(())
    }

    pub(super) fn stop_service(&mut self, asker: Asker) -> io::Result<()> {
        self.ending.stoppers.push(asker);
        self.ending
            .kill_at_ns
            .get_or_insert(now_ns() + STOP_PATIENCE_NS);
        // It may be gone already; its end is on its way to us then.
        let _ = self.send_signal(libc::SIGTERM);
        Ok(())
    }

    /// The service's processes have changed. A request to stop is for whoever is the first now: the
    /// one that it went to may have left another in its place.
    pub(super) fn take_processes(&mut self, pids: &[i32]) {
        self.common.page.set_service_pids(pids);
        self.common.ring_front();
        let before = self.host_pid;
        self.host_pid = pids.first().copied().unwrap_or(before);
        if self.host_pid != before && self.ending.kill_at_ns.is_some() {
            // As in `stop_service`.
            let _ = self.send_signal(libc::SIGTERM);
        }
    }

    pub(super) fn end_if_due(&mut self) -> io::Result<()> {
        if self.ending.kill_at_ns.is_some_and(|at| now_ns() >= at) {
            self.ending.kill_at_ns = None;
            kill_stage(&self.stage);
        }
        Ok(())
    }

    /// The user wants the standby to go on in this node's place.
    pub(super) fn switch_over(&mut self, asker: Asker) {
        if self.role.state() != RoleState::Protected {
            let refusal = "it has no standby that could take over now";
            self.common.control.answer(&asker, Err(refusal));
            return;
        }
        self.ending.switchover = Some(asker);
        self.capturing.want(now_ns());
    }

    /// After an epoch: hands over when the user asked for it.
    pub(super) fn hand_over_if_asked(&mut self) -> io::Result<()> {
        let Some(asker) = self.ending.switchover.take() else {
            return Ok(());
        };
        if self.role.state() != RoleState::Protected {
            self.common
                .control
                .answer(&asker, Err("the standby died meanwhile"));
            return Ok(());
        }
        self.send_released()?;
        self.ending.cause = Some(Cause::Switchover(asker));
        self.apply(Event::TakeoverOrdered(None))
    }

    /// The tracer ends this process as its last act. Without one the standby hears that this
    /// process is gone.
    fn wait_for_tracer(&self) -> io::Result<()> {
        if self.ending.tracer_is_gone {
            std::process::exit(0);
        }
        loop {
            std::thread::park();
        }
    }

    /// The loop is over. A node that handed over just ends; one whose service ended cleans up.
    pub(super) fn close(mut self) -> io::Result<()> {
        if self.ending.handed_over {
            return self.wait_for_tracer();
        }
        kill_stage(&self.stage);
        self.stop_standby();
        if self.ending.retired {
            return Ok(());
        }
        let (death, _) = self.ending.end.unwrap_or((Death::Exited(0), 0));
        let code = exit_code_of(death);
        let common = &self.common;
        if let Some(failure) = self.ending.failure {
            common
                .page
                .set_state(ServiceState::Failed, &failure_text(failure, death));
        }
        common.page.set_exit(code);
        for asker in &self.ending.stoppers {
            common.control.answer(asker, Ok(()));
        }
        // Its last address goes with it: whoever asks now asks nobody.
        common.directory.remove()?;
        common.ring_front();
        Ok(())
    }
}

fn fault_of(end: End) -> Fault {
    if end.crashed {
        Fault::Own
    } else {
        Fault::External
    }
}

fn cause_of(end: End) -> Cause {
    match end.death {
        Death::Killed(signal) if end.crashed => Cause::Crashed(signal),
        Death::Killed(signal) => Cause::Killed(signal),
        Death::Exited(_) => Cause::Killed(libc::SIGKILL),
    }
}

/// A node that never became a primary reports that the service is lost, and cleans up.
pub fn close_failed(
    common: &Common,
    failure: Failure,
    death: Death,
    why: Option<&str>,
) -> io::Result<()> {
    let mut text = failure_text(failure, death);
    if let Some(why) = why {
        text = format!("{text}: {why}");
    }
    common.page.set_state(ServiceState::Failed, &text);
    common.page.set_exit(exit_code_of(death));
    common.directory.remove()?;
    common.ring_front();
    Ok(())
}

/// As shells have it: 128 + n for death by signal n.
fn exit_code_of(death: Death) -> u8 {
    match death {
        Death::Exited(code) => code as u8,
        Death::Killed(signal) => 128u8.wrapping_add(signal as u8),
    }
}

fn failure_text(failure: Failure, death: Death) -> String {
    let how = match death {
        Death::Exited(code) => format!("exited with {code}"),
        Death::Killed(signal) => format!("was killed by signal {signal}"),
    };
    match failure {
        Failure::DiedUnprotected => {
            format!("the service {how} while no standby could take over")
        }
        Failure::GaveUp => format!(
            "given up: the service {how}, again right after a takeover; the cause is in its \
             state or its input, not in the machine"
        ),
        Failure::TakeoverFailed => "the replica could not be brought to life".to_owned(),
    }
}
