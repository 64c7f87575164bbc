//! Timers of the process: `timer_create(2)` and `setitimer(2)`.

use super::ReplicaError;
use super::calls::{Calls, Expect, for_each};
use super::threads;
use crate::{HostTid, Process, Stopped};
use std::time::Instant;
use unbroken_image::{IntervalTimer, Pid, PosixTimer, ProcessState};

const TIMER_ABSTIME: u64 = 1;
/// linux/prctl.h, since Linux 6.15: timer_create takes the number from where it returns it.
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Timers that are made and deleted in search of a number, where the kernel cannot be told.
const ATTEMPTS_MAX: i32 = 10_000;
const SECOND_NS: u64 = 1_000_000_000;
const SIGINFO_BYTES: usize = 128;

/// The service's `CLOCK_MONOTONIC`, which may have another beginning than ours.
pub(super) struct Clock {
    read_ns: u64,
    at: Instant,
}

impl Clock {
    /// It is `now_ns` now.
    pub(super) fn at(now_ns: u64) -> Clock {
        Clock {
            read_ns: now_ns,
            at: Instant::now(),
        }
    }

    fn now_ns(&self) -> u64 {
        self.read_ns + self.at.elapsed().as_nanos() as u64
    }
}

/// Makes the timers under their numbers, disarmed. The threads that they signal must stand.
///
/// A timer may signal a thread that has ended: it goes on and tells nobody. The kernel takes none but
/// a living thread for one that is made, so such a thread is made for that moment.
pub(super) fn create(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    timers: &[PosixTimer],
) -> Result<(), ReplicaError> {
    let is_orphan =
        |timer: &PosixTimer| timer.notify & libc::SIGEV_THREAD_ID != 0 && timer.notify_tid == 0;
    if !timers.iter().any(is_orphan) {
        return create_all(stopped, leader, timers);
    }
    let passing = threads::create_passing_thread(stopped, leader)?;
    let mut timers = timers.to_vec();
    for timer in timers.iter_mut().filter(|timer| is_orphan(timer)) {
        timer.notify_tid = passing.0;
    }
    create_all(stopped, leader, &timers)?;
    let host_tid = stopped
        .processes()
        .flat_map(Process::threads)
        .find(|thread| thread.tid == passing)
        .map(|thread| thread.host_tid);
    let host_tid = host_tid.ok_or(ReplicaError::Incomplete {
        what: "thread for its timers",
        tid: passing,
    })?;
    threads::end_thread(stopped, host_tid)
}

fn create_all(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    timers: &[PosixTimer],
) -> Result<(), ReplicaError> {
    if timers.is_empty() {
        return Ok(());
    }
    let mut calls = Calls::new(stopped, leader);
    let mode = |on: u64| [PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0];
    calls.add("prctl", libc::SYS_prctl, &mode(1), Expect::Anything)?;
    let numbers_can_be_chosen = calls.run()?.first() == Some(&0);
    if numbers_can_be_chosen {
        for_each(stopped, leader, timers, |calls, timer| {
            add_create(calls, timer).map(drop)
        })?;
        let mut calls = Calls::new(stopped, leader);
        calls.add("prctl", libc::SYS_prctl, &mode(0), Expect::Success)?;
        return calls.run().map(drop);
    }
    // Numbers only grow (kernel/time/posix-timers.c, posix_timer_add).
    let mut timers: Vec<&PosixTimer> = timers.iter().collect();
    timers.sort_unstable_by_key(|timer| timer.id);
    let mut next = 0;
    for timer in timers {
        if timer.id - next > ATTEMPTS_MAX {
            return Err(ReplicaError::TimerNumber { number: timer.id });
        }
        for number in next..=timer.id {
            let made = PosixTimer {
                id: number,
                ..timer.clone()
            };
            let mut calls = Calls::new(stopped, leader);
            add_create(&mut calls, &made)?;
            if number < timer.id {
                let number = [number as u64];
                calls.add(
                    "timer_delete",
                    libc::SYS_timer_delete,
                    &number,
                    Expect::Success,
                )?;
            }
            calls.run()?;
        }
        next = timer.id + 1;
    }
    Ok(())
}

fn add_create(calls: &mut Calls<'_, '_>, timer: &PosixTimer) -> Result<(), ReplicaError> {
    // struct sigevent, 64 bytes: value, signal, notify, thread.
    let event = calls.words(&[
        timer.value,
        u64::from(timer.signal as u32) | u64::from(timer.notify as u32) << 32,
        u64::from(timer.notify_tid as u32),
        0,
        0,
        0,
        0,
        0,
    ])?;
    let number = calls.words(&[u64::from(timer.id as u32)])?;
    let arguments = [i64::from(timer.clock) as u64, event.0, number.0];
    calls
        .add(
            "timer_create",
            libc::SYS_timer_create,
            &arguments,
            Expect::Success,
        )
        .map(drop)
}

/// Starts the timers: the last thing before the process runs.
pub(super) fn arm(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    pid: Pid,
    state: &ProcessState,
    clock: &Clock,
) -> Result<(), ReplicaError> {
    for_each(stopped, leader, &state.posix_timers, |calls, timer| {
        if timer.expiry_ns == 0 {
            return Ok(());
        }
        let [interval, expiry] = [timer.interval_ns, timer.expiry_ns]
            .map(|time_ns| [time_ns / SECOND_NS, time_ns % SECOND_NS]);
        let value = calls.words(&[interval, expiry].concat())?;
        let arguments = [timer.id as u64, TIMER_ABSTIME, value.0, 0];
        calls
            .add(
                "timer_settime",
                libc::SYS_timer_settime,
                &arguments,
                Expect::Success,
            )
            .map(drop)
    })?;
    let mut calls = Calls::new(stopped, leader);
    let [real, processor_time @ ..] = &state.interval_timers;
    arm_real(&mut calls, pid, *real, clock.now_ns())?;
    for (which, timer) in (1..).zip(processor_time) {
        if timer.expiry_ns != 0 {
            set_interval_timer(&mut calls, which, timer.expiry_ns, timer.interval_ns)?;
        }
    }
    calls.run().map(drop)
}

/// What became due since the capture fires at once, and an interval keeps its beat.
fn arm_real(
    calls: &mut Calls<'_, '_>,
    pid: Pid,
    timer: IntervalTimer,
    now_ns: u64,
) -> Result<(), ReplicaError> {
    let IntervalTimer {
        expiry_ns,
        interval_ns,
    } = timer;
    let left_ns = match (expiry_ns, interval_ns) {
        (0, 0) => return Ok(()),
        // Its signal is among those that are pending.
        (0, interval_ns) => interval_ns,
        (expiry_ns, 0) => expiry_ns.saturating_sub(now_ns),
        (expiry_ns, _) if expiry_ns > now_ns => expiry_ns - now_ns,
        (expiry_ns, interval_ns) => {
            // One that is pending already takes this one in, as it would the kernel's.
            let mut information = [0; SIGINFO_BYTES];
            information[..4].copy_from_slice(&libc::SIGALRM.to_ne_bytes());
            information[8..12].copy_from_slice(&libc::SI_KERNEL.to_ne_bytes());
            let information = calls.bytes(&information)?;
            let arguments = [pid.0 as u64, libc::SIGALRM as u64, information.0];
            let number = libc::SYS_rt_sigqueueinfo;
            calls.add("rt_sigqueueinfo", number, &arguments, Expect::Success)?;
            interval_ns - (now_ns - expiry_ns) % interval_ns
        }
    };
    set_interval_timer(calls, libc::ITIMER_REAL, left_ns, interval_ns)
}

/// What is overdue fires at once: zero would disarm.
fn set_interval_timer(
    calls: &mut Calls<'_, '_>,
    which: i32,
    left_ns: u64,
    interval_ns: u64,
) -> Result<(), ReplicaError> {
    let [interval, left] = [interval_ns, left_ns.max(1000)]
        .map(|time_ns| [time_ns / SECOND_NS, time_ns % SECOND_NS / 1000]);
    let value = calls.words(&[interval, left].concat())?;
    let arguments = [which as u64, value.0, 0];
    calls
        .add(
            "setitimer",
            libc::SYS_setitimer,
            &arguments,
            Expect::Success,
        )
        .map(drop)
}
