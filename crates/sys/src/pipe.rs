//! Pipes: their ring, and what is in it.
//!
//! Blocks pass descriptors that a `BorrowedFd` keeps open, integers, and an array of ours.
#![allow(unsafe_code)]

use crate::descriptor::{check, check_size};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `pipe2(2)`, closed on exec: (read end, write end). `flags` may be `O_NONBLOCK`, `O_DIRECT`.
pub fn pipe(flags: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes two descriptors into `ends`.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), flags | libc::O_CLOEXEC) })?;
    // SAFETY: the kernel just gave us both numbers, and nothing else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// `F_GETPIPE_SZ`, in bytes.
pub fn capacity(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    // SAFETY: no memory is involved.
    let bytes = check(unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_GETPIPE_SZ) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// `F_SETPIPE_SZ`. `EPERM` above /proc/sys/fs/pipe-max-size without `CAP_SYS_RESOURCE`; `EBUSY`
/// when the content does not fit.
pub fn set_capacity(pipe: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes =
        libc::c_int::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) }).map(drop)
}

/// `tee(2)`, never waiting: the content of `from` appears in `to` as well, packet borders kept,
/// and stays in `from`. `EAGAIN` when `from` is empty.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, most_bytes: usize) -> io::Result<usize> {
    // SAFETY: no memory of ours is involved.
    check_size(unsafe {
        libc::tee(
            from.as_raw_fd(),
            to.as_raw_fd(),
            most_bytes,
            libc::SPLICE_F_NONBLOCK,
        )
    })
}
