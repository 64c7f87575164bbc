//! From announcements to the slots that must be looked at.

use std::collections::{BTreeMap, BTreeSet};
use unbroken_image::{Descriptor, Fd, Pid};

/// Something that a call may have done to a descriptor table since the last update, as told
/// before the call ran: "may have", never "has".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    pub pid: Pid,
    /// Whatever tells threads apart: calls of one thread happen in the order of their
    /// announcements, calls of two may not.
    pub thread: u32,
    pub what: Announced,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// Up to `count` new descriptions appear, each in the lowest free slot: `open`, `socket`,
    /// `accept`, `pipe`, ... Not `dup`: see `CreatedFrom`.
    Created { count: u32 },
    /// A slot that is taken appears once more, in the lowest free slot at or above `minimum`:
    /// `dup` (0) and `fcntl(F_DUPFD)`.
    CreatedFrom { minimum: Fd },
    /// This slot gets another description: `dup2`, `dup3`.
    Slot { fd: Fd },
    /// This slot is closed.
    Closing { fd: Fd },
    /// These slots, ends included, are closed, or marked close-on-exec.
    CloseRange {
        first: Fd,
        last: Fd,
        close_on_exec: bool,
    },
    /// Flags of the slot, or something of what it names: options, addresses, a timer set anew.
    Object { fd: Fd },
    /// `epoll_ctl`; `event` is `None` when the call has none, or it could not be read.
    Epoll {
        epoll: Fd,
        operation: i32,
        target: Fd,
        event: Option<(u32, u64)>,
    },
    /// The process ran `execve`: slots marked close-on-exec are closed.
    Executed,
    /// Descriptors came in a message (`SCM_RIGHTS`), at unknown numbers that were free.
    Received,
    /// Not known in detail: the process is new, or announcements were lost. All but sockets count
    /// as new objects then.
    Everything,
}

/// One process's slots, and which numbers below the highest are free.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    used: BTreeMap<Fd, Descriptor>,
    holes: BTreeSet<Fd>,
    /// One above the highest used number.
    end: i32,
}

impl Slots {
    pub fn get(&self, fd: Fd) -> Option<Descriptor> {
        self.used.get(&fd).copied()
    }

    pub fn all(&self) -> &BTreeMap<Fd, Descriptor> {
        &self.used
    }

    pub fn insert(&mut self, fd: Fd, descriptor: Descriptor) {
        self.used.insert(fd, descriptor);
        self.holes.remove(&fd);
        if fd.0 >= self.end {
            self.holes.extend((self.end..fd.0).map(Fd));
            self.end = fd.0 + 1;
        }
    }

    pub fn remove(&mut self, fd: Fd) -> Option<Descriptor> {
        let removed = self.used.remove(&fd)?;
        if fd.0 + 1 == self.end {
            self.end = self.used.keys().next_back().map_or(0, |last| last.0 + 1);
            let end = Fd(self.end);
            drop(self.holes.split_off(&end));
        } else {
            self.holes.insert(fd);
        }
        Some(removed)
    }

    /// Free numbers at or above `minimum`, ascending, without end.
    fn free_from(&self, minimum: Fd) -> impl Iterator<Item = Fd> + '_ {
        let above = (self.end.max(minimum.0)..i32::MAX).map(Fd);
        self.holes.range(minimum..).copied().chain(above)
    }
}

/// Adds to `suspects` every slot of `slots` that may name another description after `announced`,
/// but for `Received` and `Everything`, which the caller answers by a listing.
///
/// The kernel gives out the lowest free number. A slot that no announcement names and that is
/// used now was free before, so at the moment it was given out every lower free slot that no
/// announcement names had been given out too: with n creations it is among the first n of those.
/// Numbers that an announcement names are passed over in the count, for `dup2` may have filled
/// them without a creation.
pub(crate) fn add_suspects<'a>(
    slots: &Slots,
    announced: impl Iterator<Item = &'a Announced> + Clone,
    suspects: &mut BTreeSet<Fd>,
) {
    let mut created = 0usize;
    for what in announced.clone() {
        match *what {
            Announced::Created { count } => created += count as usize,
            Announced::CreatedFrom { .. } => created += 1,
            Announced::Slot { fd } | Announced::Closing { fd } => {
                suspects.insert(fd);
            }
            Announced::CloseRange {
                first,
                last,
                close_on_exec: false,
            } if first <= last => {
                suspects.extend(slots.used.range(first..=last).map(|(fd, _)| *fd));
            }
            Announced::Executed => {
                let closed = slots.used.iter().filter(|(_, slot)| slot.close_on_exec);
                suspects.extend(closed.map(|(fd, _)| *fd));
            }
            Announced::CloseRange { .. }
            | Announced::Object { .. }
            | Announced::Epoll { .. }
            | Announced::Received
            | Announced::Everything => {}
        }
    }
    if created == 0 {
        return;
    }
    let mut minima: BTreeSet<Fd> = BTreeSet::new();
    for what in announced {
        match *what {
            Announced::Created { .. } => minima.insert(Fd(0)),
            Announced::CreatedFrom { minimum } => minima.insert(minimum.max(Fd(0))),
            _ => continue,
        };
    }
    let named = suspects.clone();
    for minimum in minima {
        let free = slots.free_from(minimum).filter(|fd| !named.contains(fd));
        suspects.extend(free.take(created));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_image::ObjectId;

    fn table(used: &[i32]) -> Slots {
        let mut slots = Slots::default();
        for fd in used {
            slots.insert(
                Fd(*fd),
                Descriptor {
                    object: ObjectId(1),
                    close_on_exec: *fd > 5,
                },
            );
        }
        slots
    }

    fn suspects(used: &[i32], announced: &[Announced]) -> Vec<i32> {
        let mut found = BTreeSet::new();
        add_suspects(&table(used), announced.iter(), &mut found);
        found.into_iter().map(|fd| fd.0).collect()
    }

    #[test]
    fn creations_take_the_first_free_slots() {
        let created = |count| Announced::Created { count };
        assert_eq!(suspects(&[0, 1, 2], &[created(2)]), [3, 4]);
        assert_eq!(suspects(&[0, 2, 4], &[created(2)]), [1, 3]);
        assert_eq!(suspects(&[], &[created(1), created(1)]), [0, 1]);
    }

    #[test]
    fn a_named_slot_does_not_count_as_given_out() {
        // dup2(0, 3) and then open: the open gives 4.
        let announced = [
            Announced::Slot { fd: Fd(3) },
            Announced::Created { count: 1 },
        ];
        assert_eq!(suspects(&[0, 1, 2], &announced), [3, 4]);
        let announced = [
            Announced::Closing { fd: Fd(1) },
            Announced::Created { count: 1 },
        ];
        assert_eq!(suspects(&[0, 1, 2], &announced), [1, 3]);
    }

    #[test]
    fn creations_from_a_minimum_and_from_below_share_the_count() {
        let announced = [
            Announced::CreatedFrom { minimum: Fd(10) },
            Announced::Created { count: 1 },
        ];
        assert_eq!(suspects(&[0, 1, 2], &announced), [3, 4, 10, 11]);
    }

    #[test]
    fn ranges_and_exec_name_what_is_open() {
        let range = Announced::CloseRange {
            first: Fd(1),
            last: Fd(i32::MAX),
            close_on_exec: false,
        };
        assert_eq!(suspects(&[0, 1, 9], &[range]), [1, 9]);
        assert_eq!(suspects(&[0, 6, 9], &[Announced::Executed]), [6, 9]);
    }

    #[test]
    fn holes_follow_the_highest_number() {
        let mut slots = table(&[0, 5]);
        slots.remove(Fd(5));
        assert_eq!((slots.end, slots.holes.len()), (1, 0));
        slots.insert(
            Fd(3),
            Descriptor {
                object: ObjectId(1),
                close_on_exec: false,
            },
        );
        assert_eq!(
            slots.holes.iter().map(|fd| fd.0).collect::<Vec<_>>(),
            [1, 2]
        );
        slots.remove(Fd(0));
        assert_eq!(
            slots
                .free_from(Fd(0))
                .take(4)
                .map(|fd| fd.0)
                .collect::<Vec<_>>(),
            [0, 1, 2, 4]
        );
    }
}
