//! memfds and their seals, and where a sparse file has data.
//!
//! Blocks pass descriptors that a `BorrowedFd` keeps open, integers, and NUL-terminated names.
#![allow(unsafe_code)]

use crate::descriptor::check;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `memfd_create(2)`, closed on exec. `flags` may be `MFD_ALLOW_SEALING`, `MFD_NOEXEC_SEAL`, ...
pub fn create(name: &CStr, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: `name` is NUL-terminated.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_CLOEXEC) })?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `F_GET_SEALS`; `EINVAL` for a file that cannot be sealed.
pub fn seals(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) })
}

/// `F_ADD_SEALS`.
pub fn add_seals(fd: BorrowedFd<'_>, seals: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}
