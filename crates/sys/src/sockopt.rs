//! `getsockopt` and `setsockopt` with plain values.
//!
//! The unsafe blocks pass a pointer and the length of one live buffer; the kernel reads or writes
//! at most that many bytes (net/socket.c, `do_sock_getsockopt`).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

// Options that the libc crate lacks, from include/uapi/asm-generic/socket.h.
pub const SO_PEERNAME: i32 = 28;
pub const SO_BUF_LOCK: i32 = 72;
pub const SO_GET_FILTER: i32 = 26;
/// `SOCK_SNDBUF_LOCK` and `SOCK_RCVBUF_LOCK`, the bits of `SO_BUF_LOCK` (linux/socket.h).
pub const SEND_BUFFER_LOCKED: i32 = 1;
pub const RECEIVE_BUFFER_LOCKED: i32 = 2;

/// Reads an option into `value`; returns how many bytes the kernel filled in.
pub fn get(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: `value` is writable for `length` bytes and outlives the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result == 0 {
        Ok(length as usize)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets an option to the bytes of `value`.
pub fn set(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: `value` is readable for its length and outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Reads an `int` option. IPv4 answers small values with one byte when the buffer is shorter than
/// an `int`; ours never is.
pub fn get_i32(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    get(fd, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Sets an `int` option.
pub fn set_i32(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set(fd, level, name, &value.to_ne_bytes())
}
