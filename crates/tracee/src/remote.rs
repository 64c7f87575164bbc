//! Batches of system calls that a stopped thread makes.
//!
//! What a tracer that dies leaves behind is the point. The order of [`Batch::run`] is: write table
//! and saved registers, load `rip` (from here the thread brings itself back), block signals, let
//! it run, and afterwards signal mask first, registers last. Between any two of these steps the
//! thread, let go by the kernel, ends where it was before, with its own mask.

pub(crate) mod buffer;
mod run;

use crate::TraceError;
use crate::host::HostTid;
use crate::stop::Stopped;
use crate::thread::State;
use buffer::BatchBuffer;
use std::io;
use unbroken_sys::remote_code::{
    self, ENTRIES, ENTRY_BYTES, SCRATCH, SCRATCH_BYTES, TABLE, header,
};

/// An address in a process of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteAddr(pub u64);

impl RemoteAddr {
    /// The address `bytes` further on.
    pub fn plus(self, bytes: u64) -> RemoteAddr {
        RemoteAddr(self.0 + bytes)
    }
}

/// The result that a call has before it is made.
pub(crate) const NOT_REACHED: i64 = -(libc::ENOSYS as i64);

/// One call of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchedCall(usize);

impl<'tree> Stopped<'tree> {
    /// Starts a batch of system calls that thread `tid` will make. Its process needs the blob
    /// ([`Stopped::install_blob`]).
    pub fn remote(&mut self, tid: HostTid) -> Batch<'_, 'tree> {
        Batch::new(self, tid)
    }
}

/// System calls to be made by one thread of the service, in order. All are made, whether or not
/// one fails.
pub struct Batch<'stopped, 'tree> {
    stopped: &'stopped mut Stopped<'tree>,
    tid: HostTid,
    in_stub: bool,
}

impl<'stopped, 'tree> Batch<'stopped, 'tree> {
    /// Calls that fit in one batch.
    pub const CALLS: usize = ENTRIES;

    pub(crate) fn new(stopped: &'stopped mut Stopped<'tree>, tid: HostTid) -> Self {
        stopped.tree.batch.calls = 0;
        stopped.tree.batch.scratch = 0;
        Batch {
            stopped,
            tid,
            in_stub: false,
        }
    }

    /// For a process that has nothing to come back to: its registers are lost, signals are not
    /// held off, and it is killed if the tracer dies while it runs. Cheaper.
    pub fn in_stub(mut self) -> Self {
        self.in_stub = true;
        self
    }

    /// Adds system call `number` with up to six arguments.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Result<BatchedCall, TraceError> {
        let buffer = &mut self.stopped.tree.batch;
        if buffer.calls == ENTRIES {
            return Err(TraceError::BatchFull { what: "its table" });
        }
        let offset = buffer.table_end();
        buffer.set_word(offset, number as u64);
        for position in 0..6 {
            let argument = arguments.get(position).copied().unwrap_or(0);
            buffer.set_word(offset + 8 + position * 8, argument);
        }
        buffer.set_word(offset + 56, NOT_REACHED as u64);
        buffer.calls += 1;
        Ok(BatchedCall(buffer.calls - 1))
    }

    /// Puts bytes where the calls can read (and change) them, aligned to 8.
    pub fn scratch(&mut self, bytes: &[u8]) -> Result<RemoteAddr, TraceError> {
        let address = self.reserve(bytes.len())?;
        let offset = (address.0 - remote_code::DATA) as usize;
        self.stopped.tree.batch.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(address)
    }

    /// As [`Batch::scratch`], with a NUL behind the bytes: a string of the kernel's.
    pub fn scratch_string(&mut self, bytes: &[u8]) -> Result<RemoteAddr, TraceError> {
        let address = self.reserve(bytes.len() + 1)?;
        let offset = (address.0 - remote_code::DATA) as usize;
        self.stopped.tree.batch.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(address)
    }

    /// Zeroed room for a call's answer, aligned to 8.
    pub fn reserve(&mut self, length_bytes: usize) -> Result<RemoteAddr, TraceError> {
        let buffer = &mut self.stopped.tree.batch;
        let end = buffer.scratch + length_bytes.next_multiple_of(8);
        if end > SCRATCH_BYTES {
            return Err(TraceError::BatchFull {
                what: "its scratch memory",
            });
        }
        let offset = SCRATCH + buffer.scratch;
        buffer.data[offset..SCRATCH + end].fill(0);
        buffer.scratch = end;
        Ok(RemoteAddr(remote_code::DATA + offset as u64))
    }

    /// Calls that still fit.
    pub fn calls_left(&self) -> usize {
        ENTRIES - self.stopped.tree.batch.calls
    }

    /// Makes the calls. The thread is then as it was before; new threads and processes that the
    /// calls made stand in their first stop and belong to the tree.
    pub fn run(self) -> Result<Results<'stopped>, TraceError> {
        let Batch {
            stopped,
            tid,
            in_stub,
        } = self;
        let (process, thread) = stopped.thread(tid).ok_or(TraceError::gone(tid))?;
        let state = thread.state;
        if !matches!(state, State::Trapped | State::GroupStopped { .. }) {
            return Err(TraceError::CannotRunCalls { tid });
        }
        let notice = process.notice.ok_or(TraceError::NoBlob { tid })?;
        let (pid, own_tid) = (process.pid, thread.tid);
        let batch = &mut stopped.tree.batch;
        batch.set_word(header::COUNT, batch.calls as u64);
        batch.set_word(header::DONE, 0);
        if in_stub {
            stopped.run_in_stub(tid)?;
        } else {
            batch.set_word(header::PID, pid.0 as u64);
            batch.set_word(header::TID, own_tid.0 as u64);
            batch.set_word(header::SIGNAL, notice as u64);
            stopped.run_and_return(tid, notice)?;
        }
        let after = match state {
            State::GroupStopped { .. } => State::GroupStopped { listenable: false },
            _ => State::Trapped,
        };
        stopped.tree.set_state(tid, after);
        Ok(Results {
            buffer: &stopped.tree.batch,
        })
    }
}

/// What the calls of a batch returned.
pub struct Results<'buffer> {
    buffer: &'buffer BatchBuffer,
}

impl Results<'_> {
    /// The result of a call, or its errno.
    pub fn get(&self, call: BatchedCall) -> io::Result<u64> {
        let value = self.buffer.word(TABLE + call.0 * ENTRY_BYTES + 56);
        // The kernel's error range (include/linux/err.h).
        match value as i64 {
            errno @ -4095..=-1 => Err(io::Error::from_raw_os_error(-errno as i32)),
            _ => Ok(value),
        }
    }

    /// What now stands in scratch memory of this batch.
    pub fn bytes(&self, address: RemoteAddr, length_bytes: usize) -> &[u8] {
        let offset = (address.0 - remote_code::DATA) as usize;
        &self.buffer.data[offset..offset + length_bytes]
    }

    /// A word of scratch memory.
    pub fn word(&self, address: RemoteAddr) -> u64 {
        self.buffer.word((address.0 - remote_code::DATA) as usize)
    }
}
