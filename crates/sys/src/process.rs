//! Facts and limits of processes and threads.
//!
//! The blocks rely on: plain numbers, and pointers to live locals of the type that the call fills.
#![allow(unsafe_code)]

use std::io;

/// The number of the calling thread in its pid namespace.
pub fn this_thread() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// Limit `resource` (`RLIMIT_*`) of process `pid`: (soft, hard).
pub fn limit(pid: i32, resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` lives through the call; no new limit is given.
    let result = unsafe { libc::prlimit64(pid, resource, std::ptr::null(), &raw mut limit) };
    if result == 0 {
        Ok((limit.rlim_cur, limit.rlim_max))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets limit `resource` of process `pid` (0: the caller) to (soft, hard). Error `EPERM`: a hard limit
/// is raised without `CAP_SYS_RESOURCE`.
pub fn set_limit(pid: i32, resource: u32, (soft, hard): (u64, u64)) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` lives through the call; the old one is not asked for.
    let result = unsafe { libc::prlimit64(pid, resource, &raw const limit, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The nice value of thread `tid`, -20 to 19.
pub fn nice(tid: i32) -> io::Result<i32> {
    // SAFETY: plain numbers. The raw call gives 20 - nice, so that errors can be told apart.
    let result = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(20 - result as i32)
    }
}

/// The I/O priority of thread `tid` (`IOPRIO_PRIO_VALUE`); 0 when none was set.
pub fn io_priority(tid: i32) -> io::Result<i32> {
    /// linux/ioprio.h
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    match i32::try_from(result) {
        Ok(priority @ 0..) => Ok(priority),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What `PR_GET_SPECULATION_CTRL` says of `kind` (`PR_SPEC_*`) for the calling thread; 0 where the
/// kernel does not know it.
pub fn speculation(kind: u64) -> i32 {
    let option = libc::PR_GET_SPECULATION_CTRL;
    // SAFETY: plain numbers.
    let result = unsafe { libc::prctl(option, kind, 0_u64, 0_u64, 0_u64) };
    result.max(0)
}

/// The robust list that thread `tid` registered: head and length in bytes.
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut length) = (0_u64, 0_u64);
    // SAFETY: both live through the call, which fills one word each.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            tid,
            &raw mut head,
            &raw mut length,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok((head, length))
    }
}
