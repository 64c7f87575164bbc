//! What a capture reads of threads: values, of which nothing tells how they were come by.
//!
//! A stop makes them today. Whoever takes them needs none: a thread that waits can be read whole
//! while it sleeps, and what was seen of it then is the same as what a stop would have shown
//! (KERNEL.md, What a thread looks like from outside). Where a process has to act itself, as in a
//! survey, [`Stopped`] is asked for.

use crate::TraceError;
use crate::blocked::wait::Wait;
use crate::host::HostTid;
use crate::stop::Stopped;
use crate::thread::Thread;
use unbroken_image::{BlockedCall, Pid, Registers, SignalInfo, Tid};
use unbroken_sys::ptrace::{self, SIGNAL_INFO_BYTES};

/// What any instruction, and any signal, changes of a process and its threads: nothing announces
/// it. Its buffers are used again by the next reading.
#[derive(Debug, Default)]
pub struct ProcessReading {
    /// Signals queued for the process as a whole.
    pub shared_pending: Vec<SignalInfo>,
    /// In the order of [`crate::Process::threads`].
    pub threads: Vec<ThreadReading>,
}

/// One thread of it.
#[derive(Debug)]
pub struct ThreadReading {
    pub tid: Tid,
    pub host_tid: HostTid,
    /// As the kernel gives them at a stop: those of a call that sleeps say how it would be ended.
    registers: Registers,
    /// The call that it waits in, if registers alone do not say how to go on with it.
    wait: Option<Wait>,
    /// The `NT_X86_XSTATE` set.
    pub extended_state: Vec<u8>,
    /// The signals that are blocked once the call that the thread is in has ended (`ppoll` and
    /// `sigsuspend` have a mask of their own).
    pub signal_mask: u64,
    /// Signals queued for this thread alone.
    pub pending: Vec<SignalInfo>,
}

impl ThreadReading {
    fn of(thread: &Thread) -> ThreadReading {
        ThreadReading {
            tid: thread.tid,
            host_tid: thread.host_tid,
            registers: Registers::default(),
            wait: None,
            extended_state: Vec::new(),
            signal_mask: 0,
            pending: Vec::new(),
        }
    }

    /// The registers for a replica. `handler_runs` says that a signal is pending whose handler will
    /// run before anything else: then the call that the thread waits in has ended.
    pub fn image_registers(&self, handler_runs: bool) -> (Registers, Option<BlockedCall>) {
        match self.wait {
            None => (self.registers, None),
            Some(wait) => wait.for_replica(handler_runs),
        }
    }
}

impl Stopped<'_> {
    /// Reads a process into `reading`.
    pub fn read_process(&self, pid: Pid, reading: &mut ProcessReading) -> Result<(), TraceError> {
        let process = self.process(pid)?;
        reading.shared_pending.clear();
        peek_signals(process.leader(), true, &mut reading.shared_pending)?;
        reading.threads.truncate(process.threads.len());
        for (position, thread) in process.threads.iter().enumerate() {
            if position == reading.threads.len() {
                reading.threads.push(ThreadReading::of(thread));
            }
            self.read_thread(thread, &mut reading.threads[position])?;
        }
        Ok(())
    }

    fn read_thread(&self, thread: &Thread, reading: &mut ThreadReading) -> Result<(), TraceError> {
        let host_tid = thread.host_tid;
        reading.tid = thread.tid;
        reading.host_tid = host_tid;
        reading.registers = self.registers(host_tid)?;
        reading.wait = thread.waiting.get().wait;
        reading.signal_mask = self.signal_mask(host_tid)?;
        reading.pending.clear();
        peek_signals(host_tid, false, &mut reading.pending)?;
        read_extended_state(host_tid, &mut reading.extended_state)
    }
}

/// A buffer that was filled once fits (KERNEL.md, Length of the extended state).
fn read_extended_state(tid: HostTid, buffer: &mut Vec<u8>) -> Result<(), TraceError> {
    // Large enough for every component of today's processors, AMX tiles included (11,008).
    const ENOUGH_BYTES: usize = 16 * 1024;
    if buffer.is_empty() {
        buffer.resize(ENOUGH_BYTES, 0);
    }
    let length = ptrace::extended_state(tid.0, buffer);
    buffer.truncate(length.as_ref().copied().unwrap_or(0));
    buffer.shrink_to_fit();
    length
        .map(drop)
        .map_err(TraceError::of_thread("read extended state", tid))
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
