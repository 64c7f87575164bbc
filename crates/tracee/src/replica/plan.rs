//! How one memory map becomes another. Pure.

use unbroken_image::{AddressRange, Advice, Backing, Mapping, Protection, Sharing};

/// A step. Ranges never overlap, and their order does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Unmap(AddressRange),
    /// The mapping stays and its private content goes.
    Discard(AddressRange),
    /// Maps, over whatever is there.
    Map(Mapping),
    Protect(AddressRange, Protection),
    Advise(AddressRange, Advice),
}

/// The steps from `current` to `wanted`, both sorted and without overlaps, when the content of
/// `voided` is void on top of it.
pub(super) fn steps(current: &[Mapping], wanted: &[Mapping], voided: &[AddressRange]) -> Vec<Step> {
    let mut borders: Vec<u64> = current
        .iter()
        .chain(wanted)
        .map(|mapping| mapping.range)
        .chain(voided.iter().copied())
        .flat_map(|range| [range.start, range.end])
        .collect();
    borders.sort_unstable();
    borders.dedup();
    let mut voided = voided.to_vec();
    voided.sort_unstable();
    let (mut in_current, mut in_wanted) = (Cursor::new(current), Cursor::new(wanted));
    let mut void = 0;
    let mut steps = Vec::new();
    for border in borders.windows(2) {
        let range = AddressRange {
            start: border[0],
            end: border[1],
        };
        while void < voided.len() && voided[void].end <= range.start {
            void += 1;
        }
        // Voided ranges may overlap each other, so a later one can cover what this one does not.
        let is_void = voided[void..]
            .iter()
            .take_while(|voided| voided.start <= range.start)
            .any(|voided| voided.contains(range.start));
        let (old, new) = (in_current.at(range.start), in_wanted.at(range.start));
        segment(range, old, new, is_void, &mut steps);
    }
    steps
}

/// Finds mappings for growing addresses.
struct Cursor<'a>(&'a [Mapping]);

impl<'a> Cursor<'a> {
    fn new(mappings: &'a [Mapping]) -> Self {
        Cursor(mappings)
    }

    fn at(&mut self, address: u64) -> Option<&'a Mapping> {
        while let [first, rest @ ..] = self.0
            && first.range.end <= address
        {
            self.0 = rest;
        }
        self.0
            .first()
            .filter(|mapping| mapping.range.contains(address))
    }
}

fn segment(
    range: AddressRange,
    old: Option<&Mapping>,
    new: Option<&Mapping>,
    is_void: bool,
    steps: &mut Vec<Step>,
) {
    match (old, new) {
        (None, None) => {}
        (Some(_), None) => push(steps, Step::Unmap(range)),
        (None, Some(new)) => push(steps, Step::Map(part(new, range))),
        (Some(old), Some(new)) if !is_same(old, new, range.start) => {
            push(steps, Step::Map(part(new, range)));
        }
        (Some(old), Some(new)) => {
            match (new.sharing, &new.backing) {
                _ if !is_void => {}
                (_, Backing::Vdso | Backing::Vvar | Backing::Vsyscall) => {}
                (Sharing::Private, _) => push(steps, Step::Discard(range)),
                // What its mappers share stays when one of them lets go of it; what was really
                // emptied comes as pages.
                (Sharing::Shared, _) => {}
            }
            if old.protection != new.protection {
                push(steps, Step::Protect(range, new.protection));
            }
            if old.advice != new.advice {
                push(steps, Step::Advise(range, new.advice));
            }
        }
    }
}

/// Joins a step to one that it continues.
fn push(steps: &mut Vec<Step>, step: Step) {
    // A segment makes up to three steps, so what continues is among the last few.
    for last in steps.iter_mut().rev().take(3) {
        let joined = match (&mut *last, &step) {
            (Step::Unmap(range), Step::Unmap(next)) => extend(range, *next),
            (Step::Discard(range), Step::Discard(next)) => extend(range, *next),
            (Step::Map(mapping), Step::Map(next)) => {
                continues(mapping, next) && extend(&mut mapping.range, next.range)
            }
            (Step::Protect(range, protection), Step::Protect(next, same)) => {
                protection == same && extend(range, *next)
            }
            (Step::Advise(range, advice), Step::Advise(next, same)) => {
                advice == same && extend(range, *next)
            }
            _ => false,
        };
        if joined {
            return;
        }
    }
    steps.push(step);
}

fn extend(range: &mut AddressRange, next: AddressRange) -> bool {
    let continues = range.end == next.start;
    if continues {
        range.end = next.end;
    }
    continues
}

fn continues(mapping: &Mapping, next: &Mapping) -> bool {
    let attributes = |mapping: &Mapping| {
        (
            mapping.protection,
            mapping.sharing,
            mapping.grows_down,
            mapping.advice,
        )
    };
    attributes(mapping) == attributes(next) && backing_at(mapping, next.range.start) == next.backing
}

/// The part of `mapping` in `range`, which lies inside it.
pub(super) fn part(mapping: &Mapping, range: AddressRange) -> Mapping {
    Mapping {
        range,
        backing: backing_at(mapping, range.start),
        ..mapping.clone()
    }
}

/// Whether two mappings show the same bytes at `address`, whatever their protection.
fn is_same(old: &Mapping, new: &Mapping, address: u64) -> bool {
    old.sharing == new.sharing
        && old.grows_down == new.grows_down
        && backing_at(old, address) == backing_at(new, address)
}

/// What stands behind `mapping` from `address` on.
fn backing_at(mapping: &Mapping, address: u64) -> Backing {
    let ahead = address.wrapping_sub(mapping.range.start);
    let mut backing = mapping.backing.clone();
    match &mut backing {
        Backing::File { offset_bytes, .. } | Backing::SharedMemory { offset_bytes, .. } => {
            *offset_bytes = offset_bytes.wrapping_add(ahead);
        }
        Backing::Anonymous | Backing::Vdso | Backing::Vvar | Backing::Vsyscall => {}
    }
    backing
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_image::{FileIdentity, PAGE_SIZE};

    /// What every page of a small address space holds: its mapping there, and whether its content
    /// is fresh.
    type Model = Vec<Option<(Mapping, bool)>>;

    const PAGES: u64 = 24;

    fn page(number: u64) -> AddressRange {
        AddressRange {
            start: number * PAGE_SIZE,
            end: (number + 1) * PAGE_SIZE,
        }
    }

    fn model(mappings: &[Mapping]) -> Model {
        let at = |number| {
            mappings
                .iter()
                .find(|mapping| mapping.range.contains(number * PAGE_SIZE))
        };
        (0..PAGES)
            .map(|number| at(number).map(|mapping| (part(mapping, page(number)), false)))
            .collect()
    }

    fn execute(model: &mut Model, step: &Step) {
        let range = match step {
            Step::Unmap(range) | Step::Discard(range) => *range,
            Step::Protect(range, _) | Step::Advise(range, _) => *range,
            Step::Map(mapping) => mapping.range,
        };
        for number in range.start / PAGE_SIZE..range.end / PAGE_SIZE {
            let slot = &mut model[number as usize];
            match (step, slot.as_mut()) {
                (Step::Unmap(_), Some(_)) => *slot = None,
                (Step::Map(mapping), _) => *slot = Some((part(mapping, page(number)), true)),
                (Step::Discard(_), Some(held)) => held.1 = true,
                (Step::Protect(_, protection), Some(held)) => held.0.protection = *protection,
                (Step::Advise(_, advice), Some(held)) => held.0.advice = *advice,
                (_, None) => panic!("{step:?} where nothing is mapped"),
            }
        }
    }

    /// A small generator, so that a failure names its seed.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }

        fn map(&mut self) -> Vec<Mapping> {
            let mut mappings = Vec::new();
            let mut at = self.below(3);
            while at < PAGES - 4 {
                let length = 1 + self.below(4);
                let start = at * PAGE_SIZE;
                let shared = self.below(3) == 0;
                let backing = match self.below(3) {
                    0 if !shared => Backing::Anonymous,
                    number => Backing::SharedMemory {
                        identity: FileIdentity {
                            device: 1,
                            inode: number,
                        },
                        offset_bytes: start,
                        name: String::new(),
                    },
                };
                mappings.push(Mapping {
                    range: AddressRange {
                        start,
                        end: start + length * PAGE_SIZE,
                    },
                    protection: Protection {
                        read: true,
                        write: self.below(2) == 0,
                        execute: false,
                    },
                    sharing: if shared {
                        Sharing::Shared
                    } else {
                        Sharing::Private
                    },
                    grows_down: false,
                    backing,
                    advice: Advice {
                        dont_dump: self.below(4) == 0,
                        ..Advice::default()
                    },
                });
                at += length + self.below(2);
            }
            mappings
        }
    }

    #[test]
    fn steps_lead_from_any_map_to_any_other() {
        for seed in 1..3000u64 {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let current = random.map();
            let wanted = if random.below(4) == 0 {
                current.clone()
            } else {
                random.map()
            };
            let voided: Vec<AddressRange> = (0..random.below(3))
                .map(|_| {
                    let start = random.below(PAGES - 5);
                    AddressRange {
                        start: start * PAGE_SIZE,
                        end: (start + 1 + random.below(5)) * PAGE_SIZE,
                    }
                })
                .collect();
            let mut reached = model(&current);
            for step in steps(&current, &wanted, &voided) {
                execute(&mut reached, &step);
            }
            let before = model(&current);
            for (number, (reached, expected)) in reached.iter().zip(model(&wanted)).enumerate() {
                let (Some((mapping, fresh)), Some((wanted, _))) = (reached, &expected) else {
                    assert!(
                        reached.is_none() && expected.is_none(),
                        "seed {seed}, page {number}"
                    );
                    continue;
                };
                assert_eq!(mapping, wanted, "seed {seed}, page {number}");
                let address = number as u64 * PAGE_SIZE;
                let is_void = voided.iter().any(|range| range.contains(address));
                let kept = before[number]
                    .as_ref()
                    .is_some_and(|(old, _)| is_same(old, wanted, address));
                let is_emptied = is_void && wanted.sharing == Sharing::Private;
                assert_eq!(*fresh, is_emptied || !kept, "seed {seed}, page {number}");
            }
        }
    }

    #[test]
    fn nothing_to_do_is_no_step() {
        let map = Random(42).map();
        assert_eq!(steps(&map, &map, &[]), []);
    }
}
