//! Which parts of the memory a scan may pass over, because nobody wrote there since the last one.
//!
//! A scan costs about 1 ms for each GB of small pages that are there, written or not. Hearing of
//! each write costs the service under a microsecond at its first write to a page after an epoch, and
//! at each switch of threads; so it begins when scans have become long.

use crate::clock::now_ns;
use unbroken_image::{AddressRange, Backing, Mapping, Sharing};
use unbroken_tracee::write_faults::{BLOCK_BYTES, WriteFaults};
use unbroken_tracee::{Process, TraceError};

/// A scan of everything that takes so long, so many times in a row, is worth to be avoided.
const LONG_SCAN_NS: u64 = 100_000;
const LONG_SCANS: u32 = 4;
/// Mappings that are smaller are scanned whole: a call for each block would cost more.
const LARGE_MAPPING_BYTES: u64 = 16 << 20;
/// When so many times in a row something was not heard, listening is in vain: the service runs on
/// several cores, or has its faults taken by calls.
const VAIN_TIMES: u32 = 64;

enum Listening {
    /// Not yet worth it.
    No { long_scans: u32 },
    Yes {
        faults: WriteFaults,
        vain_times: u32,
    },
    /// Refused, or in vain.
    Never,
}

/// Listens to where the service writes.
pub(super) struct Hearing {
    core: usize,
    pub verify: bool,
    smallest_bytes: u64,
    listening: Listening,
    /// The blocks of large mappings: where it is enough to look at what was heard.
    blockwise: Vec<AddressRange>,
    /// What the scan at hand looks at.
    targets: Vec<AddressRange>,
    is_partial: bool,
    began_at_ns: u64,
}

impl Hearing {
    /// For a service bound to `core`. To `verify` it, listening begins with the first scan, and for
    /// small mappings, too.
    pub fn new(core: usize, verify: bool) -> Hearing {
        let (long_scans, smallest_bytes) = match verify {
            true => (LONG_SCANS, BLOCK_BYTES),
            false => (0, LARGE_MAPPING_BYTES),
        };
        Hearing {
            core,
            verify,
            smallest_bytes,
            listening: Listening::No { long_scans },
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
        self.begin_when_worth_it(process);
        let heard = match &mut self.listening {
            Listening::Yes { faults, vain_times } => {
                let heard = faults.take(process)?;
                *vain_times = heard.map_or(*vain_times + 1, |_| 0);
                heard
            }
            _ => None,
        };
        let heard = heard.filter(|_| !in_doubt);
        self.targets.clear();
        self.is_partial = heard.is_some();
        match heard {
            Some(written) => narrow(ranges, &self.blockwise, written, &mut self.targets),
            None => self.targets.extend_from_slice(ranges),
        }
        if matches!(self.listening, Listening::Yes { vain_times, .. } if vain_times > VAIN_TIMES) {
            crate::log!("where the service writes is heard in vain; scans go on without");
            self.listening = Listening::Never;
        }
        self.began_at_ns = now_ns();
        Ok(&self.targets)
    }

    /// The scan is done.
    pub fn scanned(&mut self) {
        if let Listening::No { long_scans } = &mut self.listening {
            let is_long = now_ns() - self.began_at_ns >= LONG_SCAN_NS && !self.blockwise.is_empty();
            *long_scans = if is_long { *long_scans + 1 } else { 0 };
        }
    }

    /// What the last scan passed over.
    pub fn passed_over(&self) -> &[AddressRange] {
        match self.is_partial {
            true => &self.blockwise,
            false => &[],
        }
    }

    fn begin_when_worth_it(&mut self, process: &Process) {
        if !matches!(self.listening, Listening::No { long_scans } if long_scans >= LONG_SCANS) {
            return;
        }
        self.listening = match WriteFaults::follow(process, self.core) {
            Ok(faults) => Listening::Yes {
                faults,
                vain_times: 0,
            },
            // A thread that just ends.
            Err(error) if error.is_death() => return,
            Err(error) => {
                crate::log!("every scan goes over the whole memory: {error}");
                Listening::Never
            }
        };
    }
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
