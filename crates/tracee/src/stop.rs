//! A tree of which no thread runs.

use crate::remote::Batch;
use crate::thread::{HostTid, Process, State, Thread, registers_from_user, registers_to_user};
use crate::{TraceError, Tree};
use unbroken_image::{Pid, Registers, RestartableSequence, SignalInfo, Tid};
use unbroken_sys::ptrace::{self, RseqConfiguration, SIGNAL_INFO_BYTES};

/// The tree while it stands still. Dropping it lets the service run on, as [`Stopped::resume`]
/// does; only that one can say that it failed.
pub struct Stopped<'tree> {
    pub(crate) tree: &'tree mut Tree,
    /// See [`Stopped::was_working`].
    pub(crate) was_working: bool,
    resumed: bool,
}

impl<'tree> Stopped<'tree> {
    pub(crate) fn new(tree: &'tree mut Tree) -> Self {
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

    /// The tracer's number of a thread of the service.
    pub fn host_tid(&self, tid: Tid) -> Option<HostTid> {
        self.tree.host_tid(tid)
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

    /// Reads the `NT_X86_XSTATE` set into `buffer`, whose capacity is kept and whose length becomes
    /// that of the set.
    pub fn extended_state(&self, tid: HostTid, buffer: &mut Vec<u8>) -> Result<(), TraceError> {
        // Large enough for every component of today's processors, AMX tiles included (11,008).
        const ENOUGH_BYTES: usize = 16 * 1024;
        buffer.resize(ENOUGH_BYTES, 0);
        let length = ptrace::extended_state(tid.0, buffer)
            .map_err(TraceError::of_thread("read extended state", tid))?;
        buffer.truncate(length);
        Ok(())
    }

    /// Loads the `NT_X86_XSTATE` set.
    pub fn set_extended_state(&self, tid: HostTid, state: &[u8]) -> Result<(), TraceError> {
        ptrace::set_extended_state(tid.0, state)
            .map_err(TraceError::of_thread("write extended state", tid))
    }

    /// The signals that are blocked once the call that the thread is in has ended (`ppoll` and
    /// `sigsuspend` have a mask of their own).
    pub fn signal_mask(&self, tid: HostTid) -> Result<u64, TraceError> {
        ptrace::signal_mask(tid.0).map_err(TraceError::of_thread("read the signal mask", tid))
    }

    pub fn set_signal_mask(&self, tid: HostTid, mask: u64) -> Result<(), TraceError> {
        ptrace::set_signal_mask(tid.0, mask)
            .map_err(TraceError::of_thread("write the signal mask", tid))
    }

    /// Appends the signals queued for the thread alone to `queue`.
    pub fn pending_signals(
        &self,
        tid: HostTid,
        queue: &mut Vec<SignalInfo>,
    ) -> Result<(), TraceError> {
        peek_signals(tid, false, queue)
    }

    /// Appends the signals queued for the whole process of `tid` to `queue`.
    pub fn shared_pending_signals(
        &self,
        tid: HostTid,
        queue: &mut Vec<SignalInfo>,
    ) -> Result<(), TraceError> {
        peek_signals(tid, true, queue)
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
            crate::tree::tolerate_death("set ptrace options", thread.host_tid, result)?;
        }
        Ok(())
    }

    /// Starts a batch of system calls that thread `tid` will make. Its process needs the blob
    /// ([`Stopped::install_blob`]).
    pub fn remote(&mut self, tid: HostTid) -> Batch<'_, 'tree> {
        Batch::new(self, tid)
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

    /// Ends tracing: the service runs on by itself. Group stops last.
    pub fn detach(mut self) -> Result<(), TraceError> {
        self.resumed = true;
        let mut stop_again = Vec::new();
        for process in &self.tree.processes {
            for thread in &process.threads {
                let result = ptrace::detach(thread.host_tid.0, 0);
                crate::tree::tolerate_death("detach", thread.host_tid, result)?;
            }
            let is_stopped = |thread: &Thread| matches!(thread.state, State::GroupStopped { .. });
            if process.threads.iter().any(is_stopped) {
                stop_again.push(process.host_pid);
            }
        }
        for pid in stop_again {
            // A process that ended needs no stop.
            let _ = unbroken_sys::signal::to_process(pid.0, libc::SIGSTOP);
        }
        self.tree.forget_all();
        Ok(())
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

fn peek_signals(tid: HostTid, shared: bool, queue: &mut Vec<SignalInfo>) -> Result<(), TraceError> {
    let mut chunk = [[0; SIGNAL_INFO_BYTES]; 8];
    let mut first = 0;
    loop {
        let found = ptrace::peek_signals(tid.0, shared, first, &mut chunk)
            .map_err(TraceError::of_thread("read pending signals", tid))?;
        queue.extend(chunk[..found].iter().map(|info| SignalInfo(info.to_vec())));
        if found < chunk.len() {
            return Ok(());
        }
        first += found as u64;
    }
}
