//! More announcements than are kept, said again in a few that cover them all.
//!
//! What is announced may have changed, so more may be said than happened, and never less. Calls on
//! descriptors become one look at the whole table. Content that is void has to stay named, because
//! nothing else shows it: ranges are joined, the nearest ones first.

use super::announcement::{Announcement, Change};
use unbroken_image::AddressRange;

/// Changes without a range, each of which is said once at most.
const SINGLE_MAX: usize = 10;
/// The fewest announcements that can be said again in fewer.
pub const LEAST: usize = 2 * SINGLE_MAX;

/// The number of no thread, for what any may have announced.
const ANY_THREAD: u32 = 0;

/// Makes `list` shorter by at least a quarter of `kept_max`, its length, and says no less.
pub fn fold(list: &mut Vec<Announcement>, kept_max: usize) {
    let ranges_max = (kept_max / 2).min(kept_max.saturating_sub(SINGLE_MAX + kept_max / 4));
    let mut ranges = Vec::new();
    let mut lowest_break = None;
    let mut singles: Vec<Change> = Vec::with_capacity(SINGLE_MAX);
    for announcement in list.drain(..) {
        let single = match announcement.change {
            Change::MemoryVoid(range) => {
                ranges.push(range);
                continue;
            }
            Change::Break(end) => {
                let lowest = lowest_break.get_or_insert(end);
                *lowest = end.min(*lowest);
                continue;
            }
            Change::MemoryMap(_) => Change::MemoryMap(None),
            Change::ThreadAttributes => Change::AnyThreadAttributes,
            Change::Opened
            | Change::Created(_)
            | Change::CreatedFrom(_)
            | Change::Slot(_)
            | Change::Closing(_)
            | Change::CloseRange { .. }
            | Change::Object(_)
            | Change::Epoll(_) => Change::Descriptors,
            other @ (Change::MemoryAdvice
            | Change::Descriptors
            | Change::ProcFile
            | Change::SignalActions
            | Change::AnyThreadAttributes
            | Change::Timers
            | Change::Credentials
            | Change::ProcessState) => other,
        };
        if !singles.contains(&single) {
            singles.push(single);
        }
    }
    join(&mut ranges, ranges_max.max(1));
    let changes = singles
        .into_iter()
        .chain(lowest_break.map(Change::Break))
        .chain(ranges.into_iter().map(Change::MemoryVoid));
    list.extend(changes.map(|change| Announcement {
        thread: ANY_THREAD,
        change,
    }));
}

/// Sorts `ranges` and joins them across the smallest gaps until there are at most `most`, which is
/// not 0.
fn join(ranges: &mut Vec<AddressRange>, most: usize) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, range| {
        let touches = next.start <= range.end;
        if touches {
            range.end = range.end.max(next.end);
        }
        touches
    });
    if ranges.len() <= most {
        return;
    }
    let gaps = ranges.windows(2).map(|pair| pair[1].start - pair[0].end);
    let mut gaps: Vec<u64> = gaps.collect();
    let (_, widest_closed, _) = {
        let last = ranges.len() - most - 1;
        gaps.select_nth_unstable(last)
    };
    let closed_bytes = *widest_closed;
    ranges.dedup_by(|next, range| {
        let closes = next.start - range.end <= closed_bytes;
        if closes {
            range.end = next.end;
        }
        closes
    });
}

#[cfg(test)]
mod tests {
    use super::super::announcement::EpollChange;
    use super::*;
    use unbroken_image::Fd;

    fn range(page: u64, pages: u64) -> AddressRange {
        AddressRange {
            start: page << 12,
            end: (page + pages) << 12,
        }
    }

    /// Some change, the same for the same number.
    fn change(number: u64) -> Change {
        let fd = Fd((number >> 8) as i32 & 0xff);
        let page = (number >> 16) % 100_000;
        match number % 19 {
            0 => Change::MemoryMap(Some(range(page, 1))),
            1 => Change::MemoryAdvice,
            2..5 => Change::MemoryVoid(range(page, 1 + page % 7)),
            5 => Change::Break(page << 12),
            6 => Change::Opened,
            7 => Change::Created(2),
            8 => Change::CreatedFrom(fd),
            9 => Change::Slot(fd),
            10 => Change::Closing(fd),
            11 => Change::CloseRange {
                first: fd,
                last: fd,
                close_on_exec: true,
            },
            12 => Change::Epoll(EpollChange {
                epoll: fd,
                operation: 1,
                target: fd,
                event: None,
            }),
            13 => Change::SignalActions,
            14 => Change::ThreadAttributes,
            15 => Change::AnyThreadAttributes,
            16 => Change::Timers,
            17 => Change::Credentials,
            _ => Change::ProcessState,
        }
    }

    fn covers(said: &[Announcement], change: Change) -> bool {
        let has = |wanted: Change| said.iter().any(|one| one.change == wanted);
        match change {
            Change::MemoryVoid(range) => said.iter().any(|one| {
                matches!(one.change, Change::MemoryVoid(whole)
                    if whole.start <= range.start && range.end <= whole.end)
            }),
            Change::Break(end) => said
                .iter()
                .any(|one| matches!(one.change, Change::Break(lowest) if lowest <= end)),
            Change::MemoryMap(_) => has(Change::MemoryMap(None)),
            Change::ThreadAttributes => has(Change::AnyThreadAttributes),
            Change::MemoryAdvice
            | Change::SignalActions
            | Change::AnyThreadAttributes
            | Change::Timers
            | Change::Credentials
            | Change::ProcessState => has(change),
            _ => has(Change::Descriptors),
        }
    }

    #[test]
    fn what_was_announced_is_said_again_in_fewer_words() {
        for kept_max in [LEAST, 20, 64, 1000] {
            let mut number = 88_172_645_463_325_252_u64;
            let mut list = Vec::new();
            let mut all = Vec::new();
            for _ in 0..5 * kept_max {
                number = number
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let announcement = Announcement {
                    thread: 7,
                    change: change(number >> 20),
                };
                all.push(announcement);
                if list.len() == kept_max {
                    fold(&mut list, kept_max);
                    assert!(list.len() <= kept_max - kept_max / 4, "{}", list.len());
                }
                list.push(announcement);
            }
            fold(&mut list, kept_max);
            for announcement in &all {
                assert!(
                    covers(&list, announcement.change),
                    "{:?} of {kept_max}",
                    announcement.change
                );
            }
        }
    }

    #[test]
    fn the_nearest_ranges_are_joined() {
        let mut ranges = vec![range(50, 1), range(10, 2), range(12, 1), range(60, 1)];
        ranges.push(range(1000, 4));
        join(&mut ranges, 3);
        assert_eq!(ranges, [range(10, 3), range(50, 11), range(1000, 4)]);
        join(&mut ranges, 1);
        assert_eq!(ranges, [range(10, 994)]);
    }
}
