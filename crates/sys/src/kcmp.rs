//! `kcmp(2)`: whether two descriptors of other processes are one open file description.
//!
//! The results are a total order that holds as long as both descriptions live, so they can be
//! sorted and searched (`kernel/kcmp.c`, `kptr_obfuscate`).
//!
//! Blocks pass integers, and for an epoll target a structure of ours that outlives the call.
#![allow(unsafe_code)]

use std::cmp::Ordering;
use std::io;

// include/uapi/linux/kcmp.h
const KCMP_FILE: libc::c_int = 0;
const KCMP_VM: libc::c_int = 1;
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
        _ => Err(io::Error::last_os_error()),
    }
}

/// Compares the description behind `fd1` of process `pid1` with that behind `fd2` of `pid2`.
/// `EBADF` when either is closed.
pub fn files(pid1: i32, fd1: i32, pid2: i32, fd2: i32) -> io::Result<Ordering> {
    compare(pid1, pid2, KCMP_FILE, fd1 as u64, fd2 as u64)
}

/// Whether two tasks share one descriptor table (`CLONE_FILES`).
pub fn share_descriptor_table(pid1: i32, pid2: i32) -> io::Result<bool> {
    compare(pid1, pid2, KCMP_FILES, 0, 0).map(Ordering::is_eq)
}

/// Compares the description behind `fd` of `pid` with the target of an epoll entry: the `nth`
/// (from 0) that was added under the number `target_fd` to `epoll_fd` of `epoll_pid`. The order is
/// that of [`files`]. `ENOENT` when there is no such entry.
pub fn epoll_target(
    pid: i32,
    fd: i32,
    epoll_pid: i32,
    epoll_fd: i32,
    target_fd: i32,
    nth: u32,
) -> io::Result<Ordering> {
    let slot = EpollSlot {
        epoll_fd: epoll_fd as u32,
        target_fd: target_fd as u32,
        nth,
    };
    compare(
        pid,
        epoll_pid,
        KCMP_EPOLL_TFD,
        fd as u64,
        &raw const slot as u64,
    )
}

/// Whether two tasks share one address space (`CLONE_VM`).
pub fn share_memory(pid1: i32, pid2: i32) -> io::Result<bool> {
    compare(pid1, pid2, KCMP_VM, 0, 0).map(Ordering::is_eq)
}
