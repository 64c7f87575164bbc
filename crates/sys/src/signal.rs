//! Sending signals to threads and processes.
//!
//! The blocks rely on nothing but plain numbers.
#![allow(unsafe_code)]

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
