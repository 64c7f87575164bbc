//! The memory of another process, by `process_vm_readv(2)` and `process_vm_writev(2)`.
//!
//! The blocks rely on: local vectors are made of a caller's slice and never reach past it; remote
//! vectors are numbers that the kernel checks against the other process.
#![allow(unsafe_code)]

use std::io;

/// A range of the other process: address and length in bytes.
pub type RemoteRange = libc::iovec;

/// The range of `length_bytes` at `address` of another process.
pub fn remote_range(address: u64, length_bytes: usize) -> RemoteRange {
    RemoteRange {
        iov_base: address as *mut libc::c_void,
        iov_len: length_bytes,
    }
}

/// Reads `ranges` of process `pid` one after the other into `destination`; returns the bytes read,
/// fewer than asked for when a range is not mapped or not readable. At most 1024
/// (`UIO_MAXIOV`) ranges.
pub fn read_ranges(pid: i32, ranges: &[RemoteRange], destination: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: destination.as_mut_ptr().cast(),
        iov_len: destination.len(),
    };
    // SAFETY: the local vector is exactly the caller's slice.
    let done = unsafe {
        libc::process_vm_readv(
            pid,
            &raw const local,
            1,
            ranges.as_ptr(),
            ranges.len() as u64,
            0,
        )
    };
    count(done)
}

/// Reads each of `ranges` of process `pid` into the slice of the same position, which is as long.
pub fn read_parts<const N: usize>(
    pid: i32,
    ranges: &[RemoteRange; N],
    parts: [&mut [u8]; N],
) -> io::Result<()> {
    let mut wanted = 0;
    let local = parts.map(|part| {
        wanted += part.len();
        libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        }
    });
    // SAFETY: each local vector is exactly one of the caller's slices, which are borrowed for
    // longer than the call.
    let done = unsafe {
        libc::process_vm_readv(pid, local.as_ptr(), N as u64, ranges.as_ptr(), N as u64, 0)
    };
    if count(done)? == wanted {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EFAULT))
    }
}

/// Reads from `address` of process `pid`; returns the bytes read, fewer than asked for when the
/// memory ends or is not readable.
pub fn read(pid: i32, address: u64, destination: &mut [u8]) -> io::Result<usize> {
    let length = destination.len();
    read_ranges(pid, &[remote_range(address, length)], destination)
}

/// Writes all of `parts`, each `(address, bytes)`, to writable memory of process `pid`.
pub fn write_parts<const N: usize>(pid: i32, parts: [(u64, &[u8]); N]) -> io::Result<()> {
    let local = parts.map(|(_, bytes)| libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    });
    let remote = parts.map(|(address, bytes)| remote_range(address, bytes.len()));
    // SAFETY: the kernel only reads the local vectors here, and each is exactly one slice.
    let done = unsafe {
        libc::process_vm_writev(pid, local.as_ptr(), N as u64, remote.as_ptr(), N as u64, 0)
    };
    let wanted: usize = parts.iter().map(|(_, bytes)| bytes.len()).sum();
    if count(done)? == wanted {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EFAULT))
    }
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
