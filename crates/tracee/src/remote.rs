//! Batches of system calls that a stopped thread makes.
//!
//! What a tracer that dies leaves behind is the point. The order of [`Batch::run`] is: write table
//! and saved registers, load `rip` (from here the thread brings itself back), block signals, let
//! it run, and afterwards signal mask first, registers last. Between any two of these steps the
//! thread, let go by the kernel, ends where it was before, with its own mask.

use crate::thread::{HostTid, State};
use crate::{Stopped, TraceError};
use std::io;
use unbroken_image::Registers;
use unbroken_sys::remote_code::{
    self, ENTRIES, ENTRY_BYTES, SCRATCH, SCRATCH_BYTES, TABLE, header,
};
use unbroken_sys::wait::{Change, wait};
use unbroken_sys::{memory, ptrace, signal};

/// An address in a process of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteAddr(pub u64);

impl RemoteAddr {
    /// The address `bytes` further on.
    pub fn plus(self, bytes: u64) -> RemoteAddr {
        RemoteAddr(self.0 + bytes)
    }
}

/// One call of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// A local copy of the blob's data, kept by the tree from batch to batch.
pub(crate) struct BatchBuffer {
    data: Vec<u8>,
    calls: usize,
    scratch: usize,
}

impl Default for BatchBuffer {
    fn default() -> Self {
        BatchBuffer {
            data: vec![0; SCRATCH + SCRATCH_BYTES],
            calls: 0,
            scratch: 0,
        }
    }
}

impl BatchBuffer {
    fn word(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.data[offset..offset + 8]);
        u64::from_le_bytes(bytes)
    }

    fn set_word(&mut self, offset: usize, value: u64) {
        self.data[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn table_end(&self) -> usize {
        TABLE + self.calls * ENTRY_BYTES
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
    /// Bytes of arguments and answers that fit in one batch, alignment included.
    pub const SCRATCH_BYTES: usize = SCRATCH_BYTES;

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
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Result<Slot, TraceError> {
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
        // What a call that was not reached leaves.
        buffer.set_word(offset + 56, -i64::from(libc::ENOSYS) as u64);
        buffer.calls += 1;
        Ok(Slot(buffer.calls - 1))
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
        let tree = &mut *stopped.tree;
        let (process, thread) = tree.thread(tid).ok_or(TraceError::Died {
            tid,
            operation: "find the thread",
        })?;
        let state = thread.state;
        if !matches!(state, State::Trapped | State::GroupStopped { .. }) {
            return Err(TraceError::CannotRunCalls { tid });
        }
        let notice = process.notice.ok_or(TraceError::NoBlob { tid })?;
        let (host_pid, pid, own_tid) = (process.host_pid, process.pid, thread.tid);
        tree.batch.set_word(header::COUNT, tree.batch.calls as u64);
        tree.batch.set_word(header::DONE, 0);

        if in_stub {
            stopped.run_in_stub(tid)?;
        } else {
            let batch = &mut tree.batch;
            batch.set_word(header::PID, pid.0 as u64);
            batch.set_word(header::TID, own_tid.0 as u64);
            batch.set_word(header::SIGNAL, notice as u64);
            stopped.run_and_return(tid, notice)?;
        }
        let tree = &mut *stopped.tree;
        let after = match state {
            State::GroupStopped { .. } => State::GroupStopped { listenable: false },
            _ => State::Trapped,
        };
        tree.set_state(tid, after);
        let batch = &mut tree.batch;
        let table_end = batch.table_end();
        let ranges = [
            memory::remote_range(remote_code::DATA, table_end),
            memory::remote_range(remote_code::DATA + SCRATCH as u64, batch.scratch),
        ];
        // Header and table land where they came from; scratch lands behind the table and is moved.
        let wanted = table_end + batch.scratch;
        let done = memory::read_ranges(host_pid.0, &ranges, &mut batch.data[..wanted])
            .map_err(TraceError::of_thread("read results", tid))?;
        if done != wanted || batch.word(header::DONE) != batch.calls as u64 {
            return Err(TraceError::Died {
                tid,
                operation: "a batch of calls",
            });
        }
        batch.data.copy_within(table_end..wanted, SCRATCH);
        Ok(Results {
            buffer: &stopped.tree.batch,
        })
    }
}

impl Stopped<'_> {
    fn write_batch(&self, tid: HostTid) -> Result<(), TraceError> {
        let batch = &self.tree.batch;
        let scratch = &batch.data[SCRATCH..SCRATCH + batch.scratch];
        memory::write_parts(
            tid.0,
            [
                (remote_code::DATA, &batch.data[..batch.table_end()]),
                (remote_code::DATA + SCRATCH as u64, scratch),
            ],
        )
        .map_err(TraceError::of_thread("write a batch of calls", tid))
    }

    fn run_in_stub(&mut self, tid: HostTid) -> Result<(), TraceError> {
        self.write_batch(tid)?;
        let mut registers = self.registers(tid)?;
        registers.rip = remote_code::ADDRESS + remote_code::STUB;
        registers.orig_rax = u64::MAX;
        self.set_registers(tid, &registers)?;
        self.run_until_signal(tid, libc::SIGTRAP, || Ok(true))
    }

    fn run_and_return(&mut self, tid: HostTid, notice: i32) -> Result<(), TraceError> {
        let mut original = self.registers(tid)?;
        self.abort_restartable_sequence(tid, &mut original)?;
        let mask = self.signal_mask(tid)?;
        let blocked = !(1_u64 << (notice - 1));
        let batch = &mut self.tree.batch;
        batch.set_word(header::BLOCKED, blocked);
        batch.set_word(header::ORIGINAL_MASK, mask);
        save_registers(batch, &without_tracer(&original));
        self.write_batch(tid)?;

        let mut entry = original;
        entry.rip = remote_code::ADDRESS + remote_code::ENTER;
        entry.orig_rax = u64::MAX;
        self.set_registers(tid, &entry)?;
        self.set_signal_mask(tid, blocked)?;
        let calls = self.tree.batch.calls as u64;
        let is_done = move || {
            let mut done = [0; 8];
            memory::read(tid.0, remote_code::DATA + header::DONE as u64, &mut done)
                .map_err(TraceError::of_thread("read progress", tid))?;
            Ok(u64::from_le_bytes(done) == calls)
        };
        self.run_until_signal(tid, notice, is_done)?;
        self.set_signal_mask(tid, mask)?;
        self.set_registers(tid, &original)
    }

    /// Lets `tid` run until it is about to be delivered `signal` and `is_done` agrees.
    pub(crate) fn run_until_signal(
        &mut self,
        tid: HostTid,
        expected: i32,
        is_done: impl Fn() -> Result<bool, TraceError>,
    ) -> Result<(), TraceError> {
        let mut again = Vec::new();
        self.tree.set_state(tid, State::Running);
        let result = loop {
            ptrace::resume(tid.0, 0).map_err(TraceError::of_thread("run calls", tid))?;
            match self.next_report(tid)? {
                Change::Signal(signal) if signal == expected && is_done()? => break Ok(()),
                // SIGSTOP, which no mask holds off, or an earlier signal of the expected number:
                // not now. Its sender and value are lost, its number is not.
                Change::Signal(signal) => again.push(signal),
                Change::Event { event, .. } if event == libc::PTRACE_EVENT_EXIT => {
                    break Err(TraceError::Died {
                        tid,
                        operation: "a batch of calls",
                    });
                }
                Change::Ended(_) => {
                    break Err(TraceError::Died {
                        tid,
                        operation: "a batch of calls",
                    });
                }
                _ => {}
            }
        };
        if let Some((process, _)) = self.tree.thread(tid) {
            for missed in again {
                // The thread may be dying; then nobody misses the signal.
                let _ = signal::to_thread(process.host_pid.0, tid.0, missed);
            }
        }
        result
    }

    /// Waits for the next report of `tid`, which runs; takes in what changes the tree.
    fn next_report(&mut self, tid: HostTid) -> Result<Change, TraceError> {
        let report = wait(tid.0).map_err(TraceError::of_tracer("wait for a batch of calls"))?;
        let Some(report) = report else {
            return Err(TraceError::Died {
                tid,
                operation: "a batch of calls",
            });
        };
        match report.change {
            Change::Event { event, .. } => match event {
                libc::PTRACE_EVENT_EXIT => self.tree.handle(report, true)?,
                libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
                    self.tree.on_remote_task(tid)?;
                }
                _ => {}
            },
            Change::Ended(_) => self.tree.handle(report, true)?,
            _ => {}
        }
        Ok(report.change)
    }

    /// A thread stopped inside a restartable sequence (rseq) must not come back to it: whatever
    /// runs in between clears the kernel's note of the sequence. Moves `rip` of `registers` to the
    /// sequence's abort handler, where the kernel, too, would send it. Returns whether it did.
    pub fn abort_restartable_sequence(
        &self,
        tid: HostTid,
        registers: &mut Registers,
    ) -> Result<bool, TraceError> {
        let area = self.rseq_configuration(tid)?.address;
        if area == 0 {
            return Ok(false);
        }
        // struct rseq: cpu_id_start, cpu_id, then rseq_cs (include/uapi/linux/rseq.h).
        let mut pointer = [0; 8];
        let read = |address, bytes: &mut [u8]| {
            memory::read(tid.0, address, bytes)
                .map_err(TraceError::of_thread("read the restartable sequence", tid))
        };
        read(area + 8, &mut pointer)?;
        let descriptor = u64::from_le_bytes(pointer);
        if descriptor == 0 {
            return Ok(false);
        }
        // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
        let mut fields = [0; 32];
        read(descriptor, &mut fields)?;
        let field = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&fields[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (start, length, abort) = (field(8), field(16), field(24));
        let is_inside = registers.rip.wrapping_sub(start) < length;
        if is_inside {
            registers.rip = abort;
        }
        Ok(is_inside)
    }
}

fn save_registers(batch: &mut BatchBuffer, registers: &Registers) {
    let r = registers;
    batch.set_word(header::EFLAGS, r.eflags);
    batch.set_word(header::RSP, r.rsp);
    batch.set_word(header::RIP, r.rip);
    let general = [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx,
        r.rsi, r.rdi,
    ];
    for (position, value) in general.into_iter().enumerate() {
        batch.set_word(header::GENERAL + position * 8, value);
    }
}

/// What a thread returns to when nobody is left to load its registers exactly: a return in user
/// mode cannot express a restart that the kernel still owes, so the call is made again.
fn without_tracer(registers: &Registers) -> Registers {
    let mut result = *registers;
    if registers.orig_rax as i64 >= 0 {
        match registers.rax as i64 {
            // ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND (include/linux/errno.h).
            -514..=-512 => {
                result.rax = registers.orig_rax;
                result.rip -= 2;
            }
            // ERESTART_RESTARTBLOCK; nothing in a batch touches the thread's restart block.
            -516 => {
                result.rax = libc::SYS_restart_syscall as u64;
                result.rip -= 2;
            }
            _ => {}
        }
    }
    result
}

/// What the calls of a batch returned.
pub struct Results<'buffer> {
    buffer: &'buffer BatchBuffer,
}

impl Results<'_> {
    /// The result of a call, or its errno.
    pub fn get(&self, slot: Slot) -> io::Result<u64> {
        let value = self.buffer.word(TABLE + slot.0 * ENTRY_BYTES + 56);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::{registers_from_user, registers_to_user};

    fn registers(orig_rax: i64, rax: i64) -> Registers {
        Registers {
            orig_rax: orig_rax as u64,
            rax: rax as u64,
            rip: 100,
            ..Registers::default()
        }
    }

    #[test]
    fn a_restart_is_made_by_hand_when_nobody_is_left() {
        let again = without_tracer(&registers(0, -512));
        assert_eq!((again.rax, again.rip), (0, 98));
        let again = without_tracer(&registers(35, -516));
        assert_eq!(
            (again.rax, again.rip),
            (libc::SYS_restart_syscall as u64, 98)
        );
        let done = without_tracer(&registers(0, -4));
        assert_eq!((done.rax as i64, done.rip), (-4, 100));
        let not_in_a_call = without_tracer(&registers(-1, -512));
        assert_eq!((not_in_a_call.rax as i64, not_in_a_call.rip), (-512, 100));
    }

    #[test]
    fn registers_survive_both_conversions() {
        let original = Registers {
            r15: 1,
            gs: 2,
            rip: 3,
            fs_base: 4,
            ..Registers::default()
        };
        assert_eq!(registers_from_user(&registers_to_user(&original)), original);
    }
}
