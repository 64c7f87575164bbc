//! Processes by descriptor.
//!
//! The blocks rely on: plain numbers; a descriptor that a call returns is new and nobody else's.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn owned(result: i64) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel just made this descriptor for us.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor of process `pid`; readable once it has ended.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A descriptor of one thread, leader or not. Linux 6.9 or later; `EINVAL` before.
pub fn open_thread(tid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers. PIDFD_THREAD is O_EXCL (include/uapi/linux/pidfd.h).
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, libc::O_EXCL) })
}

/// A duplicate of descriptor `number` of the process.
pub fn get_descriptor(process: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}
