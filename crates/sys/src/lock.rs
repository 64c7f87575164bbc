//! File locks.
//!
//! Blocks pass descriptors that a `BorrowedFd` keeps open, integers, and a `struct flock` of ours.
#![allow(unsafe_code)]

use crate::descriptor::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Takes a `flock(2)` lock on the description, without waiting. `EWOULDBLOCK` when another holds
/// it.
pub fn flock(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    let operation = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    // SAFETY: no memory is involved.
    check(unsafe { libc::flock(fd.as_raw_fd(), operation | libc::LOCK_NB) }).map(drop)
}

fn record(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    exclusive: bool,
    start: i64,
    length: i64,
) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `struct flock`; l_pid must be 0 for OFD locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    } as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = length;
    // SAFETY: the kernel reads `lock`, which outlives the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, &lock) }).map(drop)
}

/// Takes an open-file-description lock (`F_OFD_SETLK`) on `length` bytes from `start`, without
/// waiting; `length` 0 is up to the end, wherever it moves.
pub fn description_lock(
    fd: BorrowedFd<'_>,
    exclusive: bool,
    start: i64,
    length: i64,
) -> io::Result<()> {
    record(fd, libc::F_OFD_SETLK, exclusive, start, length)
}

/// Takes a POSIX lock (`F_SETLK`) for the calling process, as [`description_lock`] does for the
/// description.
pub fn process_lock(
    fd: BorrowedFd<'_>,
    exclusive: bool,
    start: i64,
    length: i64,
) -> io::Result<()> {
    record(fd, libc::F_SETLK, exclusive, start, length)
}

/// The size of a `struct flock`.
pub const REQUEST_BYTES: usize = size_of::<libc::flock>();

/// Who stands in the way of the lock that `request`, a `struct flock` of some process, asks for on
/// `fd`: of the description (`F_OFD_GETLK`), or of the calling process (`F_GETLK`). A holder that
/// is no process has the number -1.
pub fn conflict(
    fd: BorrowedFd<'_>,
    of_description: bool,
    request: &[u8; REQUEST_BYTES],
) -> io::Result<Option<i32>> {
    // SAFETY: integers, for which any bytes will do.
    let mut lock: libc::flock = unsafe { std::ptr::read_unaligned(request.as_ptr().cast()) };
    lock.l_pid = 0;
    let command = if of_description {
        libc::F_OFD_GETLK
    } else {
        libc::F_GETLK
    };
    // SAFETY: the kernel reads and writes `lock`, which outlives the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) })?;
    Ok((i32::from(lock.l_type) != libc::F_UNLCK).then_some(lock.l_pid))
}
