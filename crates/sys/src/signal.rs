//! Sending signals to threads and processes.
//!
//! The blocks rely on: plain numbers, and for queued signals a pointer to a whole `siginfo_t`.
#![allow(unsafe_code)]

use crate::ptrace::SIGNAL_INFO_BYTES;
use std::io;

fn check(result: i64) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sends `signal` to thread `tid` of process `pid`; 0 only asks whether it exists.
pub fn to_thread(pid: i32, tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) })
}

/// Sends `signal` to process `pid`; 0 only asks whether it exists.
pub fn to_process(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(i64::from(unsafe { libc::kill(pid, signal) }))
}

/// Queues a signal with its own `siginfo_t` for one thread. The kernel takes only an `si_code`
/// below 0 that is not `SI_TKILL` unless the caller is the target.
pub fn queue_to_thread(pid: i32, tid: i32, info: &[u8; SIGNAL_INFO_BYTES]) -> io::Result<()> {
    let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
    // SAFETY: `info` is a whole siginfo_t, which the kernel copies byte by byte.
    check(unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info.as_ptr()) })
}

/// As [`queue_to_thread`], for the queue that the threads of process `pid` share.
pub fn queue_to_process(pid: i32, info: &[u8; SIGNAL_INFO_BYTES]) -> io::Result<()> {
    let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
    // SAFETY: `info` is a whole siginfo_t, which the kernel copies byte by byte.
    check(unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.as_ptr()) })
}
