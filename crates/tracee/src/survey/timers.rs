//! Interval timers and POSIX timers.

use super::files::read_proc;
use super::text::{TimerLine, parse_timers};
use crate::host::HostTid;
use crate::remote::{Batch, BatchedCall, RemoteAddr, Results};
use crate::{Stopped, TraceError};
use unbroken_image::{IntervalTimer, Pid, PosixTimer, ProcessState};

const SECOND_NS: u64 = 1_000_000_000;
/// Bytes of `struct timespec`.
const TIME_BYTES: usize = 16;
/// Bytes of `struct itimerspec` and `struct itimerval`: interval, then value.
const TIMER_BYTES: usize = 32;
/// Timers that one batch asks for.
const TIMERS_PER_BATCH: usize = Batch::CALLS / 3;

impl Stopped<'_> {
    /// Reads all timers of a process again into `state`: after `Change::Timers` was announced, or
    /// when [`Stopped::timers_are_stale`].
    pub fn survey_timers(&mut self, pid: Pid, state: &mut ProcessState) -> Result<(), TraceError> {
        let tid = self.caller(pid)?;
        let mut batch = self.remote(tid);
        let question = IntervalTimerQuestion::ask(&mut batch)?;
        let results = batch.run()?;
        state.interval_timers = question.answer(&results, tid)?;
        state.posix_timers = self.posix_timers(pid)?;
        Ok(())
    }

    /// Whether a timer may have moved on by itself since `state` was read, which nothing announces:
    /// one that has fired, one that counts processor time or follows a clock that can be set, one
    /// that signals a thread that has ended.
    ///
    /// `latest_ns` is `CLOCK_MONOTONIC` of the service now, and as much more as the reading took: an
    /// expiry is what was left then, added to a clock that was read after it.
    pub fn timers_are_stale(
        &self,
        pid: Pid,
        state: &ProcessState,
        latest_ns: u64,
    ) -> Result<bool, TraceError> {
        let has_passed = |expiry_ns: u64| expiry_ns != 0 && expiry_ns <= latest_ns;
        let [real, virt, profile] = state.interval_timers;
        // One that has fired begins anew when its signal is taken.
        let waits = real.expiry_ns == 0 && real.interval_ns != 0;
        if waits || has_passed(real.expiry_ns) || virt.expiry_ns != 0 || profile.expiry_ns != 0 {
            return Ok(true);
        }
        let process = self.process(pid)?;
        Ok(state.posix_timers.iter().any(|timer| {
            let is_armed = timer.expiry_ns != 0;
            let is_there = |tid| process.threads().any(|thread| thread.tid.0 == tid);
            has_passed(timer.expiry_ns)
                || is_armed && timer.clock != libc::CLOCK_MONOTONIC
                || timer.notify_tid != 0 && !is_there(timer.notify_tid)
        }))
    }

    pub(super) fn posix_timers(&mut self, pid: Pid) -> Result<Vec<PosixTimer>, TraceError> {
        let (path, text) = read_proc(self.process(pid)?.host_pid, "timers")?;
        let what = "the list of timers";
        let mut lines = parse_timers(&text).ok_or(TraceError::ProcFormat { path, what })?;
        // The kernel lists the newest first.
        lines.sort_by_key(|line| line.id);
        let mut timers = Vec::with_capacity(lines.len());
        for chunk in lines.chunks(TIMERS_PER_BATCH) {
            self.ask_for_timers(pid, chunk, &mut timers)?;
        }
        Ok(timers)
    }

    fn ask_for_timers(
        &mut self,
        pid: Pid,
        lines: &[TimerLine],
        timers: &mut Vec<PosixTimer>,
    ) -> Result<(), TraceError> {
        struct Asked {
            setting: RemoteAddr,
            now: RemoteAddr,
            calls: [BatchedCall; 2],
            overrun: BatchedCall,
        }
        let tid = self.caller(pid)?;
        let mut batch = self.remote(tid);
        let mut asked = Vec::with_capacity(lines.len());
        for line in lines {
            let setting = batch.reserve(TIMER_BYTES)?;
            let now = batch.reserve(TIME_BYTES)?;
            let id = line.id as u64;
            asked.push(Asked {
                setting,
                now,
                calls: [
                    batch.call(libc::SYS_timer_gettime, &[id, setting.0])?,
                    batch.call(libc::SYS_clock_gettime, &[line.clock as u64, now.0])?,
                ],
                overrun: batch.call(libc::SYS_timer_getoverrun, &[id])?,
            });
        }
        let results = batch.run()?;
        let failed = TraceError::of_call("timer_gettime, clock_gettime or timer_getoverrun", tid);
        let first = timers.len();
        for (line, asked) in lines.iter().zip(asked) {
            for call in asked.calls {
                results.get(call).map_err(failed)?;
            }
            let remaining_ns = time_ns(&results, asked.setting.plus(TIME_BYTES as u64));
            let now_ns = match counts_processor_time(line.clock) {
                true => 0,
                false => time_ns(&results, asked.now),
            };
            timers.push(PosixTimer {
                id: line.id,
                clock: line.clock,
                signal: line.signal,
                notify: line.notify,
                notify_tid: line.target,
                value: line.value,
                expiry_ns: expiry_ns(remaining_ns, now_ns),
                interval_ns: time_ns(&results, asked.setting),
                overrun: results.get(asked.overrun).map_err(failed)? as i32,
            });
        }
        for timer in &mut timers[first..] {
            let names_thread = timer.notify & libc::SIGEV_THREAD_ID != 0;
            // The thread may have ended; then the timer fires for nobody.
            let thread = self
                .thread(HostTid(timer.notify_tid))
                .filter(|_| names_thread);
            timer.notify_tid = thread.map_or(0, |(_, thread)| thread.tid.0);
        }
        Ok(())
    }
}

/// The calls of a batch that tell the three interval timers.
pub(super) struct IntervalTimerQuestion {
    now: RemoteAddr,
    timers: [RemoteAddr; 3],
    calls: [BatchedCall; 4],
}

impl IntervalTimerQuestion {
    pub fn ask(batch: &mut Batch<'_, '_>) -> Result<Self, TraceError> {
        let now = batch.reserve(TIME_BYTES)?;
        let mut one = |which: i32| -> Result<(RemoteAddr, BatchedCall), TraceError> {
            let timer = batch.reserve(TIMER_BYTES)?;
            let call = batch.call(libc::SYS_getitimer, &[which as u64, timer.0])?;
            Ok((timer, call))
        };
        let (real, virt, profile) = (
            one(libc::ITIMER_REAL)?,
            one(libc::ITIMER_VIRTUAL)?,
            one(libc::ITIMER_PROF)?,
        );
        // The service's own clock: its time namespace may have an offset.
        let clock = libc::CLOCK_MONOTONIC as u64;
        let clock = batch.call(libc::SYS_clock_gettime, &[clock, now.0])?;
        Ok(IntervalTimerQuestion {
            now,
            timers: [real.0, virt.0, profile.0],
            calls: [real.1, virt.1, profile.1, clock],
        })
    }

    pub fn answer(
        &self,
        results: &Results<'_>,
        tid: HostTid,
    ) -> Result<[IntervalTimer; 3], TraceError> {
        for call in self.calls {
            results
                .get(call)
                .map_err(TraceError::of_call("getitimer or clock_gettime", tid))?;
        }
        let now_ns = time_ns(results, self.now);
        let mut timers = [IntervalTimer::default(); 3];
        for (position, timer) in timers.iter_mut().enumerate() {
            let address = self.timers[position];
            let remaining_ns = timeval_ns(results, address.plus(TIME_BYTES as u64));
            let now_ns = if position == 0 { now_ns } else { 0 };
            timer.expiry_ns = expiry_ns(remaining_ns, now_ns);
            timer.interval_ns = timeval_ns(results, address);
        }
        Ok(timers)
    }
}

/// The clocks of a process or thread: fixed ones, and those that `clock_getcpuclockid` makes,
/// which are negative (include/linux/posix-timers_types.h).
fn counts_processor_time(clock: i32) -> bool {
    clock < 0
        || matches!(
            clock,
            libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID
        )
}

/// A remaining time of 0 means disarmed: for a timer that is about to fire the kernel says 1 ns
/// (kernel/time/posix-timers.c, common_timer_get) or 1 us (kernel/time/itimer.c).
fn expiry_ns(remaining_ns: u64, now_ns: u64) -> u64 {
    if remaining_ns == 0 {
        0
    } else {
        now_ns.saturating_add(remaining_ns)
    }
}

fn time_ns(results: &Results<'_>, address: RemoteAddr) -> u64 {
    let (seconds, rest) = (results.word(address), results.word(address.plus(8)));
    seconds.saturating_mul(SECOND_NS).saturating_add(rest)
}

fn timeval_ns(results: &Results<'_>, address: RemoteAddr) -> u64 {
    let (seconds, rest) = (results.word(address), results.word(address.plus(8)));
    seconds
        .saturating_mul(SECOND_NS)
        .saturating_add(rest * 1000)
}
