//! Threads that were stopped in user code which cannot simply go on elsewhere.
//!
//! A stop finds a thread in a system call, or anywhere in user code. Two pieces of user code know
//! what the kernel does to them and cannot be left half done: the vDSO, which may have read one half
//! of the clock (another machine's clock page has other values), and restartable sequences, which
//! the kernel aborts at every switch. Every stop ends with no thread in either.

use crate::host::HostTid;
use crate::thread::State;
use crate::{Stopped, TraceError};
use std::time::Duration;
use unbroken_image::{AddressRange, Registers};
use unbroken_sys::{memory, ptrace};

/// Time enough for the few dozen instructions of a vDSO call, if the thread gets its core at once.
const MOMENT: Duration = Duration::from_micros(2);
/// It may not: an urgent tracer's sleep ends to the microsecond, before the thread ran at all, and
/// others want the core too. So each moment is twice as long as the one before, up to this.
const LONG_MOMENT: Duration = Duration::from_millis(1);

impl Stopped<'_> {
    /// Brings threads out of the vDSO and of restartable sequences.
    pub(crate) fn settle_user_code(&mut self) -> Result<(), TraceError> {
        while !self.settle_each()? {}
        Ok(())
    }

    /// False when threads came or went meanwhile, which only those that were let run a moment can
    /// have brought about: then not all may have been looked at.
    fn settle_each(&mut self) -> Result<bool, TraceError> {
        let known = self.tree.threads_known();
        for process in 0..self.tree.processes.len() {
            for thread in 0..self.tree.processes[process].threads.len() {
                let process = &self.tree.processes[process];
                let thread = &process.threads[thread];
                if matches!(thread.state, State::Trapped | State::GroupStopped { .. }) {
                    let (tid, vdso) = (thread.host_tid, process.vdso);
                    match self.settle_thread(tid, vdso) {
                        // The next wait says how.
                        Err(TraceError::Died { .. }) => {}
                        result => result?,
                    }
                    if self.tree.threads_known() != known {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    fn settle_thread(
        &mut self,
        tid: HostTid,
        vdso: Option<AddressRange>,
    ) -> Result<(), TraceError> {
        let is_in_vdso = |rip| vdso.is_some_and(|range| range.contains(rip));
        let mut registers = self.registers(tid)?;
        if is_in_user_code(&registers) && is_in_vdso(registers.rip) {
            registers = self.run_while(tid, |now| is_in_user_code(now) && is_in_vdso(now.rip))?;
        }
        // No sequence contains a system call, so a thread in one is in none.
        if is_in_user_code(&registers) && self.abort_restartable_sequence(tid, &mut registers)? {
            self.set_registers(tid, &registers)?;
        }
        Ok(())
    }

    /// Lets one thread of a stopped tree run for moments until `stays` is false of its registers,
    /// which it returns.
    pub(crate) fn run_while(
        &mut self,
        tid: HostTid,
        stays: impl Fn(&Registers) -> bool,
    ) -> Result<Registers, TraceError> {
        let mut moment = MOMENT;
        loop {
            let registers = self.registers(tid)?;
            if !stays(&registers) {
                return Ok(registers);
            }
            self.run_a_moment(tid, moment)?;
            moment = LONG_MOMENT.min(moment * 2);
        }
    }

    /// Lets one thread of a stopped tree run for a moment. Other cores see nothing of it, but on
    /// this one an interrupt right after the continue would stop it before its first instruction.
    fn run_a_moment(&mut self, tid: HostTid, moment: Duration) -> Result<(), TraceError> {
        self.tree.set_state(tid, State::Running);
        ptrace::resume(tid.0, 0).map_err(TraceError::of_thread("continue", tid))?;
        std::thread::sleep(moment);
        ptrace::interrupt(tid.0).map_err(TraceError::of_thread("interrupt", tid))?;
        self.tree.settle()
    }

    /// A thread stopped inside a restartable sequence (rseq) must not come back to it: whatever
    /// runs in between clears the kernel's note of the sequence. Moves `rip` of `registers` to the
    /// sequence's abort handler, where the kernel, too, would send it. Returns whether it did.
    pub(crate) fn abort_restartable_sequence(
        &self,
        tid: HostTid,
        registers: &mut Registers,
    ) -> Result<bool, TraceError> {
        let area = self.rseq_configuration(tid)?.address;
        if area == 0 {
            return Ok(false);
        }
        let read = |address, bytes: &mut [u8]| {
            memory::read(tid.0, address, bytes)
                .map_err(TraceError::of_thread("read the restartable sequence", tid))
        };
        // struct rseq: cpu_id_start, cpu_id, then rseq_cs (include/uapi/linux/rseq.h).
        let mut pointer = [0; 8];
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

/// The kernel sets `orig_rax` to -1 on every way in but a system call.
fn is_in_user_code(registers: &Registers) -> bool {
    registers.orig_rax == u64::MAX
}
