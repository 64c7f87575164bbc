//! The clock that blocked calls are measured by.
//!
//! The blocks rely on: the kernel fills in one structure that is ours.
#![allow(unsafe_code)]

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is writable. This clock always exists (clock_gettime(2)).
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// How long the kernel's timers count as one: a tick, 1 to 10 ms.
pub fn tick_ns() -> i32 {
    let mut tick = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `tick` is writable. The coarse clock, whose resolution is a tick (kernel/time/
    // posix-timers.c, posix_get_coarse_res), always exists.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut tick) };
    tick.tv_nsec as i32
}
