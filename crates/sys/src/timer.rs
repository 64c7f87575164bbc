//! Clocks and timerfds.
//!
//! Blocks pass descriptors that a `BorrowedFd` keeps open, and time structures of ours.
#![allow(unsafe_code)]

use crate::descriptor::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// _IOW('T', 0, __u64), include/uapi/linux/timerfd.h
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
const NANOSECONDS: u64 = 1_000_000_000;

/// A timer's next expiry (0: disarmed) and interval, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    pub value_ns: u64,
    pub interval_ns: u64,
}

fn to_ns(time: libc::timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(NANOSECONDS).saturating_add(rest)
}

fn to_timespec(ns: u64) -> libc::timespec {
    // Both quotient and remainder of a u64 by 10^9 fit into an i64.
    libc::timespec {
        tv_sec: (ns / NANOSECONDS) as i64,
        tv_nsec: (ns % NANOSECONDS) as i64,
    }
}

/// The time of a clock (`CLOCK_*`), in nanoseconds, as the calling thread's time namespace has it.
pub fn now_ns(clock: i32) -> io::Result<u64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills `time`, which outlives the call.
    check(unsafe { libc::clock_gettime(clock, &mut time) })?;
    Ok(to_ns(time))
}

/// `timerfd_create(2)`, closed on exec. `flags` may be `TFD_NONBLOCK`.
pub fn create(clock: i32, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::timerfd_create(clock, flags | libc::TFD_CLOEXEC) })?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `timerfd_settime(2)`; `flags` are `TFD_TIMER_*`.
pub fn set(timer: BorrowedFd<'_>, flags: i32, setting: Setting) -> io::Result<()> {
    let raw = libc::itimerspec {
        it_interval: to_timespec(setting.interval_ns),
        it_value: to_timespec(setting.value_ns),
    };
    // SAFETY: the kernel reads `raw`; the old setting is not asked for.
    check(unsafe { libc::timerfd_settime(timer.as_raw_fd(), flags, &raw, std::ptr::null_mut()) })
        .map(drop)
}

/// `timerfd_gettime(2)`: the remaining time, 0 when disarmed. A periodic timer that expired
/// unread is moved on to its next expiry, and the missed ones counted as ticks; a reader cannot
/// tell.
pub fn get(timer: BorrowedFd<'_>) -> io::Result<Setting> {
    let zero = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut raw = libc::itimerspec {
        it_interval: zero,
        it_value: zero,
    };
    // SAFETY: the kernel fills `raw`, which outlives the call.
    check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &mut raw) })?;
    Ok(Setting {
        value_ns: to_ns(raw.it_value),
        interval_ns: to_ns(raw.it_interval),
    })
}

/// Sets the number of unread expirations, which must not be 0 (CONFIG_CHECKPOINT_RESTORE).
pub fn set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads one u64.
    check(unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &ticks) }).map(drop)
}
