//! Which parts of the memory a scan may pass over, because nobody wrote there since the last one.
//!
//! A scan costs about 1 ms for each GB of small pages that are there, written or not. Hearing of
//! each write costs the service under a microsecond at its first write to a page after an epoch, and
//! at each switch of threads; so it begins when scans have become long, and ends where they stay
//! so: where the service writes all over its memory, or in ways that are not heard.

use crate::clock::now_ns;
use unbroken_image::{AddressRange, Backing, Mapping, Sharing};
use unbroken_tracee::write_faults::{BLOCK_BYTES, FaultRing, WriteFaults};
use unbroken_tracee::{Process, TraceError};

/// A scan of everything that takes so long, so many times in a row, is worth to be avoided.
const LONG_SCAN_NS: u64 = 100_000;
const LONG_SCANS: u32 = 4;
/// When so many scans in a row have not become shorter by half, listening is in vain; it is tried
/// again after so many times as many long ones, and no more than so many.
const VAIN_SCANS: u32 = 16;
const PATIENCE_GROWTH: u32 = 8;
const PATIENCE_SCANS_MAX: u32 = 1024;
/// Mappings that are smaller are scanned whole: a call for each block would cost more.
const LARGE_MAPPING_BYTES: u64 = 16 << 20;

/// Whether listening is worth what it costs.
struct Worth {
    /// How many long scans of everything there must be in a row.
    patience_scans: u32,
    long_scans: u32,
    /// What they took, at least.
    whole_ns: u64,
    vain_scans: u32,
}

impl Worth {
    fn new(patience_scans: u32) -> Worth {
        Worth {
            patience_scans,
            long_scans: 0,
            whole_ns: u64::MAX,
            vain_scans: 0,
        }
    }

    /// A scan of everything; true when listening should begin.
    fn scanned_all(&mut self, took_ns: u64) -> bool {
        if took_ns < LONG_SCAN_NS {
            *self = Worth::new(self.patience_scans);
            return false;
        }
        self.long_scans += 1;
        self.whole_ns = self.whole_ns.min(took_ns);
        self.long_scans >= self.patience_scans
    }

    /// A scan beside listening, of a part if all was heard; true when that should end.
    fn scanned_heard(&mut self, took_ns: u64, is_partial: bool) -> bool {
        if is_partial && took_ns < self.whole_ns / 2 {
            self.vain_scans = 0;
            return false;
        }
        self.vain_scans += 1;
        let is_in_vain = self.vain_scans > VAIN_SCANS;
        if is_in_vain {
            let patience_scans = self.patience_scans * PATIENCE_GROWTH;
            *self = Worth::new(patience_scans.min(PATIENCE_SCANS_MAX));
        }
        is_in_vain
    }
}

enum Listening {
    /// Not worth it.
    No,
    /// To be prepared while the service runs.
    Due,
    /// From the next scan on.
    Ready(FaultRing),
    Yes(WriteFaults),
    /// In vain; to be let go while the service runs.
    Over {
        _faults: WriteFaults,
    },
    /// The kernel refuses.
    Never,
}

/// Listens to where the service writes.
pub(super) struct WriteFaultListener {
    core: usize,
    pub verify: bool,
    smallest_bytes: u64,
    worth: Worth,
    listening: Listening,
    /// The blocks of large mappings: where it is enough to look at what was heard.
    blockwise: Vec<AddressRange>,
    /// What the scan at hand looks at.
    targets: Vec<AddressRange>,
    is_partial: bool,
    began_at_ns: u64,
}

impl WriteFaultListener {
    /// For a service bound to `core`. To `verify` it, listening begins with the first scan, and for
    /// small mappings, too.
    pub fn new(core: usize, verify: bool) -> WriteFaultListener {
        let (listening, smallest_bytes) = match verify {
            true => (Listening::Due, BLOCK_BYTES),
            false => (Listening::No, LARGE_MAPPING_BYTES),
        };
        WriteFaultListener {
            core,
            verify,
            smallest_bytes,
            worth: Worth::new(LONG_SCANS),
            listening,
            blockwise: Vec::new(),
            targets: Vec::new(),
            is_partial: false,
            began_at_ns: 0,
        }
    }

    /// The memory map has changed.
    pub fn map_changed(&mut self, map: &[Mapping]) {
        self.blockwise.clear();
        let large = map.iter().filter(|mapping| {
            mapping.backing == Backing::Anonymous
                && mapping.sharing == Sharing::Private
                && !mapping.grows_down
                && mapping.range.length_bytes() >= self.smallest_bytes
        });
        for mapping in large {
            let range = AddressRange {
                start: mapping.range.start.next_multiple_of(BLOCK_BYTES),
                end: mapping.range.end / BLOCK_BYTES * BLOCK_BYTES,
            };
            if range.start < range.end {
                self.blockwise.push(range);
            }
        }
    }

    /// What of `ranges`, which ascend, has to be scanned: all `in_doubt`. The service is stopped,
    /// and what this returned before was scanned in the same stop. Between two calls, whoever maps
    /// memory anew scans what is present there.
    pub fn narrow(
        &mut self,
        process: &Process,
        ranges: &[AddressRange],
        in_doubt: bool,
    ) -> Result<&[AddressRange], TraceError> {
        self.begin_when_ready(process);
        let heard = match &mut self.listening {
            Listening::Yes(faults) => faults.take(process)?,
            _ => None,
        };
        let heard = heard.filter(|_| !in_doubt);
        self.targets.clear();
        self.is_partial = heard.is_some();
        match heard {
            Some(written) => narrow(ranges, &self.blockwise, written, &mut self.targets),
            None => self.targets.extend_from_slice(ranges),
        }
        self.began_at_ns = now_ns();
        Ok(&self.targets)
    }

    /// The scan is done.
    pub fn scanned(&mut self) {
        let took_ns = now_ns() - self.began_at_ns;
        self.listening = match std::mem::replace(&mut self.listening, Listening::No) {
            Listening::No if !self.blockwise.is_empty() && self.worth.scanned_all(took_ns) => {
                Listening::Due
            }
            Listening::Yes(faults)
                if self.worth.scanned_heard(took_ns, self.is_partial) && !self.verify =>
            {
                Listening::Over { _faults: faults }
            }
            other => other,
        };
    }

    /// What the last scan passed over.
    pub fn passed_over(&self) -> &[AddressRange] {
        match self.is_partial {
            true => &self.blockwise,
            false => &[],
        }
    }

    /// Prepares to listen, or lets go, if that is due; to be called while the service runs.
    pub fn prepare(&mut self) {
        match self.listening {
            Listening::Due => {
                self.listening = match WriteFaults::prepare(self.core) {
                    Ok(ring) => Listening::Ready(ring),
                    Err(error) => refused(&error),
                };
            }
            Listening::Over { .. } => self.listening = Listening::No,
            _ => {}
        }
    }

    fn begin_when_ready(&mut self, process: &Process) {
        let ring = match std::mem::replace(&mut self.listening, Listening::No) {
            Listening::Ready(ring) => ring,
            other => {
                self.listening = other;
                return;
            }
        };
        self.listening = match WriteFaults::follow(process, ring) {
            Ok(faults) => Listening::Yes(faults),
            // A thread that just ends.
            Err(error) if error.is_death() => Listening::Due,
            Err(error) => refused(&error),
        };
    }
}

fn refused(error: &TraceError) -> Listening {
    crate::log!("every scan goes over the whole memory: {error}");
    Listening::Never
}

/// Appends `ranges` to `targets`, without the parts of `blockwise` that are not in `written`. All
/// ascend.
fn narrow(
    ranges: &[AddressRange],
    blockwise: &[AddressRange],
    written: &[AddressRange],
    targets: &mut Vec<AddressRange>,
) {
    for range in ranges {
        let mut start = range.start;
        for part in overlapping(blockwise, *range) {
            push(targets, start, part.start);
            for block in overlapping(written, part) {
                push(targets, block.start, block.end);
            }
            start = part.end;
        }
        push(targets, start, range.end);
    }
}

/// The parts of `parts`, which ascend, that lie in `range`.
fn overlapping(
    parts: &[AddressRange],
    range: AddressRange,
) -> impl Iterator<Item = AddressRange> + '_ {
    let first = parts.partition_point(|part| part.end <= range.start);
    parts[first..]
        .iter()
        .map_while(move |part| part.intersection(range))
}

fn push(targets: &mut Vec<AddressRange>, start: u64, end: u64) {
    if start >= end {
        return;
    }
    match targets.last_mut() {
        Some(last) if last.end == start => last.end = end,
        _ => targets.push(AddressRange { start, end }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn listening_begins_after_long_scans_and_ends_when_they_stay_long() {
        let mut worth = Worth::new(LONG_SCANS);
        let long = [1, 3, 2, 0, 1, 3, 2].map(|times| times * LONG_SCAN_NS);
        assert!(!long.iter().any(|took_ns| worth.scanned_all(*took_ns)));
        assert!(worth.scanned_all(2 * LONG_SCAN_NS));
        let half_ns = LONG_SCAN_NS / 2;
        let mut heard = |times: u32, took_ns, is_partial| {
            (0..times).any(|_| worth.scanned_heard(took_ns, is_partial))
        };
        assert!(!heard(VAIN_SCANS, half_ns, true), "as long as half");
        assert!(!heard(1, half_ns - 1, true));
        assert!(!heard(VAIN_SCANS, 10, false), "not all was heard");
        assert!(heard(1, 10, false));
        let mut all = |times: u32| (0..times).any(|_| worth.scanned_all(LONG_SCAN_NS));
        assert!(!all(LONG_SCANS * PATIENCE_GROWTH - 1));
        assert!(all(1));
    }

    const END: u64 = 60;

    fn some_ranges() -> impl Strategy<Value = Vec<AddressRange>> {
        proptest::collection::vec(any::<bool>(), END as usize).prop_map(|pages| {
            let mut ranges = Vec::new();
            for (page, is_in) in (0..).zip(pages) {
                push(&mut ranges, page, page + u64::from(is_in));
            }
            ranges
        })
    }

    proptest! {
        #[test]
        fn only_what_is_large_and_was_not_heard_of_is_passed_over(
            ranges in some_ranges(),
            blockwise in some_ranges(),
            written in some_ranges(),
        ) {
            let mut targets = Vec::new();
            narrow(&ranges, &blockwise, &written, &mut targets);
            let has = |parts: &[AddressRange], page| parts.iter().any(|part| part.contains(page));
            for page in 0..END {
                let looked_at = has(&ranges, page)
                    && (!has(&blockwise, page) || has(&written, page));
                prop_assert_eq!(has(&targets, page), looked_at);
            }
            prop_assert!(targets.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
