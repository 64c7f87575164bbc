//! The page faults of a process, told as they happen: software events of `perf_event_open(2)`,
//! which the kernel writes into a ring in shared memory.
//!
//! The blocks rely on: an attribute block that is ours for the call; a ring that lives as long as
//! the value that mapped it, of which the kernel writes only what lies outside of tail to head
//! (include/uapi/linux/perf_event.h, `struct perf_event_mmap_page`).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

// include/uapi/linux/perf_event.h
const PERF_TYPE_SOFTWARE: u32 = 1;
const PERF_COUNT_SW_PAGE_FAULTS_MIN: u64 = 5;
const PERF_COUNT_SW_PAGE_FAULTS_MAJ: u64 = 6;
const PERF_COUNT_SW_DUMMY: u64 = 9;
const PERF_SAMPLE_TID: u64 = 1 << 1;
const PERF_SAMPLE_ADDR: u64 = 1 << 3;
const INHERIT: u64 = 1 << 1;
const WATERMARK: u64 = 1 << 14;
const PERF_FLAG_FD_CLOEXEC: u64 = 1 << 3;
/// `_IO('$', 5)`
const PERF_EVENT_IOC_SET_OUTPUT: u64 = 0x2405;
const PERF_RECORD_SAMPLE: u32 = 9;

const PAGE_BYTES: usize = 4096;
const WORD_BYTES: u64 = size_of::<u64>() as u64;
/// Where `data_head` and `data_tail` stand in the ring's first page, in words.
const HEAD_WORD: usize = 1024 / 8;
const TAIL_WORD: usize = HEAD_WORD + 1;

/// `struct perf_event_attr`, as much as every kernel knows (`PERF_ATTR_SIZE_VER0`).
#[repr(C)]
#[derive(Default)]
struct Attribute {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_watermark: u32,
    breakpoint_kind: u32,
    config1: u64,
}

/// A page fault that was answered: what the thread's own count of minor or major faults went up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The process, as our pid namespace names it.
    pub pid: i32,
    pub address: u64,
}

/// A ring into which the kernel writes the page faults of threads, as long as they run on one core.
#[derive(Debug)]
pub struct FaultRing {
    core: i32,
    event: OwnedFd,
    /// An event of the thread that made the ring, which tells nothing.
    _first: OwnedFd,
    words: NonNull<AtomicU64>,
    data_words: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is read through `&mut self`.
unsafe impl Send for FaultRing {}

impl FaultRing {
    /// Makes a ring of `data_pages` pages, a power of two, for faults on `core`. What finds no room
    /// in it is dropped.
    ///
    /// The first event of any thread on the machine waits until every processor has passed through
    /// the scheduler (kernel/events/core.c, `account_event`), some milliseconds. This is where that
    /// is done; [`FaultRing::follow`] waits for nothing.
    pub fn open(core: usize, data_pages: usize) -> io::Result<FaultRing> {
        let core = i32::try_from(core).map_err(|_| io::ErrorKind::InvalidInput)?;
        let length = (1 + data_pages) * PAGE_BYTES;
        let first = open_event(PERF_COUNT_SW_DUMMY, 0, -1, 0)?;
        let event = open_event(PERF_COUNT_SW_DUMMY, -1, core, 0)?;
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(address.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(FaultRing {
            core,
            event,
            _first: first,
            words,
            data_words: data_pages * PAGE_BYTES / WORD_BYTES as usize,
        })
    }

    /// Follows thread `tid` (0: the caller) and all threads and processes that it will make, until the descriptors
    /// are closed. It may run meanwhile; what it did before this returns may be missing.
    pub fn follow(&self, tid: i32) -> io::Result<[OwnedFd; 2]> {
        let follow = |config| {
            let event = open_event(config, tid, self.core, INHERIT)?;
            // SAFETY: an ioctl with a number for its argument.
            let result = unsafe {
                libc::ioctl(
                    event.as_raw_fd(),
                    PERF_EVENT_IOC_SET_OUTPUT,
                    self.event.as_raw_fd(),
                )
            };
            match result {
                0 => Ok(event),
                _ => Err(io::Error::last_os_error()),
            }
        };
        Ok([
            follow(PERF_COUNT_SW_PAGE_FAULTS_MIN)?,
            follow(PERF_COUNT_SW_PAGE_FAULTS_MAJ)?,
        ])
    }

    /// Takes the faults that were told since the last call, in their order.
    ///
    /// # Errors
    /// `InvalidData` when the ring holds what no kernel writes; it is empty then, too.
    pub fn take(&mut self, mut each: impl FnMut(PageFault)) -> io::Result<()> {
        let head = self.word(HEAD_WORD).load(Ordering::Acquire);
        let mut position = self.word(TAIL_WORD).load(Ordering::Relaxed);
        let mut sane = true;
        while position != head {
            let header = self.data(position);
            let (kind, bytes) = (header as u32, header >> 48);
            sane = bytes >= WORD_BYTES
                && bytes.is_multiple_of(WORD_BYTES)
                && bytes <= head.wrapping_sub(position);
            if !sane {
                break;
            }
            if kind == PERF_RECORD_SAMPLE {
                each(PageFault {
                    pid: self.data(position + WORD_BYTES) as u32 as i32,
                    address: self.data(position + 2 * WORD_BYTES),
                });
            }
            position += bytes;
        }
        self.word(TAIL_WORD).store(head, Ordering::Release);
        match sane {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The word of the data at `position`, which counts bytes from the beginning of time.
    fn data(&self, position: u64) -> u64 {
        let index = (position / WORD_BYTES) as usize & (self.data_words - 1);
        let first = PAGE_BYTES / WORD_BYTES as usize;
        self.word(first + index).load(Ordering::Relaxed)
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE_BYTES / WORD_BYTES as usize + self.data_words);
        // SAFETY: inside the mapping, which lives as long as `self`, and aligned; any bit pattern
        // is a u64.
        unsafe { self.words.add(index).as_ref() }
    }
}

impl Drop for FaultRing {
    fn drop(&mut self) {
        let length = PAGE_BYTES + self.data_words * WORD_BYTES as usize;
        // SAFETY: exactly the range that `open` made; no reference to it outlives `self`.
        unsafe { libc::munmap(self.words.as_ptr().cast(), length) };
    }
}

/// An event of every occurrence, of thread `tid` (0: the caller; -1: of all) on `core` (-1: any).
fn open_event(config: u64, tid: i32, core: i32, flags: u64) -> io::Result<OwnedFd> {
    let attribute = Attribute {
        kind: PERF_TYPE_SOFTWARE,
        size: size_of::<Attribute>() as u32,
        config,
        sample_period: 1,
        sample_type: PERF_SAMPLE_TID | PERF_SAMPLE_ADDR,
        flags: WATERMARK | flags,
        // Nobody waits for it.
        wakeup_watermark: u32::MAX,
        ..Attribute::default()
    };
    // SAFETY: the block lives through the call and has the size that it says.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attribute,
            tid,
            core,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel gave this number to us just now.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::affinity;

    /// Touches pages that nobody has touched before, and says where.
    fn touch(pages: usize) -> std::ops::Range<u64> {
        let length = pages * PAGE_BYTES;
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let address = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0)
        };
        assert_ne!(address, libc::MAP_FAILED);
        // SAFETY: the mapping that was just made; one page at a time is to be faulted in.
        unsafe { libc::madvise(address, length, libc::MADV_NOHUGEPAGE) };
        for page in 0..pages {
            // SAFETY: inside the mapping that was just made, and nobody else knows of it.
            unsafe {
                address
                    .cast::<u8>()
                    .add(page * PAGE_BYTES)
                    .write_volatile(1);
            }
        }
        address as u64..address as u64 + length as u64
    }

    #[test]
    fn every_fault_of_a_followed_thread_and_of_those_it_makes_is_told() {
        let cores = affinity::cores(0).unwrap();
        affinity::bind(0, &cores[..1]).unwrap();
        let mut ring = FaultRing::open(cores[0], 16).unwrap();
        let _events = ring.follow(0).unwrap();
        let touched = [touch(100), std::thread::spawn(|| touch(50)).join().unwrap()];
        let mut told = Vec::new();
        ring.take(|fault| told.push(fault)).unwrap();
        for (range, pages) in touched.iter().zip([100, 50]) {
            let of_range = told.iter().filter(|fault| range.contains(&fault.address));
            assert_eq!(of_range.count(), pages);
        }
        assert!(
            told.iter()
                .all(|fault| fault.pid == std::process::id() as i32)
        );
        let mut again = 0;
        ring.take(|_| again += 1).unwrap();
        // More than the ring has room for, and it goes on afterwards.
        touch(5000);
        ring.take(|_| again += 1).unwrap();
        assert!((2000..3000).contains(&again), "{again}");
        let range = touch(10);
        let mut last = Vec::new();
        ring.take(|fault| last.push(fault.address)).unwrap();
        assert_eq!(last.iter().filter(|at| range.contains(at)).count(), 10);
    }
}
