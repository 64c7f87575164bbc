//! Calls in which a stop finds a thread waiting (KERNEL.md, Calls that a stop ends).
//!
//! A stop ends every call that sleeps. Most ask the kernel for a restart and get it. Three kinds
//! need help, and none of it may be seen by the program: no EINTR for which no handler ran, no
//! timeout that begins anew at each stop, no changed register.
//!
//! | at the stop | the service that runs on | the replica |
//! |---|---|---|
//! | EINTR of a call that ends at any wake-up | makes the call again with the time that is left | the same |
//! | ERESTART_RESTARTBLOCK | the kernel goes on (`restart_syscall`) | makes the first call with the time that is left: it has no restart block |
//! | ERESTARTNOHAND of select, pselect6, ppoll with a timeout | makes the call again with what the kernel wrote is left, less the pause | the same, less what has passed since |
//! | ERESTARTSYS, -NOINTR, any other -NOHAND | the kernel restarts it | the kernel restarts it: the registers say all |
//!
//! A call is made again in a slot of the blob ([`slot`]), where its thread is known by its `rip`:
//! as long as it stands there no user code has run, so the remembered deadline is this call's. The
//! program's next call, however alike, comes from the program's own code and has a deadline of its
//! own, which the kernel tells where it can ([`unbroken_sys::bpf::DeadlineProgram`]). Timeouts of
//! sockets are options, which other threads share; such a call is made again with its whole time,
//! and ended by a stop at its deadline as the kernel would end it.
//!
//! EINTR that is due is given: a signal with a handler that meets a thread in a call or about to
//! make it again passes through the tracer before its frame is built ([`Tree::before_signal`]), and
//! for a replica the pending signals of the epoch say so.

mod call;
mod look;
pub(crate) mod slot;
#[cfg(test)]
mod tests;
pub(crate) mod wait;

use crate::host::HostTid;
use crate::stop::{StopTimes, Stopped};
use crate::thread::{Process, State, registers_from_user, registers_to_user};
use crate::tree::{Tree, tolerate_death};
use crate::{TraceError, proc};
use look::Look;
use slot::SlotNumber;
use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use unbroken_image::{BlockedCall, Registers, Tid};
use unbroken_sys::bpf::DeadlineProgram;
use unbroken_sys::remote_code::slot::USED_BYTES;
use unbroken_sys::{clock, pidfd, ptrace, sockopt};
use wait::{Finding, Progress, Wait, Waiting, find};

/// A process that stands, as [`find`] sees it.
struct Standing<'tree> {
    process: &'tree Process,
    tid: Tid,
    /// What sees deadlines, and the stop whose waits they are of.
    deadlines: Option<(&'tree DeadlineProgram, StopTimes)>,
    /// Set when a socket bounds a wait.
    waits_on_socket: &'tree Cell<bool>,
    now_ns: Option<u64>,
}

impl Look for Standing<'_> {
    /// One time for the whole look, and none when nothing asks.
    fn now_ns(&mut self) -> u64 {
        *self.now_ns.get_or_insert_with(clock::monotonic_ns)
    }

    fn read(&mut self, address: u64, bytes: &mut [u8]) -> bool {
        self.process.memory.read_exact_at(bytes, address).is_ok()
    }

    fn broken_off_ns(&mut self, left_ns: u64) -> Option<u64> {
        let (program, stop) = self.deadlines?;
        // What cannot be asked is not known.
        let told = program.broken_off(self.tid.0, stop.began_ns).ok().flatten();
        // A call that the last stop had met would be known. So what would have begun before it is
        // something else that the thread slept for in this call.
        told.filter(|told_ns| *told_ns >= stop.last_resumed_ns.saturating_add(left_ns))
    }

    fn socket_timeout_ns(&mut self, fd: i32, option: i32) -> Option<u64> {
        let mut value = [0; 16];
        let process = pidfd::open(self.process.host_pid.0).ok()?;
        let socket = pidfd::get_descriptor(process.as_fd(), fd).ok()?;
        // ENOTSOCK, for one: then nothing bounds the call.
        sockopt::get(socket.as_fd(), libc::SOL_SOCKET, option, &mut value).ok()?;
        let [seconds, microseconds] = [0, 8].map(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&value[at..at + 8]);
            u64::from_ne_bytes(word)
        });
        let timeout_ns = seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(microseconds * 1000);
        let is_bounded = timeout_ns != 0;
        self.waits_on_socket
            .set(self.waits_on_socket.get() || is_bounded);
        is_bounded.then_some(timeout_ns)
    }
}

impl Tree {
    /// `stop` when the whole tree stands.
    fn finding(&self, tid: HostTid, registers: &Registers, stop: Option<StopTimes>) -> Finding {
        let Some((process, thread)) = self.thread(tid) else {
            return Finding::NotWaiting;
        };
        let known = thread.waiting.get().wait;
        if known.is_none()
            && registers.orig_rax == u64::MAX
            && SlotNumber::containing(registers.rip).is_none()
        {
            return Finding::NotWaiting;
        }
        let mut standing = Standing {
            process,
            tid: thread.tid,
            deadlines: self.deadlines.as_ref().zip(stop),
            waits_on_socket: &self.waits_on_socket,
            now_ns: None,
        };
        find(registers, known, &mut standing)
    }

    fn remember(&mut self, tid: HostTid, wait: Option<Wait>) {
        let Some((_, thread)) = self.thread(tid) else {
            return;
        };
        let mut slot = thread.waiting.get().slot;
        let stands_in = wait.and_then(|wait| wait.slot);
        if let (None, Some(number)) = (slot, stands_in) {
            // Another tracer put it there. What is written there is not known here.
            slot = Some((number, [0; USED_BYTES]));
        }
        thread.waiting.set(Waiting { wait, slot });
        if let Some((number, _)) = slot {
            self.slots.add(number);
        }
    }

    /// Whether thread `tid` stands in a call that it makes again.
    fn waits(&self, tid: HostTid) -> bool {
        let thread = self.thread(tid);
        thread.is_some_and(|(_, thread)| thread.waiting.get().wait.is_some())
    }

    /// Sees to the call that thread `tid` of a stopped tree waits in, if any.
    fn settle_call(
        &mut self,
        tid: HostTid,
        registers: &Registers,
        stop: Option<StopTimes>,
    ) -> io::Result<()> {
        match self.finding(tid, registers, stop) {
            Finding::NotWaiting => self.remember(tid, None),
            Finding::Returned(outside) => {
                self.remember(tid, None);
                self.load(tid, &outside)?;
            }
            // Its socket has no timeout any more, but had one when the call began.
            Finding::Waiting(wait, Progress::Suspended)
                if wait.is_socket_past(clock::monotonic_ns()) =>
            {
                self.remember(tid, None);
                self.load(tid, &wait.timed_out())?;
            }
            Finding::Waiting(wait, Progress::Suspended) => self.remember(tid, Some(wait)),
            Finding::Waiting(wait, Progress::Before) if registers.rax != wait.number() => {
                self.remember(tid, Some(wait));
            }
            Finding::Waiting(wait, progress) => self.make_again(tid, wait, progress)?,
        }
        Ok(())
    }

    /// The same at a stop of one thread that goes on at once.
    pub(crate) fn settle_lone_call(&mut self, tid: HostTid) -> io::Result<()> {
        let registers = registers_from_user(&ptrace::registers(tid.0)?);
        self.settle_call(tid, &registers, None)
    }

    /// Loads the registers with which `tid` makes the call again.
    fn make_again(&mut self, tid: HostTid, mut wait: Wait, progress: Progress) -> io::Result<()> {
        let now_ns = clock::monotonic_ns();
        if progress == Progress::Ended && wait.is_socket_past(now_ns) {
            self.remember(tid, None);
            return self.load(tid, &wait.timed_out());
        }
        let has_blob = self
            .thread(tid)
            .is_some_and(|(process, _)| process.notice.is_some());
        // Without a deadline there is nothing to shorten; without a blob or a free slot a timeout
        // begins anew.
        wait.slot = match wait.deadline_ns {
            Some(_) if has_blob => self.slot_of(tid),
            _ => None,
        };
        let again = match wait.slot {
            Some(slot) => {
                let (registers, content) = wait.in_slot(slot, now_ns);
                self.fill_slot(tid, slot, content.bytes())?;
                registers
            }
            None => wait.again(),
        };
        if let (Some((process, _)), Some((address, left))) =
            (self.thread(tid), wait.correction(now_ns))
        {
            // Should another thread have unmapped it, the call finds that out, too.
            let _ = process.correct(&left, address);
        }
        self.load(tid, &again)?;
        self.remember(tid, Some(wait));
        if let Some((_, thread)) = self.thread(tid) {
            thread.reissued.set(Some((again, wait.interrupted())));
        }
        Ok(())
    }

    /// The slot of a thread, which keeps it once it has one.
    fn slot_of(&mut self, tid: HostTid) -> Option<SlotNumber> {
        let waiting = self.thread(tid)?.1.waiting.get();
        if let Some((slot, _)) = waiting.slot {
            return Some(slot);
        }
        let slot = self.slots.take()?;
        let (_, thread) = self.thread(tid)?;
        thread.waiting.set(Waiting {
            slot: Some((slot, [0; USED_BYTES])),
            ..waiting
        });
        Some(slot)
    }

    fn fill_slot(&self, tid: HostTid, slot: SlotNumber, bytes: [u8; USED_BYTES]) -> io::Result<()> {
        let Some((process, thread)) = self.thread(tid) else {
            return Ok(());
        };
        let waiting = thread.waiting.get();
        if waiting.slot != Some((slot, bytes)) {
            process.memory.write_all_at(&bytes, slot.address())?;
            thread.waiting.set(Waiting {
                slot: Some((slot, bytes)),
                ..waiting
            });
        }
        Ok(())
    }

    fn load(&self, tid: HostTid, registers: &Registers) -> io::Result<()> {
        if let Some((_, thread)) = self.thread(tid) {
            thread.registers.set(Some(*registers));
        }
        ptrace::set_registers(tid.0, &registers_to_user(registers))
    }

    /// A signal is about to reach `tid`: no frame may be built inside of a slot, and a call that was
    /// made again and has not begun ends with EINTR after all when a handler runs. A signal that
    /// the program ignores would not have reached it untraced, so it must not end a call
    /// (KERNEL.md, Ignored signals end calls).
    pub(crate) fn before_signal(&mut self, tid: HostTid, signal: i32) -> io::Result<()> {
        let Some((process, thread)) = self.thread(tid) else {
            return Ok(());
        };
        let host_pid = process.host_pid;
        process
            .delivered
            .set(process.delivered.get() | 1 << (signal - 1));
        let reissued = thread.reissued.take();
        let registers = registers_from_user(&ptrace::registers(tid.0)?);
        if let Some((again, interrupted)) = reissued
            && is_before_call(&registers, &again)
        {
            if proc::signal_sets(host_pid.0)?.caught(signal) {
                self.remember(tid, None);
                return self.load(tid, &interrupted);
            }
            thread.reissued.set(Some((again, interrupted)));
            return Ok(());
        }
        match self.finding(tid, &registers, None) {
            Finding::NotWaiting => self.remember(tid, None),
            Finding::Returned(outside) => {
                self.remember(tid, None);
                self.load(tid, &outside)?;
            }
            Finding::Waiting(wait, Progress::Ended) if !wait.writes_back => {
                if proc::signal_sets(host_pid.0)?.is_ignored(signal) {
                    self.make_again(tid, wait, Progress::Ended)?;
                } else {
                    self.remember(tid, None);
                    self.load(tid, &wait.interrupted())?;
                }
            }
            Finding::Waiting(wait, _) => {
                // The kernel gives EINTR or restarts, and does it at the program's own
                // instruction; what it noted of the call stays in the thread.
                if let Some(slot) = wait.slot {
                    self.load(tid, &wait.outside(slot, &registers))?;
                }
                self.remember(tid, Some(Wait { slot: None, ..wait }));
            }
        }
        Ok(())
    }
}

/// Whether the thread has not run since `again` was loaded: it stands at the same instruction and
/// is in no call.
fn is_before_call(now: &Registers, again: &Registers) -> bool {
    let view = |r: &Registers| (r.rip, r.rsp, r.rax, r.orig_rax);
    now.orig_rax == u64::MAX && view(now) == view(again)
}

/// Whether the stop ended a call that slept: the kernel then leaves `EINTR`, or one of its four
/// ways to restart (include/linux/errno.h), for the way back to the program.
fn was_in_wait(registers: &Registers) -> bool {
    let result = registers.rax as i64;
    registers.orig_rax != u64::MAX && matches!(result, -4 | -516 | -514..=-512)
}

impl Stopped<'_> {
    /// Sees to the calls that this stop has ended.
    pub(crate) fn settle_calls(&mut self, times: StopTimes) -> Result<(), TraceError> {
        for process in 0..self.tree.processes.len() {
            for thread in 0..self.tree.processes[process].threads.len() {
                let thread = &self.tree.processes[process].threads[thread];
                if !matches!(thread.state, State::Trapped | State::GroupStopped { .. }) {
                    continue;
                }
                let tid = thread.host_tid;
                let registers = self.registers(tid)?;
                let result = self.tree.settle_call(tid, &registers, Some(times));
                let waits = was_in_wait(&registers) || self.tree.waits(tid);
                self.was_working |= !waits;
                tolerate_death("settle a blocked call", tid, result)?;
            }
        }
        Ok(())
    }

    /// When the tree must be stopped again for a call on a socket to end in time: made again, it has
    /// its whole time. By CLOCK_MONOTONIC, later than now. Calls that end soon after each other share
    /// a stop.
    pub fn next_due_ns(&self) -> Option<u64> {
        const GRID_NS: u64 = 20_000_000;
        if !self.tree.waits_on_socket.get() {
            return None;
        }
        let threads = self.processes().flat_map(Process::threads);
        let waits = threads
            .filter(|thread| thread.state == State::Trapped)
            .filter_map(|thread| thread.waiting.get().wait);
        let due_ns = waits.filter_map(|wait| wait.due_ns()).min()?;
        let later_ns = due_ns.max(clock::monotonic_ns() + 1);
        // Centuries ahead there is none.
        later_ns.checked_next_multiple_of(GRID_NS)
    }

    /// Loads registers of an epoch. A call that they are in is made with what is left of its time.
    pub fn set_image_registers(
        &mut self,
        tid: HostTid,
        registers: &Registers,
        blocked_call: Option<BlockedCall>,
    ) -> Result<(), TraceError> {
        let Some(call) = blocked_call else {
            return self.set_registers(tid, registers);
        };
        let wait = Wait::of_image(registers, call);
        if wait.due_ns().is_some() {
            self.tree.waits_on_socket.set(true);
        }
        self.tree
            .make_again(tid, wait, Progress::Before)
            .map_err(TraceError::of_thread("make a call again", tid))
    }
}
