//! A batch while it runs.

use super::buffer::BatchBuffer;
use crate::host::HostTid;
use crate::thread::State;
use crate::{Stopped, TraceError};
use unbroken_image::Registers;
use unbroken_sys::remote_code::{self, SCRATCH, header};
use unbroken_sys::wait::{Change, wait};
use unbroken_sys::{memory, ptrace, signal};

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

    /// False when the table has not been run to its end.
    fn read_results(&mut self, tid: HostTid) -> Result<bool, TraceError> {
        let batch = &mut self.tree.batch;
        let table_end = batch.table_end();
        let ranges = [
            memory::remote_range(remote_code::DATA, table_end),
            memory::remote_range(remote_code::DATA + SCRATCH as u64, batch.scratch),
        ];
        let (table, scratch) = batch.data.split_at_mut(SCRATCH);
        let local = [&mut table[..table_end], &mut scratch[..batch.scratch]];
        memory::read_parts(tid.0, &ranges, local)
            .map_err(TraceError::of_thread("read results", tid))?;
        Ok(batch.word(header::DONE) == batch.calls as u64)
    }

    pub(super) fn run_in_stub(&mut self, tid: HostTid) -> Result<(), TraceError> {
        self.write_batch(tid)?;
        let mut registers = self.registers(tid)?;
        registers.rip = remote_code::ADDRESS + remote_code::STUB;
        registers.orig_rax = u64::MAX;
        self.set_registers(tid, &registers)?;
        self.run_until_signal(tid, libc::SIGTRAP)
    }

    pub(super) fn run_and_return(&mut self, tid: HostTid, notice: i32) -> Result<(), TraceError> {
        let original = self.registers(tid)?;
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
        self.run_until_signal(tid, notice)?;
        self.set_signal_mask(tid, mask)?;
        self.set_registers(tid, &original)
    }

    /// Lets `tid` run until it is about to be delivered `expected` and all calls have been made;
    /// their results are then in the buffer.
    fn run_until_signal(&mut self, tid: HostTid, expected: i32) -> Result<(), TraceError> {
        let mut again = Vec::new();
        self.tree.set_state(tid, State::Running);
        let result = loop {
            ptrace::resume(tid.0, 0).map_err(TraceError::of_thread("run calls", tid))?;
            match self.next_report(tid)? {
                Change::Signal(signal) if signal == expected && self.read_results(tid)? => {
                    break Ok(());
                }
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
