//! `userfaultfd(2)` for write tracking: registration and write protection.
//!
//! The blocks rely on: each ioctl gets a pointer to a live local of the struct it names.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

// include/uapi/linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`, 24 bytes.
const UFFDIO_API: u64 = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`, 32 bytes.
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
/// `_IOWR(0xaa, 0x06, struct uffdio_writeprotect)`, 24 bytes.
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;

/// The flags with which a service makes the descriptor: `O_CLOEXEC | O_NONBLOCK |
/// UFFD_USER_MODE_ONLY`. The last needs no privilege, whatever vm.unprivileged_userfaultfd says;
/// with asynchronous protection no fault is ever handed to user space, so that the kernel's own
/// writes work, too.
pub const CREATE_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

fn ioctl<T>(descriptor: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<()> {
    // SAFETY: `argument` is the struct that `request` names, by the callers below.
    let result = unsafe {
        libc::ioctl(
            descriptor.as_raw_fd(),
            request,
            std::ptr::from_mut(argument),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Turns a fresh descriptor into one that tracks writes without ever stopping the writer.
pub fn enable_write_tracking(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    /// `struct uffdio_api`
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    let features = UFFD_FEATURE_PAGEFAULT_FLAG_WP
        | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        | UFFD_FEATURE_WP_UNPOPULATED
        | UFFD_FEATURE_WP_ASYNC;
    ioctl(
        descriptor,
        UFFDIO_API,
        &mut Api {
            api: UFFD_API,
            features,
            ioctls: 0,
        },
    )
}

/// Starts tracking writes to a range of whole mappings. All that is present there counts as
/// written until it is scanned. `EINVAL` when a mapping of the range cannot be tracked (or is a
/// hole), `EBUSY` when another userfaultfd has it.
pub fn register(descriptor: BorrowedFd<'_>, start: u64, length_bytes: u64) -> io::Result<()> {
    /// `struct uffdio_register`
    #[repr(C)]
    struct Register {
        start: u64,
        length: u64,
        mode: u64,
        ioctls: u64,
    }
    let mut argument = Register {
        start,
        length: length_bytes,
        mode: UFFDIO_REGISTER_MODE_WP,
        ioctls: 0,
    };
    ioctl(descriptor, UFFDIO_REGISTER, &mut argument)
}

/// Makes every page of a registered range count as written.
pub fn mark_written(descriptor: BorrowedFd<'_>, start: u64, length_bytes: u64) -> io::Result<()> {
    /// `struct uffdio_writeprotect`
    #[repr(C)]
    struct WriteProtect {
        start: u64,
        length: u64,
        mode: u64,
    }
    let mut argument = WriteProtect {
        start,
        length: length_bytes,
        mode: 0,
    };
    ioctl(descriptor, UFFDIO_WRITEPROTECT, &mut argument)
}
