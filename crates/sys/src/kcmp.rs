//! `kcmp(2)`: whether two processes share a kernel object.
//!
//! The block relies on: plain numbers, and for `KCMP_EPOLL_TFD` a pointer to a live local.
#![allow(unsafe_code)]

use std::cmp::Ordering;
use std::io;

// include/uapi/linux/kcmp.h
const KCMP_FILE: i32 = 0;
const KCMP_VM: i32 = 1;
const KCMP_FILES: i32 = 2;
const KCMP_EPOLL_TFD: i32 = 7;

fn kcmp(pid: i32, other: i32, kind: i32, index: u64, other_index: u64) -> io::Result<Ordering> {
    // SAFETY: the indexes are descriptor numbers, or 0, or the pointer of `epoll_target`.
    match unsafe { libc::syscall(libc::SYS_kcmp, pid, other, kind, index, other_index) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3: not equal, but without order.
        3 => Ok(Ordering::Greater),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Orders the open file descriptions behind two descriptors; equal when they are one.
pub fn files(pid: i32, fd: i32, other: i32, other_fd: i32) -> io::Result<Ordering> {
    kcmp(pid, other, KCMP_FILE, fd as u64, other_fd as u64)
}

/// Whether two processes share their address space.
pub fn share_memory(pid: i32, other: i32) -> io::Result<bool> {
    kcmp(pid, other, KCMP_VM, 0, 0).map(Ordering::is_eq)
}

/// Whether two processes share their descriptor table.
pub fn share_descriptor_table(pid: i32, other: i32) -> io::Result<bool> {
    kcmp(pid, other, KCMP_FILES, 0, 0).map(Ordering::is_eq)
}

/// Compares descriptor `fd` of `pid` with what epoll instance `epoll` of process `other` has as its
/// `position`th entry under the number `target`.
pub fn epoll_target(
    pid: i32,
    fd: i32,
    other: i32,
    epoll: i32,
    target: i32,
    position: u32,
) -> io::Result<bool> {
    /// `struct kcmp_epoll_slot`
    #[repr(C)]
    struct Slot {
        epoll: u32,
        target: u32,
        position: u32,
    }
    let slot = Slot {
        epoll: epoll as u32,
        target: target as u32,
        position,
    };
    kcmp(
        pid,
        other,
        KCMP_EPOLL_TFD,
        fd as u64,
        &raw const slot as u64,
    )
    .map(Ordering::is_eq)
}
