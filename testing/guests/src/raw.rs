//! Calls for which no safe wrapper exists, each as narrow as the guests need it.
//!
//! # Safety
//! Guests speak to the kernel raw: half of what they keep (queued signals, option values, file
//! positions of the kernel's own) has no wrapper. Every call here hands the kernel integers or
//! buffers that live through the call, and nothing else.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The result of a call that gives -1 and errno.
pub fn outcome(result: impl Into<i64>) -> io::Result<i64> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// Any system call by number, for those that must be denied: all arguments are integers.
pub fn call(number: i64, arguments: [u64; 4]) -> io::Result<i64> {
    let [a, b, c, d] = arguments;
    // SAFETY: callers pass integers and null, which the kernel checks.
    outcome(unsafe { libc::syscall(number, a, b, c, d, 0u64, 0u64) })
}

/// An integer that `ioctl` writes: `FIONREAD`, `SIOCOUTQ`, `SIOCOUTQNSD`, ...
pub fn ioctl_integer(fd: impl AsFd, request: u64) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    // SAFETY: these requests write one int, to a local.
    outcome(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &mut value) })?;
    Ok(value)
}

/// Bytes that can be read without waiting.
pub fn unread(fd: impl AsFd) -> io::Result<usize> {
    Ok(ioctl_integer(fd, libc::FIONREAD)? as usize)
}

/// `fcntl` with an integer argument.
pub fn fcntl(fd: impl AsFd, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: the argument is an integer.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, argument) };
    Ok(outcome(result)? as i32)
}

/// Sets or asks for a range lock: `F_OFD_SETLK`, `F_SETLK`, `F_OFD_GETLK`.
pub fn range_lock(
    fd: impl AsFd,
    command: i32,
    kind: i32,
    start: i64,
    length: i64,
) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: the structure is a local.
    outcome(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, &mut lock) })?;
    Ok(lock)
}

/// An integer socket option.
pub fn option(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let mut bytes = [0; 4];
    option_bytes(fd, level, name, &mut bytes)?;
    Ok(i32::from_ne_bytes(bytes))
}

pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_option_bytes(fd, level, name, &value.to_ne_bytes())
}

/// A socket option of any shape; returns its length.
pub fn option_bytes(fd: impl AsFd, level: i32, name: i32, into: &mut [u8]) -> io::Result<usize> {
    let mut length = into.len() as libc::socklen_t;
    let place = into.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `length` bytes to `into`.
    outcome(unsafe { libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, place, &mut length) })?;
    Ok(length as usize)
}

pub fn set_option_bytes(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let (place, length) = (value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: the kernel reads `length` bytes of `value`.
    outcome(unsafe { libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, place, length) })?;
    Ok(())
}

/// Nanoseconds of a clock, as the vDSO gives them.
pub fn clock_ns(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is a local.
    outcome(unsafe { libc::clock_gettime(clock, &mut time) })?;
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// `CLOCK_MONOTONIC`, which every deadline of a guest is on.
pub fn monotonic_ns() -> io::Result<u64> {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// A `prctl` that answers with its value.
pub fn prctl_get(option: i32) -> io::Result<i64> {
    // SAFETY: these options take no pointer; PR_GET_TIMERSLACK, PR_GET_DUMPABLE, ... return it.
    outcome(unsafe { libc::prctl(option, 0u64, 0u64, 0u64, 0u64) })
}

/// A `prctl` that sets an integer.
pub fn prctl_set(option: i32, value: u64) -> io::Result<()> {
    // SAFETY: these options take an integer.
    outcome(unsafe { libc::prctl(option, value, 0u64, 0u64, 0u64) }).map(drop)
}

/// A `prctl` that writes its answer, of at most 16 bytes.
pub fn prctl_get_by_pointer(option: i32) -> io::Result<[u8; 16]> {
    let mut answer = [0; 16];
    // SAFETY: none of these options writes more than a thread's name, which has 16 bytes.
    outcome(unsafe { libc::prctl(option, &raw mut answer, 0u64, 0u64, 0u64) })?;
    Ok(answer)
}

/// A `prctl` that sets by two integers.
pub fn prctl_set_with(option: i32, [first, second]: [u64; 2]) -> io::Result<()> {
    // SAFETY: these options take integers.
    outcome(unsafe { libc::prctl(option, first, second, 0u64, 0u64) }).map(drop)
}

/// Mode and first 64 nodes of the calling thread's memory policy.
pub fn memory_policy() -> io::Result<(i32, u64)> {
    let (mut mode, mut nodes) = (0i32, [0u64; 16]);
    // SAFETY: the kernel writes an integer and at most 1024 bits, to locals.
    outcome(unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            &raw mut nodes,
            1025u64,
            0u64,
            0u64,
        )
    })?;
    Ok((mode, nodes[0]))
}

/// `nodes` is a set of nodes, node 0 the lowest bit.
pub fn set_memory_policy(mode: i32, nodes: u64) -> io::Result<()> {
    // SAFETY: the kernel reads 64 bits of a local.
    outcome(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const nodes, 65u64) })
        .map(drop)
}

/// The same without the vDSO.
pub fn clock_by_call_ns(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is a local.
    outcome(unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &mut time) })?;
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// The processor that the thread runs on: the C library reads it where rseq keeps it.
pub fn current_processor() -> io::Result<i64> {
    // SAFETY: takes nothing.
    outcome(unsafe { libc::sched_getcpu() })
}
