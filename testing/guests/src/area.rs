//! Memory that a guest maps by hand.
//!
//! # Safety
//! An `Area` owns its mapping, and every access is checked against its length and goes through
//! volatile copies, because mappings of one file alias each other. A guest that reads a page which
//! it made unreadable dies of it, which is a failed check and no unsoundness.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::unistd::Pid;

use crate::raw::outcome;

pub const PAGE: usize = 4096;
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// One mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Area {
    start: usize,
    length: usize,
}

impl Area {
    /// Private anonymous memory.
    pub fn private(pages: usize) -> io::Result<Self> {
        Self::map(
            pages,
            READ_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None,
            0,
        )
    }

    pub fn map(
        pages: usize,
        protection: i32,
        flags: i32,
        file: Option<BorrowedFd<'_>>,
        offset: i64,
    ) -> io::Result<Self> {
        let length = pages * PAGE;
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        // SAFETY: without MAP_FIXED the kernel picks addresses that nothing uses.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start as usize,
            length,
        })
    }

    /// The whole of a file, shared and writable.
    pub fn shared_file(file: impl AsFd, pages: usize) -> io::Result<Self> {
        Self::map(pages, READ_WRITE, libc::MAP_SHARED, Some(file.as_fd()), 0)
    }

    pub fn address(&self) -> usize {
        self.start
    }

    pub fn pages(&self) -> usize {
        self.length / PAGE
    }

    fn place(&self, offset: usize, length: usize) -> *mut c_void {
        assert!(offset + length <= self.length, "outside of the area");
        (self.start + offset) as *mut c_void
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let place = self.place(offset, bytes.len()).cast::<u8>();
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: within the mapping, by `place`.
            unsafe { place.add(index).write_volatile(*byte) };
        }
    }

    pub fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        let place = self.place(offset, length).cast::<u8>();
        // SAFETY: within the mapping, by `place`.
        let byte = |index| unsafe { place.add(index).read_volatile() };
        (0..length).map(byte).collect()
    }

    pub fn protect(&self, page: usize, pages: usize, protection: i32) -> io::Result<()> {
        let place = self.place(page * PAGE, pages * PAGE);
        // SAFETY: these are pages of this mapping.
        outcome(unsafe { libc::mprotect(place, pages * PAGE, protection) }).map(drop)
    }

    pub fn advise(&self, page: usize, pages: usize, advice: i32) -> io::Result<()> {
        let place = self.place(page * PAGE, pages * PAGE);
        // SAFETY: these are pages of this mapping.
        outcome(unsafe { libc::madvise(place, pages * PAGE, advice) }).map(drop)
    }

    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: locking changes no content.
        outcome(unsafe { libc::mlock(self.place(0, 0), self.length) }).map(drop)
    }

    pub fn lock_on_fault(&self) -> io::Result<()> {
        // SAFETY: locking changes no content.
        outcome(unsafe { libc::mlock2(self.place(0, 0), self.length, libc::MLOCK_ONFAULT as _) })
            .map(drop)
    }

    /// Makes it this many pages; it may move, and does when `elsewhere` is asked for.
    pub fn remap(&mut self, pages: usize, elsewhere: bool) -> io::Result<()> {
        let length = pages * PAGE;
        let start = if elsewhere {
            // A reservation picks the new place; the moved mapping then replaces it.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let target = Self::map(pages, libc::PROT_NONE, flags, None, 0)?;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let target = std::mem::ManuallyDrop::new(target).place(0, 0);
            // SAFETY: the old range is ours, the new one is the reservation.
            unsafe { libc::mremap(self.place(0, 0), self.length, length, flags, target) }
        } else {
            // SAFETY: the range is ours.
            unsafe { libc::mremap(self.place(0, 0), self.length, length, libc::MREMAP_MAYMOVE) }
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        (self.start, self.length) = (start as usize, length);
        Ok(())
    }

    /// Unmaps pages in the middle and maps new ones of zeros there.
    pub fn renew(&self, page: usize, pages: usize) -> io::Result<()> {
        let place = self.place(page * PAGE, pages * PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: MAP_FIXED replaces pages of this mapping alone.
        let start = unsafe { libc::mmap(place, pages * PAGE, READ_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Whether the kernel can read the page for the process: how a guard is seen without dying of
    /// it.
    pub fn can_be_read(&self, page: usize) -> bool {
        let mut byte = 0u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: self.place(page * PAGE, 1),
            iov_len: 1,
        };
        // SAFETY: one byte of this process is copied to a local.
        unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) == 1 }
    }

    /// Has the kernel copy `bytes` here, in the memory of `process`: this one, or the parent of a
    /// child that was forked with the area.
    pub fn copy_in(&self, process: Pid, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let local = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let remote = libc::iovec {
            iov_base: self.place(offset, bytes.len()),
            iov_len: bytes.len(),
        };
        // SAFETY: the local bytes are only read, and the remote ones are within this mapping.
        let copied = unsafe { libc::process_vm_writev(process.as_raw(), &local, 1, &remote, 1, 0) };
        match outcome(copied as i64)? as usize {
            whole if whole == bytes.len() => Ok(()),
            part => Err(io::Error::other(format!("only {part} bytes were copied"))),
        }
    }

    /// The line of /proc/self/smaps with this name, of the mapping that holds this page.
    pub fn smaps(&self, page: usize, name: &str) -> io::Result<String> {
        let address = self.start + page * PAGE;
        let text = std::fs::read_to_string("/proc/self/smaps")?;
        let mut inside = false;
        for line in text.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((start, end)) = range.split_once('-')
                && let (Ok(start), Ok(end)) = (
                    usize::from_str_radix(start, 16),
                    usize::from_str_radix(end, 16),
                )
            {
                inside = (start..end).contains(&address);
            } else if inside && let Some(value) = line.strip_prefix(name) {
                return Ok(value.trim_start_matches(':').trim().to_string());
            }
        }
        Err(io::Error::other(format!("no {name} for {address:#x}")))
    }

    /// The permissions of a page in /proc/self/maps, such as `r--p`.
    pub fn permissions(&self, page: usize) -> io::Result<String> {
        let address = self.start + page * PAGE;
        for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
            let mut words = line.split(' ');
            let range = words.next().unwrap_or_default();
            if let Some((start, end)) = range.split_once('-')
                && let (Ok(start), Ok(end)) = (
                    usize::from_str_radix(start, 16),
                    usize::from_str_radix(end, 16),
                )
                && (start..end).contains(&address)
            {
                return Ok(words.next().unwrap_or_default().to_string());
            }
        }
        Ok("unmapped".to_string())
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is this area's own and no reference into it is ever given out.
        unsafe { libc::munmap(self.start as *mut c_void, self.length) };
    }
}

/// The heap's end, moved by hand.
#[derive(Debug)]
pub struct Break;

impl Break {
    /// Makes the C library's allocator take memory by mmap alone from now on, once what it has is
    /// used up: with the break in our hands it sees that its heap no longer continues.
    pub fn leave_to_us() {
        // SAFETY: tunes the allocator; every large allocation then is a mapping of its own.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 1);
            libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        }
    }

    pub fn now() -> io::Result<usize> {
        // SAFETY: brk(0) only tells where it is.
        Ok(outcome(unsafe { libc::syscall(libc::SYS_brk, 0) })? as usize)
    }

    /// The program keeps nothing between the old end and the new one.
    pub fn set(end: usize) -> anyhow::Result<()> {
        // SAFETY: the guest gives back only what it took by this call.
        let found = outcome(unsafe { libc::syscall(libc::SYS_brk, end) })? as usize;
        crate::same("the break as set", found, end)
    }

    pub fn write(start: usize, bytes: &[u8]) -> anyhow::Result<()> {
        anyhow::ensure!(start + bytes.len() <= Self::now()?, "beyond the break");
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: below the break, and above all that the allocator has.
            unsafe { ((start + index) as *mut u8).write_volatile(*byte) };
        }
        Ok(())
    }

    pub fn read(start: usize, length: usize) -> anyhow::Result<Vec<u8>> {
        anyhow::ensure!(start + length <= Self::now()?, "beyond the break");
        // SAFETY: below the break, and above all that the allocator has.
        let byte = |index| unsafe { ((start + index) as *const u8).read_volatile() };
        Ok((0..length).map(byte).collect())
    }
}
