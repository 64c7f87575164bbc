//! The tracer thread: the only one that may use ptrace on the service. It waits for what the
//! service's processes do, captures when main asks, and fills standbys.

use super::mailbox::{Command, FillNumber, Mailbox, TracerReport};
use crate::capture::{Capture, CaptureError, Pause, Wire};
use crate::handshake::Step;
use crate::kernel_program::KernelProgram;
use crate::log;
use crate::steps::Captured;
use std::io;
use std::sync::{Arc, MutexGuard};
use unbroken_link::{Cause, JournalWriter};
use unbroken_sys::affinity;
use unbroken_sys::bpf::{DeadlineProgram, SocketDeadlines};
use unbroken_tracee::{Death, End, Event, TraceError, Tree};
use unbroken_wire::flows::{Activity, Connections};
use unbroken_wire::sent::SentBytes;

pub struct Tracer {
    tree: Tree,
    mailbox: Arc<Mailbox>,
    capture: Capture,
    /// Until the tree has it.
    deadlines: KernelProgram<DeadlineProgram>,
    socket_deadlines: KernelProgram<SocketDeadlines>,
    spare_core: usize,
    /// The last fill that was begun.
    fill: FillNumber,
    /// Whether main was told that there are several processes.
    forked: bool,
    /// The end of the process that ended last, and whether it has been told.
    last_end: End,
    told: bool,
    urgent: bool,
}

/// No reason to run unprotected: no wait ends early, but some late.
pub fn deadlines_unseen(error: &io::Error) {
    log!("a wait that an epoch interrupts can take up to twice its timeout: {error}");
}

impl Tracer {
    pub fn new(
        tree: Tree,
        mailbox: Arc<Mailbox>,
        capture: Capture,
        deadlines: KernelProgram<DeadlineProgram>,
        spare_core: usize,
    ) -> Tracer {
        Tracer {
            tree,
            mailbox,
            capture,
            deadlines,
            socket_deadlines: KernelProgram::Unasked,
            spare_core,
            fill: FillNumber::default(),
            forked: false,
            last_end: End {
                death: Death::Exited(0),
                crashed: false,
            },
            told: false,
            urgent: false,
        }
    }

    /// Serves until the service is gone or main has no more use for this thread.
    pub fn run(mut self) {
        self.report_processes();
        loop {
            let event = match self.next_event() {
                Ok(event) => event,
                Err(error) => return self.lost(&error),
            };
            match event {
                Some(Event::Bell) | None => {
                    if !self.attend() {
                        return;
                    }
                }
                Some(Event::Exiting { death, crashed, .. }) => {
                    self.last_end = End { death, crashed };
                    if !self.is_last_process() {
                        self.report_processes();
                    } else if !self.last_dies() {
                        return;
                    }
                }
                Some(Event::Exited { death, .. }) => {
                    self.last_end.death = death;
                    self.report_processes();
                }
                Some(Event::Forked { .. }) => self.report_processes(),
                Some(Event::Executed { .. }) => self.executed(),
                Some(Event::Empty) => {
                    if !self.told {
                        log!("the service is gone, and was not heard to die");
                    }
                    // A thread that is killed twice can pass the stop in which it is heard first.
                    if !self.told && !self.last_dies() {
                        return;
                    }
                    self.mailbox.report(TracerReport::Gone(self.last_end));
                    return;
                }
            }
        }
    }

    /// While a fill runs, its work goes on between events; otherwise this blocks. A thread that
    /// blocks may be urgent: a pause then is not lengthened by whoever else wants this core. One
    /// that copies memory by the megabyte must not be.
    fn next_event(&mut self) -> Result<Option<Event>, TraceError> {
        let filling = self.capture.is_filling();
        let urgent = !filling && self.capture.may_be_urgent();
        if self.urgent != urgent {
            self.urgent = urgent;
            // Without the right to it pauses are longer under load, and that is all.
            let _ = affinity::set_urgent(self.urgent);
        }
        if self.capture.is_filling() {
            self.tree.poll()
        } else {
            self.tree.wait().map(Some)
        }
    }

    /// Does what main asked for, and the next piece of a fill. False when this thread is to end.
    fn attend(&mut self) -> bool {
        if let Err(error) = self.watch_deadlines() {
            deadlines_unseen(&error);
        }
        while let Some(command) = self.mailbox.next_command() {
            match command {
                Command::Fill(journal, fill) => {
                    self.fill = fill;
                    self.begin_fill(journal);
                }
                Command::Unlink => self.capture.unlink(),
                Command::HandOver(cause) => return self.hand_over(cause),
                Command::Quit => return false,
                // Answers to a death that did not come to pass.
                Command::Retire | Command::Continue => {}
            }
        }
        if self.mailbox.handshake.step() == Step::Requested && !self.capture_epoch() {
            return false;
        }
        if self.capture.is_filling() {
            self.fill_on();
        }
        true
    }

    /// Takes the programs that see when waits end, as they are made.
    fn watch_deadlines(&mut self) -> io::Result<()> {
        if let Some(program) = self.deadlines.take_ready()? {
            self.tree.see_deadlines(program);
        }
        if let KernelProgram::Absent = self.socket_deadlines {
            return Ok(());
        }
        if let Some(loader) = self.tree.wants_socket_deadlines() {
            let core = self.spare_core;
            self.socket_deadlines.ask_for(core, move || loader.load());
            if let Some(program) = self.socket_deadlines.take_ready()? {
                self.tree.see_socket_deadlines(program);
            }
        }
        Ok(())
    }

    fn begin_fill(&mut self, journal: JournalWriter) {
        match self
            .capture
            .begin_fill(&mut self.tree, &*self.mailbox, journal)
        {
            Ok(()) => {}
            Err(error) => self.capture_failed(&error),
        }
    }

    fn fill_on(&mut self) {
        match self.capture.fill_on(&self.tree) {
            Ok(true) => self.mailbox.report(TracerReport::ReadyToSeal(self.fill)),
            Ok(false) => {}
            Err(error) => self.capture_failed(&error),
        }
    }

    /// False when this thread is to end.
    fn capture_epoch(&mut self) -> bool {
        let requested_at_ns = self.mailbox.handshake.requested_at_ns();
        let captured = self
            .capture
            .epoch(&mut self.tree, &*self.mailbox, requested_at_ns);
        let error = match captured {
            Ok(captured) => {
                self.published(captured);
                return true;
            }
            Err(error) => error,
        };
        // The service runs on: Stopped resumes it when it is dropped.
        if self.mailbox.handshake.failed() {
            self.mailbox.wake_main();
        }
        if let CaptureError::Killed = error {
            // Certain, and not to be heard again: that resume let it pass the stop in which a
            // thread is heard to die.
            log!("no epoch: {error}");
            self.last_end = End {
                death: Death::Killed(libc::SIGKILL),
                crashed: false,
            };
            return self.last_dies();
        }
        self.capture_failed(&error);
        true
    }

    fn published(&mut self, captured: Captured) {
        self.mailbox.leave_captured(captured);
        if self.mailbox.handshake.published() {
            self.mailbox.wake_main();
        }
        self.capture.settle();
    }

    fn capture_failed(&mut self, error: &CaptureError) {
        match error {
            CaptureError::Waiting => {}
            // The events that follow say how. The link stays: the standby may be told to take over.
            death if death.is_death() => log!("no epoch: {death}"),
            // Main knows, and has said or will say what comes next.
            CaptureError::StandbyGone => self.capture.unlink(),
            CaptureError::Unfit(why) => {
                self.capture.unlink();
                self.mailbox.report(TracerReport::Unfit(why.clone()));
            }
            CaptureError::Forked(_) => {
                self.capture.unlink();
                self.report_processes();
            }
            other => {
                self.capture.unlink();
                self.mailbox.report(TracerReport::Broken(other.to_string()));
            }
        }
    }

    fn report_processes(&mut self) {
        let pids: Vec<i32> = self
            .tree
            .processes()
            .iter()
            .filter(|process| process.dying().is_none())
            .map(|process| process.host_pid.0)
            .collect();
        // One that dies counts until it has ended: what it leaves behind finds another parent then.
        let count = self.tree.processes().len();
        self.mailbox.report(TracerReport::Pids(pids));
        if count > 1 && !self.forked {
            self.forked = true;
            self.capture.unlink();
            let why = CaptureError::Forked(count).to_string();
            self.mailbox.report(TracerReport::Forked(why));
        } else if count == 1 && self.forked {
            self.forked = false;
            self.mailbox.report(TracerReport::SingleAgain);
        }
    }

    /// What was followed of the old program is gone: a new fill.
    fn executed(&mut self) {
        if self.capture.is_linked() {
            self.capture_failed(&CaptureError::Executed);
        }
        self.report_processes();
    }

    fn is_last_process(&self) -> bool {
        self.tree
            .processes()
            .iter()
            .all(|process| process.dying().is_some())
    }

    /// The last process begins to die and stands until the next wait: main decides what its death
    /// means. False when this thread is to end.
    fn last_dies(&mut self) -> bool {
        self.told = true;
        self.mailbox.report(TracerReport::Dying(self.last_end));
        loop {
            match self.mailbox.await_command() {
                Command::HandOver(cause) => return self.hand_over(cause),
                Command::Retire => {
                    self.capture.retire();
                    return true;
                }
                Command::Continue => return true,
                Command::Quit => return false,
                Command::Unlink => self.capture.unlink(),
                Command::Fill(..) => {}
            }
        }
    }

    /// Main releases nothing any more: the standby goes on from the last epoch. This process ends
    /// at once, so that the kernel can take the dead service's pids away.
    fn hand_over(&mut self, cause: Cause) -> bool {
        log!("handing over: {cause:?}");
        self.capture.hand_over(cause);
        std::process::exit(0)
    }

    fn lost(&mut self, error: &TraceError) {
        log!("the tracer lost the service: {error}");
        self.mailbox.report(TracerReport::Gone(self.last_end));
    }
}

/// The wire is main's, and what it says of an epoch under way comes through the handshake.
impl Wire for Mailbox {
    fn stopped(&self) {
        if self.handshake.stopped() {
            self.wake_main();
        }
    }

    fn wait_drained(&self, activity: &mut Activity) -> u64 {
        let input_position = self.handshake.wait_drained();
        self.swap_activity(activity);
        input_position
    }

    fn sent(&self) -> MutexGuard<'_, SentBytes> {
        Mailbox::sent(self)
    }

    fn resumed(&self, pause: Pause) {
        let Pause {
            lasted_ns,
            was_working,
            next_due_ns,
        } = pause;
        if self.handshake.resumed(lasted_ns, was_working, next_due_ns) {
            self.wake_main();
        }
    }

    fn take_connections(&self) -> Connections {
        Mailbox::take_connections(self)
    }
}
