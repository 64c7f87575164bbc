//! `timer_create(2)` and `setitimer(2)`.
//!
//! # Safety
//! Structures are plain locals; a timer's number is used by its owner alone.
#![allow(unsafe_code)]

use std::io;
use std::mem::zeroed;

use crate::raw::outcome;

/// A timer of `CLOCK_MONOTONIC`, deleted when dropped.
#[derive(Debug)]
pub struct PosixTimer(libc::timer_t);

// SAFETY: a number, whatever the type looks like.
unsafe impl Send for PosixTimer {}

impl PosixTimer {
    fn new(event: &mut libc::sigevent) -> io::Result<Self> {
        let mut timer = std::ptr::null_mut();
        // SAFETY: both structures are locals.
        outcome(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, event, &mut timer) })?;
        Ok(Self(timer))
    }

    /// Tells nobody.
    pub fn silent() -> io::Result<Self> {
        // SAFETY: plain data.
        let mut event: libc::sigevent = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_NONE;
        Self::new(&mut event)
    }

    pub fn signalling(signal: i32, value: usize) -> io::Result<Self> {
        // SAFETY: plain data.
        let mut event: libc::sigevent = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = signal;
        event.sigev_value.sival_ptr = value as *mut _;
        Self::new(&mut event)
    }

    pub fn signalling_this_thread(signal: i32, value: usize) -> io::Result<Self> {
        // SAFETY: plain data.
        let mut event: libc::sigevent = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_value.sival_ptr = value as *mut _;
        // SAFETY: takes nothing.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        Self::new(&mut event)
    }

    fn set(&self, flags: i32, first_ns: u64, interval_ns: u64) -> io::Result<()> {
        let setting = libc::itimerspec {
            it_interval: spec(interval_ns),
            it_value: spec(first_ns),
        };
        // SAFETY: the structure is a local.
        outcome(unsafe { libc::timer_settime(self.0, flags, &setting, std::ptr::null_mut()) })
            .map(drop)
    }

    /// Fires so long from now.
    pub fn set_in(&self, first_ns: u64, interval_ns: u64) -> io::Result<()> {
        self.set(0, first_ns, interval_ns)
    }

    /// Fires at this time of `CLOCK_MONOTONIC`.
    pub fn set_at(&self, first_ns: u64, interval_ns: u64) -> io::Result<()> {
        self.set(libc::TIMER_ABSTIME, first_ns, interval_ns)
    }

    /// What is left, and the interval.
    pub fn left(&self) -> io::Result<(u64, u64)> {
        // SAFETY: the structure is a local.
        unsafe {
            let mut setting: libc::itimerspec = zeroed();
            outcome(libc::timer_gettime(self.0, &mut setting))?;
            Ok((ns(setting.it_value), ns(setting.it_interval)))
        }
    }

    /// Expirations that had no signal of their own, as of the signal taken last.
    pub fn overrun(&self) -> io::Result<i64> {
        // SAFETY: takes the timer's number.
        outcome(unsafe { libc::timer_getoverrun(self.0) })
    }
}

impl Drop for PosixTimer {
    fn drop(&mut self) {
        // SAFETY: this is the timer's only owner.
        unsafe { libc::timer_delete(self.0) };
    }
}

fn spec(ns: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (ns / 1_000_000_000) as i64,
        tv_nsec: (ns % 1_000_000_000) as i64,
    }
}

fn ns(time: libc::timespec) -> u64 {
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Of `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Itimer {
    pub left_us: u64,
    pub interval_us: u64,
}

pub fn itimer(which: i32) -> io::Result<Itimer> {
    let us = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    // SAFETY: the structure is a local.
    unsafe {
        let mut setting: libc::itimerval = zeroed();
        outcome(libc::getitimer(which as _, &mut setting))?;
        Ok(Itimer {
            left_us: us(setting.it_value),
            interval_us: us(setting.it_interval),
        })
    }
}

pub fn set_itimer(which: i32, timer: Itimer) -> io::Result<()> {
    let value = |us: u64| libc::timeval {
        tv_sec: (us / 1_000_000) as i64,
        tv_usec: (us % 1_000_000) as i64,
    };
    let setting = libc::itimerval {
        it_interval: value(timer.interval_us),
        it_value: value(timer.left_us),
    };
    // SAFETY: the structure is a local.
    outcome(unsafe { libc::setitimer(which as _, &setting, std::ptr::null_mut()) }).map(drop)
}

/// `alarm(2)`: the seconds that the one before had left.
pub fn alarm(seconds: u32) -> u32 {
    // SAFETY: takes and gives integers.
    unsafe { libc::alarm(seconds) }
}
