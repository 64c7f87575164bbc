//! `PAGEMAP_SCAN`: which pages of a process are present and which were written.
//!
//! The block relies on: the vector that the kernel fills is a caller's slice, passed with its
//! length.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

// include/uapi/linux/fs.h
pub const WP_ALLOWED: u64 = 1 << 0;
pub const WRITTEN: u64 = 1 << 1;
pub const FILE: u64 = 1 << 2;
pub const PRESENT: u64 = 1 << 3;
pub const SWAPPED: u64 = 1 << 4;
pub const ZERO_PAGE: u64 = 1 << 5;
pub const GUARD: u64 = 1 << 8;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// `_IOWR('f', 16, struct pm_scan_arg)`, 96 bytes.
const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// A run of pages of the same categories; `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// Which pages a scan returns.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// Categories that a page must have.
    pub all_of: u64,
    /// Categories that it must not have.
    pub none_of: u64,
    /// Categories of which it must have one; 0 for no such condition.
    pub any_of: u64,
    /// Categories told apart in the answer.
    pub returned: u64,
    /// Whether to write-protect what is returned, so that it counts as written only when it is
    /// written again.
    pub protect: bool,
}

/// Scans `start..end` of the process whose `/proc/PID/pagemap` this is. Returns how many regions it
/// wrote and how far it came: less than `end` when `regions` is full.
pub fn scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    filter: &Filter,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    /// `struct pm_scan_arg`
    #[repr(C)]
    struct Argument {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vector: u64,
        vector_length: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    let mut argument = Argument {
        size: size_of::<Argument>() as u64,
        flags: if filter.protect {
            PM_SCAN_WP_MATCHING
        } else {
            0
        },
        start,
        end,
        walk_end: 0,
        vector: regions.as_mut_ptr() as u64,
        vector_length: regions.len() as u64,
        max_pages: 0,
        category_inverted: filter.none_of,
        category_mask: filter.all_of | filter.none_of,
        category_anyof_mask: filter.any_of,
        return_mask: filter.returned,
    };
    // SAFETY: the struct lives through the call; its vector is the caller's slice.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
    match usize::try_from(found) {
        Ok(found) => Ok((found, argument.walk_end)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
