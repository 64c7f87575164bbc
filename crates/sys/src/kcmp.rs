<<<<<<< HEAD
//! `kcmp(2)`: whether two descriptors of other processes are one open file description.
//!
//! The results are a total order that holds as long as both descriptions live, so they can be
//! sorted and searched (`kernel/kcmp.c`, `kptr_obfuscate`).
//!
//! Blocks pass integers, and for an epoll target a structure of ours that outlives the call.
=======
//! `kcmp(2)`: whether two processes share a kernel object.
//!
//! The block relies on: plain numbers, and for `KCMP_EPOLL_TFD` a pointer to a live local.
>>>>>>> tracee
#![allow(unsafe_code)]

use std::cmp::Ordering;
use std::io;

// include/uapi/linux/kcmp.h
<<<<<<< HEAD
const KCMP_FILE: libc::c_int = 0;
const KCMP_FILES: libc::c_int = 2;
const KCMP_EPOLL_TFD: libc::c_int = 7;

/// `struct kcmp_epoll_slot` of include/uapi/linux/kcmp.h.
#[repr(C)]
struct EpollSlot {
    epoll_fd: u32,
    target_fd: u32,
    nth: u32,
}

fn compare(pid1: i32, pid2: i32, kind: libc::c_int, one: u64, two: u64) -> io::Result<Ordering> {
    // SAFETY: `one` and `two` are numbers, or for KCMP_EPOLL_TFD `two` is the address of an
    // `EpollSlot` that the caller keeps alive.
    match unsafe { libc::syscall(libc::SYS_kcmp, pid1, pid2, kind, one, two) } {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3 says "different but not ordered", which the kernel gives for no type it sorts.
        3 => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
=======
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
>>>>>>> tracee
        _ => Err(io::Error::last_os_error()),
    }
}

<<<<<<< HEAD
/// Compares the description behind `fd1` of process `pid1` with that behind `fd2` of `pid2`.
/// `EBADF` when either is closed.
pub fn kcmp_file(pid1: i32, fd1: i32, pid2: i32, fd2: i32) -> io::Result<Ordering> {
    compare(pid1, pid2, KCMP_FILE, fd1 as u64, fd2 as u64)
}

/// Compares the descriptor tables of two tasks: equal when they share one (`CLONE_FILES`).
pub fn kcmp_table(pid1: i32, pid2: i32) -> io::Result<Ordering> {
    compare(pid1, pid2, KCMP_FILES, 0, 0)
}

/// Compares the description behind `fd` of `pid` with the target of an epoll entry: the `nth`
/// (from 0) that was added under the number `target_fd` to `epoll_fd` of `epoll_pid`. The order is
/// that of [`kcmp_file`]. `ENOENT` when there is no such entry.
pub fn kcmp_epoll_target(
    pid: i32,
    fd: i32,
    epoll_pid: i32,
    epoll_fd: i32,
    target_fd: i32,
    nth: u32,
) -> io::Result<Ordering> {
    let slot = EpollSlot { epoll_fd: epoll_fd as u32, target_fd: target_fd as u32, nth };
    compare(pid, epoll_pid, KCMP_EPOLL_TFD, fd as u64, &raw const slot as u64)
=======
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
>>>>>>> tracee
}
