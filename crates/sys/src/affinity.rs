//! On which cores, and how urgently, a thread runs.
//!
//! The blocks rely on: the set is a live local of the size that is passed.
#![allow(unsafe_code)]

use std::io;

fn check(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The cores on which thread `tid` (0: the caller) may run, ascending.
pub fn cores(tid: i32) -> io::Result<Vec<usize>> {
    // SAFETY: zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` lives through the call and has the size given.
    check(unsafe { libc::sched_getaffinity(tid, size_of_val(&set), &raw mut set) })?;
    let count = libc::CPU_SETSIZE as usize;
    // SAFETY: `core` stays below CPU_SETSIZE.
    Ok((0..count)
        .filter(|&core| unsafe { libc::CPU_ISSET(core, &set) })
        .collect())
}

/// Binds thread `tid` (0: the caller) to `cores`; those that do not exist are ignored.
pub fn bind(tid: i32, cores: &[usize]) -> io::Result<()> {
    // SAFETY: zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &core in cores
        .iter()
        .filter(|&&core| core < libc::CPU_SETSIZE as usize)
    {
        // SAFETY: `core` is below CPU_SETSIZE.
        unsafe { libc::CPU_SET(core, &mut set) };
    }
    // SAFETY: `set` lives through the call and has the size given.
    check(unsafe { libc::sched_setaffinity(tid, size_of_val(&set), &raw const set) })
}

/// Whether the calling thread runs before every thread of an ordinary policy as soon as it wakes
/// (`SCHED_FIFO`, priority 1). Threads and processes that it makes do not inherit it. Needs
/// `CAP_SYS_NICE` to switch on. A thread that spins under it starves its core (KERNEL.md, Urgent
/// threads).
pub fn set_urgent(urgent: bool) -> io::Result<()> {
    let (policy, sched_priority) = if urgent {
        (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1)
    } else {
        (libc::SCHED_OTHER, 0)
    };
    let parameter = libc::sched_param { sched_priority };
    // SAFETY: `parameter` lives through the call; 0 is the calling thread.
    check(unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) })
}
