//! Which pages of a process were written since the last look, and their content.
//!
//! A userfaultfd of the service, of which only we keep a descriptor, write-protects every page it
//! can; the kernel lifts the protection at the first write by itself (`WP_ASYNC`), whoever writes,
//! and `PAGEMAP_SCAN` finds and renews it in one pass. The service never waits for us.
//!
//! **A failed epoch.** A scan takes the marks away before the pages are safe anywhere. Whoever
//! gives up an epoch between [`DirtyTracker::scan`] and its commit calls
//! [`DirtyTracker::mark_written`] with the runs of that epoch, or fills the standby anew from
//! [`DirtyTracker::scan_present`]; otherwise those pages are lost.
//!
//! What it does not see: a change of the page tables that writes nothing. `MADV_DONTNEED`,
//! unmapping and mapping again are announced by the calls that do it, and the caller then scans
//! what is present ([`DirtyTracker::scan_present`]). Pages that only read as zero are left out: the
//! replica has nothing there either. Shared memory and files changed by `write(2)` have no page
//! table; whoever replicates the file sees those.

use crate::thread::{HostPid, HostTid};
use crate::{Stopped, TraceError, blob};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use unbroken_image::{AddressRange, Backing, Mapping, PAGE_SIZE, PageRun, Sharing};
use unbroken_sys::pagemap::{self, Filter, Region};
use unbroken_sys::{memory, pidfd, uffd};

/// Where user space ends on x86-64 with four-level page tables, which mappings without an address
/// hint beyond it never pass (Documentation/arch/x86/x86_64/5level-paging.rst).
const END_OF_USER_SPACE: u64 = 0x7fff_ffff_f000;
/// Regions taken from the kernel at once.
const REGIONS_PER_CALL: usize = 512;

/// Follows the writes to one address space. A fork's child and a new program need their own.
pub struct DirtyTracker {
    host_pid: HostPid,
    userfault: OwnedFd,
    pagemap: File,
    regions: Vec<Region>,
    /// Categories that keep a page out of the answer: guard regions, where the kernel knows them.
    skipped: u64,
}

impl DirtyTracker {
    /// Makes the userfaultfd in the process of thread `tid` (which needs the blob), takes it and
    /// closes it there. Nothing is tracked yet: [`DirtyTracker::register`].
    pub fn install(stopped: &mut Stopped<'_>, tid: HostTid) -> Result<DirtyTracker, TraceError> {
        let mut batch = stopped.remote(tid);
        let create = batch.call(libc::SYS_userfaultfd, &[uffd::CREATE_FLAGS])?;
        let number = batch
            .run()?
            .get(create)
            .map_err(|source| TraceError::RemoteCall {
                call: "userfaultfd",
                tid,
                source,
            })?;
        let (process, _) = stopped.thread(tid).ok_or(TraceError::gone(tid))?;
        let host_pid = process.host_pid;
        let taken = pidfd::open(host_pid.0)
            .and_then(|process| pidfd::get_descriptor(process.as_fd(), number as i32));
        let mut batch = stopped.remote(tid);
        batch.call(libc::SYS_close, &[number])?;
        batch.run()?;
        let userfault = taken.map_err(TraceError::of_thread("take the userfaultfd", tid))?;
        uffd::enable_write_tracking(userfault.as_fd())
            .map_err(TraceError::of_thread("enable write tracking", tid))?;
        let path = format!("/proc/{host_pid}/pagemap");
        let pagemap = File::open(&path).map_err(|source| TraceError::Proc { path, source })?;
        let mut tracker = DirtyTracker {
            host_pid,
            userfault,
            pagemap,
            regions: vec![Region::default(); REGIONS_PER_CALL],
            skipped: pagemap::GUARD,
        };
        // A kernel that does not know guard regions has none.
        if tracker
            .scan_for(Tracked::Present, blob::RANGE, |_| ())
            .is_err()
        {
            tracker.skipped = 0;
        }
        Ok(tracker)
    }

    /// Starts to track `mapping`, or the part of it inside `range`. Returns false for what the
    /// kernel cannot track: its own pages, and files that are mapped shared and cannot be written
    /// through the mapping. What is present counts as written.
    ///
    /// Registration is lost with the mapping: it is needed again for everything that
    /// [`crate::memory_map::changed_ranges`] returns and for what was unmapped and mapped again.
    pub fn register(&self, mapping: &Mapping, range: AddressRange) -> Result<bool, TraceError> {
        if matches!(
            mapping.backing,
            Backing::Vdso | Backing::Vvar | Backing::Vsyscall
        ) {
            return Ok(false);
        }
        let Some(part) = mapping.range.intersection(range) else {
            return Ok(false);
        };
        match uffd::register(self.userfault.as_fd(), part.start, part.length_bytes()) {
            Ok(()) => Ok(true),
            // EPERM: a shared mapping that can never be made writable (VM_MAYWRITE is not set;
            // mm/userfaultfd.c). EINVAL: of a file system whose pages cannot be protected.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL))
                    && mapping.sharing == Sharing::Shared
                    && !mapping.protection.write =>
            {
                Ok(false)
            }
            Err(error) => Err(self.error("register write tracking")(error)),
        }
    }

    /// Finds the pages that were written since they were last returned, and starts over for them.
    /// `map` is the current memory map. Appends runs to `pages`, ascending.
    pub fn scan(&mut self, map: &[Mapping], pages: &mut Vec<PageRun>) -> Result<(), TraceError> {
        let whole = AddressRange {
            start: 0,
            end: END_OF_USER_SPACE,
        };
        let mut filter = RunFilter::new(map, pages);
        self.scan_for(Tracked::Written, whole, |region| filter.add(region))
    }

    /// Finds every page of `range` that holds anything, written or not, and starts over for those
    /// that are tracked.
    pub fn scan_present(
        &mut self,
        map: &[Mapping],
        range: AddressRange,
        pages: &mut Vec<PageRun>,
    ) -> Result<(), TraceError> {
        // First the marks, then the list: what is written in between (by a service that is not
        // stopped) is then both in the list and marked.
        self.scan_for(Tracked::Written, range, |_| ())?;
        let mut filter = RunFilter::new(map, pages);
        self.scan_for(Tracked::Present, range, |region| filter.add(region))
    }

    /// Makes `pages` count as written again: the epoch that carried them failed.
    pub fn mark_written(&self, pages: &[PageRun]) -> Result<(), TraceError> {
        for run in pages {
            let length = run.count * PAGE_SIZE;
            match uffd::mark_written(self.userfault.as_fd(), run.address, length) {
                // Unmapped since, or never tracked: then its range is announced as changed.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                result => result.map_err(self.error("mark pages as written"))?,
            }
        }
        Ok(())
    }

    /// Copies `pages` one after the other into `destination`, which is exactly as long.
    pub fn read_pages(
        &self,
        memory: &File,
        pages: &[PageRun],
        destination: &mut [u8],
    ) -> Result<(), TraceError> {
        read_pages(self.host_pid, memory, pages, destination)
            .map_err(self.error("copy written pages"))
    }

    fn error(&self, operation: &'static str) -> impl FnOnce(io::Error) -> TraceError {
        TraceError::of_thread(operation, HostTid(self.host_pid.0))
    }

    fn scan_for(
        &mut self,
        what: Tracked,
        range: AddressRange,
        mut found: impl FnMut(Region),
    ) -> Result<(), TraceError> {
        // WRITTEN alone would put markers on all that was never populated (HAZARDS 110).
        let filter = Filter {
            all_of: match what {
                Tracked::Written => pagemap::WP_ALLOWED | pagemap::WRITTEN,
                Tracked::Present => 0,
            },
            none_of: self.skipped,
            any_of: pagemap::PRESENT | pagemap::SWAPPED,
            returned: pagemap::FILE | pagemap::ZERO_PAGE,
            protect: matches!(what, Tracked::Written),
        };
        let AddressRange { mut start, end } = range;
        while start < end {
            let scanned =
                pagemap::scan(self.pagemap.as_fd(), start, end, &filter, &mut self.regions);
            let (count, reached) = scanned.map_err(|source| TraceError::Thread {
                operation: "scan the page tables",
                tid: HostTid(self.host_pid.0),
                source,
            })?;
            self.regions[..count].iter().copied().for_each(&mut found);
            if reached <= start {
                break;
            }
            start = reached;
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Tracked {
    Written,
    Present,
}

/// Leaves out what needs no copy, joins what is adjacent, and cuts at the blob.
struct RunFilter<'a> {
    map: &'a [Mapping],
    position: usize,
    pages: &'a mut Vec<PageRun>,
}

impl<'a> RunFilter<'a> {
    fn new(map: &'a [Mapping], pages: &'a mut Vec<PageRun>) -> Self {
        RunFilter {
            map,
            position: 0,
            pages,
        }
    }

    /// Takes one region of one set of categories; regions come in ascending order.
    fn add(&mut self, region: Region) {
        if region.categories & pagemap::ZERO_PAGE != 0 {
            return;
        }
        let range = AddressRange {
            start: region.start,
            end: region.end,
        };
        while self
            .map
            .get(self.position)
            .is_some_and(|next| next.range.end <= range.start)
        {
            self.position += 1;
        }
        // What no mapping covers is not in the image: the blob, or a mapping made after the map
        // was read, which will be news as a whole.
        for mapping in self.map[self.position..].iter() {
            if mapping.range.start >= range.end {
                break;
            }
            let is_unmodified_file = region.categories & pagemap::FILE != 0
                && mapping.sharing == Sharing::Private
                && matches!(mapping.backing, Backing::File { .. });
            let is_of_the_kernel = matches!(
                mapping.backing,
                Backing::Vdso | Backing::Vvar | Backing::Vsyscall
            );
            if is_unmodified_file || is_of_the_kernel {
                continue;
            }
            if let Some(part) = mapping.range.intersection(range) {
                self.push(part);
            }
        }
    }

    fn push(&mut self, range: AddressRange) {
        match self.pages.last_mut() {
            Some(last) if last.address + last.count * PAGE_SIZE == range.start => {
                last.count += range.pages();
            }
            _ => self.pages.push(PageRun {
                address: range.start,
                count: range.pages(),
            }),
        }
    }
}

/// Copies `pages` of a process into `destination`. `memory` is its `/proc/PID/mem`, which also
/// reads what the process itself may not (PROT_NONE).
pub fn read_pages(
    host_pid: HostPid,
    memory: &File,
    pages: &[PageRun],
    destination: &mut [u8],
) -> io::Result<()> {
    /// One call takes more (UIO_MAXIOV), but a small array on the stack does nearly as well: the
    /// copying dominates.
    const RANGES: usize = 64;
    let mut ranges = [memory::remote_range(0, 0); RANGES];
    let mut rest = destination;
    let mut runs = pages.iter();
    loop {
        let mut count = 0;
        let mut wanted = 0;
        let chunk = runs.as_slice();
        for (slot, run) in ranges.iter_mut().zip(&mut runs) {
            let length = (run.count * PAGE_SIZE) as usize;
            *slot = memory::remote_range(run.address, length);
            wanted += length;
            count += 1;
        }
        if count == 0 {
            return Ok(());
        }
        let (part, after) = rest
            .split_at_mut_checked(wanted)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOBUFS))?;
        let done = memory::read_ranges(host_pid.0, &ranges[..count], part);
        if !matches!(done, Ok(done) if done == wanted) {
            read_one_by_one(memory, &chunk[..count], part)?;
        }
        rest = after;
    }
}

fn read_one_by_one(memory: &File, pages: &[PageRun], destination: &mut [u8]) -> io::Result<()> {
    let mut rest = destination;
    for run in pages {
        let (part, after) = rest.split_at_mut((run.count * PAGE_SIZE) as usize);
        memory.read_exact_at(part, run.address)?;
        rest = after;
    }
    Ok(())
}
