//! Handles of files: what a file can be opened by that has no name (`open_by_handle_at(2)`).
//!
//! The unsafe blocks pass a handle of ours with room for the longest, and descriptors that a
//! `BorrowedFd` keeps open for the length of the call.
#![allow(unsafe_code)]

use crate::descriptor::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// include/linux/exportfs.h, MAX_HANDLE_SZ
const BYTES_MAX: usize = 128;

/// The handle of a file on its filesystem.
#[repr(C)]
pub struct FileHandle {
    length_bytes: u32,
    kind: i32,
    bytes: [u8; BYTES_MAX],
}

/// The handle of what `fd` names; `O_PATH` will do. `EOPNOTSUPP` where the filesystem has none.
pub fn of(fd: BorrowedFd<'_>) -> io::Result<FileHandle> {
    let mut handle = FileHandle {
        length_bytes: BYTES_MAX as u32,
        kind: 0,
        bytes: [0; BYTES_MAX],
    };
    let mut mount = 0;
    // SAFETY: the empty path is NUL-terminated; the kernel writes at most `length_bytes` bytes behind
    // the handle's header, and one integer.
    check(unsafe {
        libc::name_to_handle_at(
            fd.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut handle).cast(),
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    })?;
    Ok(handle)
}

/// Opens what has this handle on the filesystem, and the mount, of `beside`, which is no `O_PATH`
/// descriptor.
pub fn open(beside: BorrowedFd<'_>, handle: &FileHandle, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the handle, which is as long as it says, and writes nothing.
    let fd = check(unsafe {
        libc::open_by_handle_at(
            beside.as_raw_fd(),
            (&raw const *handle).cast_mut().cast(),
            flags | libc::O_CLOEXEC,
        )
    })?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
