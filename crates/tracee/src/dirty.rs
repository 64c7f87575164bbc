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

use crate::host::{HostPid, HostTid};
use crate::{Stopped, TraceError, blob};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use unbroken_image::{AddressRange, Backing, Mapping, PAGE_SIZE, PageRun, Sharing};
use unbroken_sys::pagemap::{self, Filter, Region};
use unbroken_sys::{memory, uffd};

/// Where user space ends on x86-64 with four-level page tables, which mappings without an address
/// hint beyond it never pass (Documentation/arch/x86/x86_64/5level-paging.rst).
const END_OF_USER_SPACE: u64 = 0x7fff_ffff_f000;
/// Everything that a process can have.
pub const USER_SPACE: AddressRange = AddressRange {
    start: 0,
    end: END_OF_USER_SPACE,
};
/// Regions taken from the kernel at once.
const REGIONS_PER_CALL: usize = 512;

/// Follows the writes to one address space. A fork's child and a new program need their own.
pub struct DirtyTracker {
    host_pid: HostPid,
    userfault: OwnedFd,
    scanner: Scanner,
    regions: Vec<Region>,
    file_regions: Vec<Region>,
    /// A written page was on its way between two places when it was to be protected.
    unsettled: bool,
}

impl DirtyTracker {
    /// Makes the userfaultfd in the process of thread `tid` (which needs the blob), takes it and
    /// closes it there. Nothing is tracked yet: [`DirtyTracker::register`].
    pub fn install(stopped: &mut Stopped<'_>, tid: HostTid) -> Result<DirtyTracker, TraceError> {
        let (process, _) = stopped.thread(tid).ok_or(TraceError::gone(tid))?;
        let host_pid = process.host_pid;
        let userfault = stopped.take_userfault(tid, host_pid)?;
        uffd::enable_write_tracking(userfault.as_fd())
            .map_err(TraceError::of_thread("enable write tracking", tid))?;
        let path = format!("/proc/{host_pid}/pagemap");
        let pagemap = File::open(&path).map_err(|source| TraceError::Proc { path, source })?;
        let mut regions = vec![Region::default(); REGIONS_PER_CALL];
        let scanner = Scanner::new(pagemap, &mut regions);
        let file_regions = regions.clone();
        Ok(DirtyTracker {
            host_pid,
            userfault,
            scanner,
            regions,
            file_regions,
            unsettled: false,
        })
    }

    /// Starts to track `mapping`, or the part of it inside `range`. Returns false for what the
    /// kernel cannot track: its own pages, and files that are mapped shared and cannot be written
    /// through the mapping. What is present counts as written.
    ///
    /// Registration is lost with the mapping: it is needed again for everything that
    /// [`crate::memory_map::changed_ranges`] returns and for what was unmapped and mapped again.
    pub fn register(&self, mapping: &Mapping, range: AddressRange) -> Result<bool, TraceError> {
        if is_of_the_kernel(&mapping.backing) {
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
    /// `map` is the current memory map. Appends runs to `pages`, ascending. A page that is in no
    /// mapping of `map` (a stack grew) is among them.
    pub fn scan(&mut self, map: &[Mapping], pages: &mut Vec<PageRun>) -> Result<(), TraceError> {
        self.find(Selection::Written, map, USER_SPACE, pages)
    }

    /// As [`DirtyTracker::scan`], but looks only at `ranges`, which ascend.
    pub fn scan_ranges(
        &mut self,
        map: &[Mapping],
        ranges: &[AddressRange],
        pages: &mut Vec<PageRun>,
    ) -> Result<(), TraceError> {
        for range in ranges {
            self.find(Selection::Written, map, *range, pages)?;
        }
        Ok(())
    }

    /// Finds every page of `range` that holds anything, written or not, and starts over for those
    /// that are tracked. Appends runs to `pages`, ascending.
    pub fn scan_present(
        &mut self,
        map: &[Mapping],
        range: AddressRange,
        pages: &mut Vec<PageRun>,
    ) -> Result<(), TraceError> {
        // First the marks, then the list: what is written in between (by a service that is not
        // stopped) is then both in the list and marked.
        let mut start = range.start;
        while start < range.end {
            let rest = AddressRange {
                start,
                end: range.end,
            };
            let scanned = self
                .scanner
                .scan(Selection::Written, rest, &mut self.regions);
            let (count, reached) = scanned.map_err(self.error("scan the page tables"))?;
            self.note_unsettled(count);
            start = reached;
        }
        // The blob is in no image.
        let below = AddressRange {
            start: range.start,
            end: range.end.min(blob::RANGE.start),
        };
        let above = AddressRange {
            start: range.start.max(blob::RANGE.end),
            end: range.end,
        };
        self.find(Selection::Present, map, below, pages)?;
        self.find(Selection::Present, map, above, pages)
    }

    /// Whether a scan since the last call has met a written page that was not there: one that the
    /// kernel is just moving becomes writable again as it was, unprotected (mm/migrate.c,
    /// `remove_migration_pte`), and its next write is no page fault. The next scan finds it.
    pub fn take_unsettled(&mut self) -> bool {
        std::mem::take(&mut self.unsettled)
    }

    /// As [`DirtyTracker::take_unsettled`], which still is to be called.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// Whether the process has pages of its own in `range`, in the place of those that were mapped
    /// there.
    pub fn has_own_pages(&mut self, range: AddressRange) -> Result<bool, TraceError> {
        // The kernel makes room for as many as it may return: 1 us for one, 2 us for all.
        let first = &mut self.regions[..1];
        let scanned = self.scanner.scan(Selection::PresentOfProcess, range, first);
        let (count, _) = scanned.map_err(self.error("scan the page tables"))?;
        Ok(count > 0)
    }

    /// Finds the guard regions in `range` and appends them to `guards`, ascending.
    pub fn scan_guards(
        &mut self,
        range: AddressRange,
        guards: &mut Vec<AddressRange>,
    ) -> Result<(), TraceError> {
        if self.scanner.skipped == 0 {
            return Ok(());
        }
        let mut start = range.start;
        // The kernel's own page above is no place to look at.
        let end = range.end.min(END_OF_USER_SPACE);
        while start < end {
            let rest = AddressRange { start, end };
            let scanned = self.scanner.scan(Selection::Guard, rest, &mut self.regions);
            let (count, reached) = scanned.map_err(self.error("scan for guard regions"))?;
            guards.extend(self.regions[..count].iter().map(|region| AddressRange {
                start: region.start,
                end: region.end,
            }));
            start = reached;
        }
        Ok(())
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

    fn note_unsettled(&mut self, count: usize) {
        let mut found = self.regions[..count].iter();
        self.unsettled |= found.any(|region| region.categories & pagemap::SWAPPED != 0);
    }

    fn error(&self, operation: &'static str) -> impl FnOnce(io::Error) -> TraceError {
        TraceError::of_thread(operation, HostTid(self.host_pid.0))
    }

    fn find(
        &mut self,
        selection: Selection,
        map: &[Mapping],
        range: AddressRange,
        pages: &mut Vec<PageRun>,
    ) -> Result<(), TraceError> {
        let mut start = range.start;
        let mut rest = map;
        while start < range.end {
            let part = AddressRange {
                start,
                end: range.end,
            };
            let scanned = self.scanner.scan(selection, part, &mut self.regions);
            let (count, reached) = scanned.map_err(self.error("scan the page tables"))?;
            if matches!(selection, Selection::Written) {
                self.note_unsettled(count);
            }
            for region in &self.regions[..count] {
                // Reads as zero, and there is nothing in the replica either.
                if region.categories & pagemap::ZERO_PAGE == 0 {
                    let found = AddressRange {
                        start: region.start,
                        end: region.end,
                    };
                    self.scanner
                        .add(found, &mut rest, &mut self.file_regions, pages)
                        .map_err(self.error("scan the page tables"))?;
                }
            }
            start = reached;
        }
        Ok(())
    }
}

/// Which pages a scan is for.
#[derive(Clone, Copy)]
enum Selection {
    /// Written since the last such scan; starts over.
    Written,
    Present,
    /// Present and not a page of the file that is mapped.
    PresentOfProcess,
    Guard,
}

/// The scans of one process.
struct Scanner {
    pagemap: File,
    /// Categories that keep a page out of the answer: guard regions, where the kernel knows them.
    skipped: u64,
}

impl Scanner {
    fn new(pagemap: File, regions: &mut [Region]) -> Scanner {
        let mut scanner = Scanner {
            pagemap,
            skipped: pagemap::GUARD,
        };
        // A kernel that does not know guard regions has none.
        if scanner
            .scan(Selection::Present, blob::RANGE, regions)
            .is_err()
        {
            scanner.skipped = 0;
        }
        scanner
    }

    /// Fills `regions`; returns how many were found and how far the scan came.
    fn scan(
        &self,
        selection: Selection,
        range: AddressRange,
        regions: &mut [Region],
    ) -> io::Result<(usize, u64)> {
        let AddressRange { start, end } = range;
        // WRITTEN alone would put markers on all that was never populated (KERNEL.md, Markers).
        // FILE is asked for only where it matters: it makes the kernel touch the descriptor of
        // every page, five times as slow (20 MB: 250 us against 50).
        let filter = Filter {
            all_of: match selection {
                Selection::Written => pagemap::WP_ALLOWED | pagemap::WRITTEN,
                Selection::Present | Selection::PresentOfProcess => 0,
                Selection::Guard => pagemap::GUARD,
            },
            none_of: match selection {
                Selection::Written | Selection::Present => self.skipped,
                Selection::PresentOfProcess => self.skipped | pagemap::FILE,
                Selection::Guard => 0,
            },
            any_of: match selection {
                Selection::Guard => 0,
                _ => pagemap::PRESENT | pagemap::SWAPPED,
            },
            returned: pagemap::ZERO_PAGE | pagemap::SWAPPED,
            protect: matches!(selection, Selection::Written),
        };
        let (count, reached) = pagemap::scan(self.pagemap.as_fd(), start, end, &filter, regions)?;
        // An answer without progress would be asked for again for ever.
        Ok((count, if reached > start { reached } else { end }))
    }

    /// Adds a range that was found to `pages`, without the unmodified file pages of private
    /// mappings. Ranges come in ascending order; `map` is what of the map is left for them.
    fn add(
        &self,
        range: AddressRange,
        map: &mut &[Mapping],
        regions: &mut [Region],
        pages: &mut Vec<PageRun>,
    ) -> io::Result<()> {
        while map
            .first()
            .is_some_and(|next| next.range.end <= range.start)
        {
            *map = &map[1..];
        }
        let mut start = range.start;
        for mapping in map
            .iter()
            .take_while(|mapping| mapping.range.start < range.end)
        {
            let is_private_file = mapping.sharing == Sharing::Private
                && matches!(mapping.backing, Backing::File { .. });
            let is_left_out = is_of_the_kernel(&mapping.backing);
            if let Some(part) = mapping.range.intersection(range)
                && (is_private_file || is_left_out)
            {
                push(
                    pages,
                    AddressRange {
                        start,
                        end: part.start,
                    },
                );
                if is_private_file {
                    self.add_of_process(part, regions, pages)?;
                }
                start = part.end;
            }
        }
        push(
            pages,
            AddressRange {
                start,
                end: range.end,
            },
        );
        Ok(())
    }

    fn add_of_process(
        &self,
        range: AddressRange,
        regions: &mut [Region],
        pages: &mut Vec<PageRun>,
    ) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let rest = AddressRange {
                start,
                end: range.end,
            };
            let (count, reached) = self.scan(Selection::PresentOfProcess, rest, regions)?;
            for region in &regions[..count] {
                push(
                    pages,
                    AddressRange {
                        start: region.start,
                        end: region.end,
                    },
                );
            }
            start = reached;
        }
        Ok(())
    }
}

fn is_of_the_kernel(backing: &Backing) -> bool {
    matches!(backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall)
}

/// Appends a range, joined with the last run where it continues that.
fn push(pages: &mut Vec<PageRun>, range: AddressRange) {
    if range.start >= range.end {
        return;
    }
    match pages.last_mut() {
        Some(last) if last.address + last.count * PAGE_SIZE == range.start => {
            last.count += range.pages();
        }
        _ => pages.push(PageRun {
            address: range.start,
            count: range.pages(),
        }),
    }
}

/// Copies `pages` of a process into `destination`. `memory` is its `/proc/PID/mem`, which also
/// reads what the process itself may not (PROT_NONE).
fn read_pages(
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
