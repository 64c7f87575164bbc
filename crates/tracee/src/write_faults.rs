//! Where a process may have written, heard as it writes: so that memory that nobody touched need
//! not be scanned.
//!
//! A page that a scan has write-protected ([`crate::DirtyTracker`]) is written again only through a
//! page fault, and the kernel tells of each with its address. Not of all: one that the kernel takes
//! upon itself on behalf of a call (`get_user_pages`: `MAP_POPULATE`, a futex with an operation) is
//! counted for the thread and told to nobody (mm/memory.c, `mm_account_fault`), nor is one on
//! another core, or one for which the ring had no room. So the process's own count is compared with
//! what was heard, and when they differ everything has to be scanned.
//!
//! A fault may fill a whole huge page, so what is heard stands for the block of that size.

use crate::host::HostPid;
use crate::thread::Process;
use crate::{HostTid, TraceError};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use unbroken_image::AddressRange;
pub use unbroken_sys::page_faults::FaultRing;
use unbroken_sys::process;

/// The size of a huge page.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Room for some 43,000 faults between two looks.
const RING_PAGES: usize = 256;
/// What part of the descriptors that we may have listening may take.
const DESCRIPTORS_PART: u64 = 4;

/// Listens for the page faults of one process.
pub struct WriteFaults {
    host_pid: HostPid,
    ring: FaultRing,
    /// They end with their descriptors.
    _events: Vec<[OwnedFd; 2]>,
    statistics: File,
    /// What the kernel had counted at the last look; none while that is not to be trusted.
    counted: Option<u64>,
    blocks: Vec<u64>,
    written: Vec<AddressRange>,
}

impl WriteFaults {
    /// Makes what [`WriteFaults::follow`] needs for a process on `core`. Takes milliseconds, so
    /// that it is not to be done while the process is stopped.
    pub fn prepare(core: usize) -> Result<FaultRing, TraceError> {
        FaultRing::open(core, RING_PAGES).map_err(TraceError::of_tracer("listen for page faults"))
    }

    /// Begins to listen for faults of `process`, which is stopped.
    ///
    /// # Errors
    /// Also when it has so many threads that our own descriptors, two for each, would become scarce.
    pub fn follow(process: &Process, ring: FaultRing) -> Result<WriteFaults, TraceError> {
        let failed = TraceError::of_tracer;
        let (limit, _) = process::limit(0, libc::RLIMIT_NOFILE)
            .map_err(failed("read our limit of open files"))?;
        let needed = 2 * process.threads().len() as u64;
        if needed > limit / DESCRIPTORS_PART {
            let text =
                format!("it would take {needed} descriptors of the {limit} that we may have");
            return Err(failed("listen for page faults")(io::Error::other(text)));
        }
        let follow = |tid: HostTid| {
            let events = ring.follow(tid.0);
            events.map_err(TraceError::of_thread("listen for page faults", tid))
        };
        let events: Result<Vec<_>, _> = process
            .threads()
            .map(|thread| follow(thread.host_tid))
            .collect();
        let path = format!("/proc/{}/stat", process.host_pid);
        let statistics = File::open(&path).map_err(|source| TraceError::Proc { path, source })?;
        Ok(WriteFaults {
            host_pid: process.host_pid,
            _events: events?,
            ring,
            statistics,
            counted: None,
            blocks: Vec::new(),
            written: Vec::new(),
        })
    }

    /// Where `process`, which is stopped, may have written since the last call, as blocks in
    /// ascending order; `None` when that is not known: at first, when not all was heard, and once
    /// more after that. Then every page that can be written has to be looked at.
    pub fn take(&mut self, process: &Process) -> Result<Option<&[AddressRange]>, TraceError> {
        let (mut heard, mut is_alone) = (0, true);
        self.blocks.clear();
        // What we wrote was a page fault of ours.
        let mut corrected = process.corrected.borrow_mut();
        match corrected.take() {
            Some(pages) => self.blocks.extend(pages.map(|page| page / BLOCK_BYTES)),
            None => is_alone = false,
        }
        self.ring
            .take(|fault| {
                heard += 1;
                // A child that shares the memory, whose silent faults nobody counts.
                is_alone &= fault.pid == self.host_pid.0;
                let block = fault.address / BLOCK_BYTES;
                if self.blocks.last() != Some(&block) {
                    self.blocks.push(block);
                }
            })
            .map_err(TraceError::of_tracer("hear of page faults"))?;
        // The kernel counts before it tells, so what has been told was counted, too.
        let failed = TraceError::of_thread("count the page faults", HostTid(self.host_pid.0));
        let counted = fault_count(&self.statistics).map_err(failed)?;
        let Some(before) = self.counted.replace(counted) else {
            return Ok(None);
        };
        if !is_alone || counted.wrapping_sub(before) != heard {
            // A thread on its way out may be between the two: what it tells late must not make up
            // for what somebody does not tell.
            self.counted = None;
            return Ok(None);
        }
        self.blocks.sort_unstable();
        self.written.clear();
        for block in &self.blocks {
            let start = block * BLOCK_BYTES;
            let end = start + BLOCK_BYTES;
            match self.written.last_mut() {
                Some(last) if last.end >= start => last.end = end,
                _ => self.written.push(AddressRange { start, end }),
            }
        }
        Ok(Some(&self.written))
    }
}

/// The minor and major faults of all threads that a process has had; of `/proc/PID/stat`
/// (proc_pid_stat(5)).
fn fault_count(statistics: &File) -> io::Result<u64> {
    let mut text = [0; 1024];
    let length = statistics.read_at(&mut text, 0)?;
    parse_fault_count(&text[..length]).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_fault_count(text: &[u8]) -> Option<u64> {
    // The name before it may hold anything.
    let name_end = text.iter().rposition(|byte| *byte == b')')?;
    let mut fields = text[name_end + 1..].split(|byte| *byte == b' ').skip(1);
    let number = |field: &[u8]| str::from_utf8(field).ok()?.parse::<u64>().ok();
    let minor = number(fields.nth(10 - 3)?)?;
    let major = number(fields.nth(12 - 10 - 1)?)?;
    Some(minor.wrapping_add(major))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_both_kinds_are_counted_whatever_the_name() {
        let text = b"7 (a ) S 1 2 3) S 1 2 3 4 5 6 700 8 90 10 11";
        assert_eq!(parse_fault_count(text), Some(790));
        assert_eq!(parse_fault_count(b"7 (a) S 1"), None);
        assert_eq!(parse_fault_count(b""), None);
    }

    #[test]
    fn fuzz_fault_count() {
        let stat = "7 (a ) S 1 2 3) S 1 2 3 4 5 6 700 8 90 10 11";
        unbroken_fuzz::text("proc-stat", &[stat], |text| {
            let _ = parse_fault_count(text.as_bytes());
        });
    }
}
