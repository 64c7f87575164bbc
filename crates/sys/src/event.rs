//! eventfd and signalfd.
//!
//! Blocks pass integers, and a signal set of ours that outlives the call.
#![allow(unsafe_code)]

use crate::descriptor::check;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// `eventfd2(2)`, closed on exec. `flags` may be `EFD_NONBLOCK`, `EFD_SEMAPHORE`.
pub fn counter(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::eventfd(0, flags | libc::EFD_CLOEXEC) })?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new `signalfd4(2)`, closed on exec, for the signals of `mask` (bit 0 is signal 1).
pub fn signals(mask: u64, flags: i32) -> io::Result<OwnedFd> {
    // The kernel's own sigset_t is 8 bytes, glibc's is longer: hence the bare call.
    // SAFETY: the kernel reads 8 bytes of `mask`, which outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            8,
            flags | libc::SFD_CLOEXEC,
        )
    };
    let fd = check(fd as libc::c_int)?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
