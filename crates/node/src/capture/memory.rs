//! The memory of one process in an epoch: the map when calls may have changed it, and the pages
//! that were written.

use super::CaptureError;
use super::announcements::PendingChanges;
use super::references::References;
use super::write_fault_listener::WriteFaultListener;
use std::sync::Arc;
use unbroken_image::{
    AddressRange, Advice, Backing, Mapping, MemoryDelta, PAGE_SIZE, PageRun, Sharing,
};
use unbroken_sys::fdinfo::ProcessDirectory;
use unbroken_tracee::dirty::{DirtyTracker, USER_SPACE};
use unbroken_tracee::memory_map::{self, MapReader};
use unbroken_tracee::{HostTid, Process, Stopped, shared_content};

/// How far below its known start a stack is looked for: it grows by page faults, which nobody
/// announces. The default of `ulimit -s` for the main thread.
const STACK_GROWTH_BYTES: u64 = 8 << 20;

/// A capture takes the marks of written pages away before they are safe anywhere, and one that
/// fails does not give them back: it spoils its link ([`super::Link`]), after which the standby
/// gets either the order to take over from the epoch before or, with a new `Memory`, everything.
pub(super) struct Memory {
    tracker: DirtyTracker,
    reader: MapReader,
    map: Vec<Mapping>,
    /// `map` with room for stacks to grow into: what scans go by.
    scanned: Vec<Mapping>,
    /// The parts of `scanned` that change without an announced call.
    volatile: Vec<AddressRange>,
    listener: WriteFaultListener,
    /// Somebody may write past the protection of pages (`/proc/PID/mem`).
    unprotected: bool,
    /// The map before the last reading.
    before: Vec<Mapping>,
    changed: Vec<AddressRange>,
    /// Parts of shared memory that calls have let go of, in mappings that stay.
    released: Vec<AddressRange>,
    /// The pages of the capture at hand; kept for its room.
    pages: Vec<PageRun>,
}

impl Memory {
    /// Begins to follow the memory of `process`, one of whose threads is `tid`; everything counts
    /// as written.
    pub fn install(
        stopped: &mut Stopped<'_>,
        tid: HostTid,
        listener: WriteFaultListener,
        references: &mut References,
    ) -> Result<Memory, CaptureError> {
        let tracker = DirtyTracker::install(stopped, tid)?;
        let (process, _) = stopped.thread(tid).ok_or(CaptureError::ProcessGone)?;
        let mut memory = Memory {
            tracker,
            reader: MapReader::default(),
            map: Vec::new(),
            scanned: Vec::new(),
            volatile: Vec::new(),
            listener,
            unprotected: false,
            before: Vec::new(),
            changed: Vec::new(),
            released: Vec::new(),
            pages: Vec::new(),
        };
        memory.reader.survey(process, &mut memory.map)?;
        memory.refer(process, references)?;
        memory.make_room_for_stacks();
        memory.refuse_own_vdso()?;
        memory.register_all()?;
        Ok(memory)
    }

    pub fn map(&self) -> &[Mapping] {
        &self.map
    }

    /// Finds what was written since the last scan while the service runs, and at first all that
    /// shared memory holds. Pages of mappings that came since the map was read wait for the epoch.
    pub fn scan_running(
        &mut self,
        process: &Process,
        is_first: bool,
        pages: &mut Vec<PageRun>,
    ) -> Result<(), CaptureError> {
        pages.clear();
        self.tracker.scan(&self.map, pages)?;
        if is_first {
            shared_content::add_shared_pages(process, &self.map, pages)?;
        }
        Ok(())
    }

    /// The guard regions of the whole map.
    pub fn guards(&mut self) -> Result<Vec<AddressRange>, CaptureError> {
        let mut guards = Vec::new();
        for mapping in &self.map {
            self.tracker.scan_guards(mapping.range, &mut guards)?;
        }
        Ok(guards)
    }

    pub fn tracker(&self) -> &DirtyTracker {
        &self.tracker
    }

    /// The memory part of an epoch, without content. `whole_map` puts the map in even if nothing
    /// changed in it.
    pub fn capture(
        &mut self,
        process: &Process,
        pending: &mut PendingChanges,
        whole_map: bool,
        references: &mut References,
    ) -> Result<MemoryDelta, CaptureError> {
        let mut delta = MemoryDelta::default();
        self.pages.clear();
        if pending.map || pending.everything || whole_map {
            self.read_map(process, pending, &mut delta)?;
            self.refer(process, references)?;
        }
        // What was writable until a moment ago may have been written until then.
        let map_changed = pending.map || pending.everything || whole_map;
        let is_whole = map_changed || pending.files_opened || self.unprotected;
        let ranges = match is_whole {
            true => &[USER_SPACE][..],
            false => &self.volatile,
        };
        let in_doubt = pending.everything || self.tracker.take_unsettled();
        let targets = self.listener.narrow(process, ranges, in_doubt)?;
        self.tracker
            .scan_ranges(&self.scanned, targets, &mut self.pages)?;
        self.listener.scanned();
        if is_whole {
            self.refuse_own_vdso()?;
        }
        if self.a_stack_grew() {
            self.read_map(process, pending, &mut delta)?;
        }
        self.add_present_of(&delta.voided)?;
        self.add_released();
        for range in &delta.voided {
            self.tracker.scan_guards(*range, &mut delta.guards)?;
        }
        delta.pages.clone_from(&self.pages);
        if self.listener.verify {
            self.verify_silence()?;
        }
        Ok(delta)
    }

    /// Has references opened to the files that are mapped now.
    fn refer(&self, process: &Process, references: &mut References) -> Result<(), CaptureError> {
        for (file, AddressRange { start, end }) in self.reader.files() {
            references.need(*file, || {
                let process = ProcessDirectory::open(process.host_pid.0)?;
                process.mapped_file(*start, *end).map(Arc::new)
            })?;
        }
        Ok(())
    }

    fn read_map(
        &mut self,
        process: &Process,
        pending: &mut PendingChanges,
        delta: &mut MemoryDelta,
    ) -> Result<(), CaptureError> {
        std::mem::swap(&mut self.map, &mut self.before);
        if pending.advice || self.advice_is_in_doubt(&pending.voided) {
            self.reader.survey(process, &mut self.map)?;
        } else {
            self.reader.read(process, &self.before, &mut self.map)?;
        }
        memory_map::changed_ranges(&self.before, &self.map, &mut self.changed);
        for range in &pending.voided {
            self.release(*range);
        }
        for range in pending.voided.drain(..) {
            memory_map::insert_range(&mut self.changed, range);
        }
        if let Some(end) = pending.lowest_break.take() {
            self.void_heap_above(end);
        }
        for range in &self.changed {
            memory_map::insert_range(&mut delta.voided, *range);
        }
        let changed = std::mem::take(&mut self.changed);
        for range in &changed {
            self.register(*range)?;
        }
        self.changed = changed;
        if delta.mappings.is_some() || self.map != self.before || !delta.voided.is_empty() {
            delta.mappings = Some(self.map.clone());
        }
        self.make_room_for_stacks();
        Ok(())
    }

    /// A call has replaced, moved or emptied memory that had advice or was locked. Between surveys
    /// a mapping is taken to have the advice of what was at its place before, which is wrong for
    /// one that only came to lie there, and a lock that nobody asked for can fail a takeover.
    fn advice_is_in_doubt(&self, voided: &[AddressRange]) -> bool {
        let mut advised = self
            .before
            .iter()
            .filter(|mapping| mapping.advice.without_hints() != Advice::default());
        advised.any(|mapping| {
            let mut ranges = voided.iter();
            ranges.any(|range| range.intersection(mapping.range).is_some())
        })
    }

    /// Shared memory keeps its content when a mapping of it lets go of pages (`MADV_DONTNEED`),
    /// and loses it for all by `MADV_REMOVE`. Page tables show neither any more.
    fn release(&mut self, range: AddressRange) {
        let parts = self
            .map
            .iter()
            .filter(|mapping| matches!(mapping.backing, Backing::SharedMemory { .. }))
            .filter_map(|mapping| mapping.range.intersection(range));
        let stays = |part: &AddressRange| {
            let changed = self.changed.iter();
            let mut others = changed.filter(|changed| changed.intersection(*part).is_some());
            others.next().is_none()
        };
        let parts: Vec<AddressRange> = parts.filter(stays).collect();
        for part in parts {
            memory_map::insert_range(&mut self.released, part);
        }
    }

    /// What lay above a lowered end of the heap is void, also where the heap has grown again.
    fn void_heap_above(&mut self, end: u64) {
        let heaps = self
            .before
            .iter()
            .filter(|mapping| mapping.range.contains(end));
        for heap in heaps {
            let range = AddressRange {
                start: end,
                end: heap.range.end,
            };
            memory_map::insert_range(&mut self.changed, range);
        }
    }

    fn register_all(&mut self) -> Result<(), CaptureError> {
        for mapping in &self.map {
            self.tracker.register(mapping, mapping.range)?;
        }
        Ok(())
    }

    fn register(&self, range: AddressRange) -> Result<(), CaptureError> {
        for mapping in self
            .map
            .iter()
            .filter(|mapping| mapping.range.intersection(range).is_some())
        {
            self.tracker.register(mapping, range)?;
        }
        Ok(())
    }

    fn make_room_for_stacks(&mut self) {
        self.scanned.clone_from(&self.map);
        let mut below = 0;
        for mapping in &mut self.scanned {
            if mapping.grows_down {
                let lowest = mapping.range.start.saturating_sub(STACK_GROWTH_BYTES);
                mapping.range.start = lowest.max(below).min(mapping.range.start);
            }
            below = mapping.range.end;
        }
        find_volatile(&self.scanned, &mut self.volatile);
        self.listener.map_changed(&self.scanned);
    }

    /// What takes time and can be done while the service runs.
    pub fn prepare(&mut self) {
        self.listener.prepare();
    }

    /// I7: that nothing was written where the scan at hand did not look.
    fn verify_silence(&mut self) -> Result<(), CaptureError> {
        // The next scan does not pass over anything.
        if self.tracker.is_unsettled() {
            return Ok(());
        }
        let mut missed = Vec::new();
        let passed_over = self.listener.passed_over();
        self.tracker
            .scan_ranges(&self.scanned, passed_over, &mut missed)?;
        match missed.first() {
            None => Ok(()),
            Some(PageRun { address, count }) => Err(CaptureError::Mirror(format!(
                "{count} pages at {address:#x} were written, and it was not heard"
            ))),
        }
    }

    /// A replica has the vDSO of its kernel, of which writes cannot be tracked: one that the service
    /// has written to, as programs do that catch calls there, would be another afterwards.
    fn refuse_own_vdso(&mut self) -> Result<(), CaptureError> {
        for mapping in &self.map {
            if mapping.backing == Backing::Vdso
                && (mapping.protection.write || self.tracker.has_own_pages(mapping.range)?)
            {
                let why = "the service writes to its vDSO, which a replica has from the kernel";
                return Err(CaptureError::Unfit(why.to_owned()));
            }
        }
        Ok(())
    }

    /// The service has the memory of a process open as a file. What it writes there needs no
    /// writable mapping, and no call of it is announced.
    pub fn expect_writes_anywhere(&mut self) {
        self.unprotected = true;
    }

    fn a_stack_grew(&self) -> bool {
        self.map
            .iter()
            .filter(|mapping| mapping.grows_down)
            .any(|stack| {
                self.pages.iter().any(|run| {
                    run.address < stack.range.start
                        && run.address >= stack.range.start.saturating_sub(STACK_GROWTH_BYTES)
                        && !self
                            .map
                            .iter()
                            .any(|mapping| mapping.range.contains(run.address))
                })
            })
    }

    /// Of released shared memory every page is news, there or not.
    fn add_released(&mut self) {
        if self.released.is_empty() {
            return;
        }
        cut_out(&mut self.pages, &self.released);
        let whole = self.released.drain(..).map(|range| PageRun {
            address: range.start,
            count: range.pages(),
        });
        self.pages.extend(whole);
        self.pages.sort_unstable_by_key(|run| run.address);
    }

    /// Of a void range everything that is there is news, written or not.
    fn add_present_of(&mut self, voided: &[AddressRange]) -> Result<(), CaptureError> {
        if voided.is_empty() {
            return Ok(());
        }
        cut_out(&mut self.pages, voided);
        for range in voided {
            self.tracker
                .scan_present(&self.scanned, *range, &mut self.pages)?;
        }
        self.pages.sort_unstable_by_key(|run| run.address);
        Ok(())
    }
}

/// Finds what can change without an announced call: everything but the text and constants of
/// programs and libraries, which are most of what a small service has resident. To look over a
/// few pages too many costs less than another call.
fn find_volatile(map: &[Mapping], ranges: &mut Vec<AddressRange>) {
    const PAGES_WORTH_A_CALL: u64 = 16;
    ranges.clear();
    let mut passed_pages = 0;
    for mapping in map {
        let is_constant = match mapping.backing {
            Backing::Vdso | Backing::Vvar | Backing::Vsyscall => true,
            Backing::File { .. } => {
                mapping.sharing == Sharing::Private && !mapping.protection.write
            }
            _ => false,
        };
        if is_constant {
            passed_pages += mapping.range.pages();
            continue;
        }
        match ranges.last_mut() {
            Some(last) if passed_pages <= PAGES_WORTH_A_CALL => last.end = mapping.range.end,
            _ => ranges.push(mapping.range),
        }
        passed_pages = 0;
    }
}

/// Takes `ranges` out of `pages`, so that no page stands twice.
fn cut_out(pages: &mut Vec<PageRun>, ranges: &[AddressRange]) {
    for range in ranges {
        for index in 0..pages.len() {
            let run = pages[index];
            let end = run.address + run.count * PAGE_SIZE;
            if run.address >= range.end || end <= range.start {
                continue;
            }
            let before = range.start.saturating_sub(run.address) / PAGE_SIZE;
            let after = end.saturating_sub(range.end) / PAGE_SIZE;
            pages[index].count = before;
            if after > 0 {
                pages.push(PageRun {
                    address: range.end,
                    count: after,
                });
            }
        }
        pages.retain(|run| run.count > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_image::{FileIdentity, Protection};

    #[test]
    fn constants_are_passed_over_and_small_ones_looked_at() {
        let mapping = |start: u64, pages: u64, write, is_file| Mapping {
            range: AddressRange {
                start,
                end: start + pages * PAGE_SIZE,
            },
            protection: Protection {
                read: true,
                write,
                execute: false,
            },
            sharing: Sharing::Private,
            backing: match is_file {
                false => Backing::Anonymous,
                true => Backing::File {
                    identity: FileIdentity {
                        device: 1,
                        inode: 2,
                    },
                    offset_bytes: 0,
                    writable: false,
                },
            },
            grows_down: false,
            advice: Advice::default(),
        };
        let map = [
            mapping(0x10_0000, 100, false, true),
            mapping(0x20_0000, 2, true, true),
            mapping(0x20_2000, 16, false, true),
            mapping(0x21_2000, 1, false, false),
            mapping(0x30_0000, 17, false, true),
            mapping(0x40_0000, 1, true, false),
        ];
        let mut ranges = Vec::new();
        find_volatile(&map, &mut ranges);
        let found: Vec<(u64, u64)> = ranges
            .iter()
            .map(|range| (range.start, range.end))
            .collect();
        assert_eq!(found, [(0x20_0000, 0x21_3000), (0x40_0000, 0x40_1000)]);
    }

    #[test]
    fn void_ranges_are_cut_out_of_runs() {
        let page = PAGE_SIZE;
        let mut pages = vec![
            PageRun {
                address: 0,
                count: 10,
            },
            PageRun {
                address: 20 * page,
                count: 2,
            },
        ];
        let ranges = [
            AddressRange {
                start: 2 * page,
                end: 4 * page,
            },
            AddressRange {
                start: 21 * page,
                end: 30 * page,
            },
        ];
        cut_out(&mut pages, &ranges);
        pages.sort_unstable_by_key(|run| run.address);
        let expected = [
            PageRun {
                address: 0,
                count: 2,
            },
            PageRun {
                address: 4 * page,
                count: 6,
            },
            PageRun {
                address: 20 * page,
                count: 1,
            },
        ];
        assert_eq!(pages, expected);
    }
}
