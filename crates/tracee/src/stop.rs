//! A tree of which no thread runs.

use crate::TraceError;
use crate::host::HostTid;
use crate::thread::{Process, State, Thread, registers_from_user, registers_to_user};
use crate::tree::{Tree, tolerate_death};
use unbroken_image::{Pid, Registers, RestartableSequence};
use unbroken_sys::clock;
use unbroken_sys::ptrace::{self, RseqConfiguration};

/// The tree while it stands still. Dropping it lets the service run on, as [`Stopped::resume`]
/// does; only that one can say that it failed.
pub struct Stopped<'tree> {
    pub(crate) tree: &'tree mut Tree,
    /// See [`Stopped::was_working`].
    pub(crate) was_working: bool,
    resumed: bool,
}

/// Of a stop of the whole tree, by CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StopTimes {
    pub began_ns: u64,
    /// When this tracer let the tree go on last; 0 if it never did.
    pub last_resumed_ns: u64,
}

impl Tree {
    /// Stops every thread of every process. Signals that arrive meanwhile stay queued; one that was
    /// being delivered is delivered first, so that its frame is part of what is seen.
    ///
    /// Returns [`TraceError::Ended`] when all processes are dying; the next waits say how. A process
    /// that dies while others live is left out of [`Stopped::processes`].
    pub fn stop(&mut self) -> Result<Stopped<'_>, TraceError> {
        let times = StopTimes {
            began_ns: clock::monotonic_ns(),
            last_resumed_ns: self.last_resumed_ns,
        };
        // Every request before the first wait: the threads then stop at the same time.
        for process in 0..self.processes.len() {
            for thread in 0..self.processes[process].threads.len() {
                let thread = &self.processes[process].threads[thread];
                let (tid, state) = (thread.host_tid, thread.state);
                match state {
                    State::Running | State::Listening => {
                        tolerate_death("interrupt", tid, ptrace::interrupt(tid.0))?;
                    }
                    State::AtEvent => self.go_on(tid, 0, true)?,
                    _ => {}
                }
            }
        }
        self.settle()?;
        if self.processes.iter().all(|process| process.dying.is_some()) {
            return Err(TraceError::Ended);
        }
        let mut stopped = Stopped::new(self);
        stopped.settle_user_code()?;
        stopped.settle_calls(times)?;
        Ok(stopped)
    }
}

impl<'tree> Stopped<'tree> {
    fn new(tree: &'tree mut Tree) -> Self {
        Stopped {
            tree,
            was_working: false,
            resumed: false,
        }
    }

    /// The processes that are not dying, parents before the children they made.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        self.tree
            .processes
            .iter()
            .filter(|process| process.dying.is_none())
    }

    /// Whether a process is dying. Until it has ended its children have it for their parent.
    pub fn any_dies(&self) -> bool {
        let mut processes = self.tree.processes.iter();
        processes.any(|process| process.dying.is_some())
    }

    /// A process by its number in the service's namespace.
    pub fn process(&self, pid: Pid) -> Result<&Process, TraceError> {
        self.tree
            .process(pid)
            .ok_or(TraceError::NoSuchProcess { pid: pid.0 })
    }

    /// A thread and its process.
    pub fn thread(&self, tid: HostTid) -> Option<(&Process, &Thread)> {
        self.tree.thread(tid)
    }

    /// Whether this stop met a thread in its work: in user code, or in a call that did not wait.
    pub fn was_working(&self) -> bool {
        self.was_working
    }

    /// The general registers, read from the kernel once in each stop.
    pub fn registers(&self, tid: HostTid) -> Result<Registers, TraceError> {
        let (_, thread) = self.thread(tid).ok_or(TraceError::gone(tid))?;
        if let Some(registers) = thread.registers.get() {
            return Ok(registers);
        }
        let user =
            ptrace::registers(tid.0).map_err(TraceError::of_thread("read registers", tid))?;
        let registers = registers_from_user(&user);
        thread.registers.set(Some(registers));
        Ok(registers)
    }

    /// Loads general registers. `orig_rax` and a restart code in `rax` keep their meaning: the
    /// kernel restarts the call or ends it with `EINTR` when the thread runs on.
    pub fn set_registers(&self, tid: HostTid, registers: &Registers) -> Result<(), TraceError> {
        let (_, thread) = self.thread(tid).ok_or(TraceError::gone(tid))?;
        thread.registers.set(Some(*registers));
        ptrace::set_registers(tid.0, &registers_to_user(registers))
            .map_err(TraceError::of_thread("write registers", tid))
    }

    /// Loads the `NT_X86_XSTATE` set.
    pub fn set_extended_state(&self, tid: HostTid, state: &[u8]) -> Result<(), TraceError> {
        ptrace::set_extended_state(tid.0, state)
            .map_err(TraceError::of_thread("write extended state", tid))
    }

    /// See [`crate::ThreadReading::signal_mask`].
    pub(crate) fn signal_mask(&self, tid: HostTid) -> Result<u64, TraceError> {
        ptrace::signal_mask(tid.0).map_err(TraceError::of_thread("read the signal mask", tid))
    }

    pub fn set_signal_mask(&self, tid: HostTid, mask: u64) -> Result<(), TraceError> {
        ptrace::set_signal_mask(tid.0, mask)
            .map_err(TraceError::of_thread("write the signal mask", tid))
    }

    /// The thread's registration by `rseq(2)`.
    pub fn restartable_sequence(
        &self,
        tid: HostTid,
    ) -> Result<Option<RestartableSequence>, TraceError> {
        let RseqConfiguration {
            address,
            size_bytes,
            signature,
            flags,
            ..
        } = self.rseq_configuration(tid)?;
        Ok((address != 0).then_some(RestartableSequence {
            address,
            length_bytes: size_bytes,
            signature,
            flags,
        }))
    }

    pub(crate) fn rseq_configuration(&self, tid: HostTid) -> Result<RseqConfiguration, TraceError> {
        ptrace::rseq_configuration(tid.0)
            .map_err(TraceError::of_thread("read the rseq registration", tid))
    }

    /// Whether the service dies with the tracer. Holds for what it creates from now on, too.
    pub fn set_exit_kill(&mut self, exit_kill: bool) -> Result<(), TraceError> {
        let options = if exit_kill {
            self.tree.options | libc::PTRACE_O_EXITKILL
        } else {
            self.tree.options & !libc::PTRACE_O_EXITKILL
        };
        self.tree.options = options;
        for thread in self
            .tree
            .processes
            .iter()
            .flat_map(|process| &process.threads)
        {
            let result = ptrace::set_options(thread.host_tid.0, options);
            tolerate_death("set ptrace options", thread.host_tid, result)?;
        }
        Ok(())
    }

    /// Whether a process has been killed since it was stopped: its threads have left the stop then,
    /// and may be anywhere between there and their end.
    pub fn is_broken(&self) -> bool {
        let dying = |tid: HostTid| match ptrace::signal_info(tid.0) {
            // si_code: the event of the stop, above the signal.
            Ok(information) => information[9] == libc::PTRACE_EVENT_EXIT as u8,
            Err(_) => true,
        };
        // A fatal signal wakes every thread of its process at once (kernel/signal.c,
        // complete_signal), so one of each tells.
        let processes = self.tree.processes.iter();
        processes
            .filter(|process| process.dying.is_none())
            .filter_map(|process| process.threads.first())
            .any(|thread| thread.can_run_calls() && dying(thread.host_tid))
    }

    /// Lets the service run on.
    pub fn resume(mut self) -> Result<(), TraceError> {
        self.resumed = true;
        self.tree.resume_all()
    }

    /// Leaves every thread where it is; the next [`Tree::stop`] finds it so.
    pub fn stay(mut self) {
        self.resumed = true;
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if !self.resumed {
            // Failure here means that the thread died, which the next wait reports.
            let _ = self.tree.resume_all();
        }
    }
}
