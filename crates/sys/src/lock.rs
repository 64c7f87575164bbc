<<<<<<< HEAD
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
    let operation = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
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
    lock.l_type = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = length;
    // SAFETY: the kernel reads `lock`, which outlives the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, &lock) }).map(drop)
}

/// Takes an open-file-description lock (`F_OFD_SETLK`) on `length` bytes from `start`, without
/// waiting; `length` 0 is up to the end, wherever it moves.
pub fn description_lock(fd: BorrowedFd<'_>, exclusive: bool, start: i64, length: i64) -> io::Result<()> {
    record(fd, libc::F_OFD_SETLK, exclusive, start, length)
}

/// Takes a POSIX lock (`F_SETLK`) for the calling process, as [`description_lock`] does for the
/// description.
pub fn process_lock(fd: BorrowedFd<'_>, exclusive: bool, start: i64, length: i64) -> io::Result<()> {
    record(fd, libc::F_SETLK, exclusive, start, length)
=======
//! Locks that belong to an open file description (`F_OFD_SETLK` of `fcntl_locking(2)`): every
//! process that inherits the descriptor holds the lock, and the kernel drops it with the last one.
//!
//! The blocks rely on: `fcntl` reads and writes only the `struct flock` it is given.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The whole file, as `fcntl(2)` wants it.
fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Must be 0 for the F_OFD_ commands, else EINVAL.
        l_pid: 0,
    }
}

/// Takes the exclusive lock of the file without waiting; `false` when another open file
/// description holds it. The file must be open for writing.
pub fn try_exclusive(file: &impl AsFd) -> io::Result<bool> {
    let request = whole_file(libc::F_WRLCK);
    // SAFETY: `request` is a valid struct flock for the whole call.
    let result = unsafe {
        libc::fcntl(
            file.as_fd().as_raw_fd(),
            libc::F_OFD_SETLK,
            &raw const request,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether another open file description holds the exclusive lock. Takes nothing, so it can never
/// make somebody's [`try_exclusive`] fail.
pub fn is_held(file: &impl AsFd) -> io::Result<bool> {
    let mut request = whole_file(libc::F_RDLCK);
    // SAFETY: `request` is a valid struct flock that the kernel overwrites.
    let result = unsafe {
        libc::fcntl(
            file.as_fd().as_raw_fd(),
            libc::F_OFD_GETLK,
            &raw mut request,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request.l_type != libc::F_UNLCK as libc::c_short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn held_by_a_description_and_its_duplicates() {
        let path = std::env::temp_dir().join(format!("unbroken-lock-{}", std::process::id()));
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .expect("lock file")
        };
        let (first, second) = (open(), open());
        assert!(!is_held(&second).expect("test"));
        assert!(try_exclusive(&first).expect("lock"));
        assert!(!try_exclusive(&second).expect("lock"));
        let duplicate = first.try_clone().expect("dup");
        drop(first);
        assert!(is_held(&second).expect("test"));
        drop(duplicate);
        assert!(!is_held(&second).expect("test"));
        std::fs::remove_file(&path).expect("remove");
    }
>>>>>>> cli
}
