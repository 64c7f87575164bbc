//! What `epoll_ctl` calls and closes do to the entries of an epoll instance.
//!
//! Reading the entries from fdinfo costs about 1 us each, so an instance with thousands is followed by
//! the announced calls instead, and read again only when their outcome is not certain.

use super::announced::{Announced, Announcement};
use crate::epoll::{EPOLLERR, EPOLLEXCLUSIVE, EPOLLHUP, EPOLLWAKEUP};
use crate::methods::Pollable;
use std::collections::HashMap;
use unbroken_image::object::EpollEntry;
use unbroken_image::{Fd, ObjectId, Pid};

/// What a call did to the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Unchanged,
    Changed,
    /// Whether the kernel took the call cannot be told from here.
    Doubtful,
}

/// Applies one call to the entries of an instance, which are sorted by [`EpollEntry::key`].
pub(crate) fn apply(
    entries: &mut Vec<EpollEntry>,
    operation: i32,
    (fd, target, pollable): (Fd, ObjectId, Pollable),
    event: Option<(u32, u64)>,
) -> Outcome {
    let place = entries.binary_search_by_key(&(fd, target), EpollEntry::key);
    match (operation, place, event) {
        (libc::EPOLL_CTL_DEL, Ok(place), _) => {
            entries.remove(place);
            Outcome::Changed
        }
        // EEXIST; ENOENT.
        (libc::EPOLL_CTL_ADD, Ok(_), Some(_)) => Outcome::Unchanged,
        (libc::EPOLL_CTL_DEL | libc::EPOLL_CTL_MOD, Err(_), _) => Outcome::Unchanged,
        // What has no poll operation cannot be added: EPERM.
        (libc::EPOLL_CTL_ADD, Err(_), Some(_)) if pollable == Pollable::No => Outcome::Unchanged,
        // Nesting may fail by depth, EPOLLEXCLUSIVE by its other bits, EPOLLWAKEUP is dropped
        // without a capability, and devices poll or not.
        (_, _, Some((events, _))) if events & (EPOLLEXCLUSIVE | EPOLLWAKEUP) != 0 => {
            Outcome::Doubtful
        }
        (libc::EPOLL_CTL_ADD, Err(place), Some((events, data))) if pollable == Pollable::Yes => {
            let events = events | EPOLLERR | EPOLLHUP;
            entries.insert(
                place,
                EpollEntry {
                    fd,
                    target,
                    events,
                    data,
                },
            );
            Outcome::Changed
        }
        (libc::EPOLL_CTL_MOD, Ok(place), Some((events, data)))
            if entries[place].events & EPOLLEXCLUSIVE == 0 =>
        {
            entries[place].events = events | EPOLLERR | EPOLLHUP;
            entries[place].data = data;
            Outcome::Changed
        }
        _ => Outcome::Doubtful,
    }
}

/// Which announcement of one update was the last to say that a number is closed or replaced.
#[derive(Debug, Default)]
pub(crate) struct Namings {
    single: HashMap<(Pid, Fd), (usize, u32)>,
    wide: Vec<(Pid, Fd, Fd, usize, u32)>,
    /// A description may have come to further numbers.
    pub duplicated: bool,
}

impl Namings {
    pub fn collect(&mut self, announcements: &[Announcement]) {
        self.single.clear();
        self.wide.clear();
        self.duplicated = false;
        for (index, Announcement { pid, thread, what }) in announcements.iter().enumerate() {
            match *what {
                Announced::Closing { fd } => {
                    self.single.insert((*pid, fd), (index, *thread));
                }
                Announced::Slot { fd } => {
                    self.single.insert((*pid, fd), (index, *thread));
                    self.duplicated = true;
                }
                Announced::CloseRange {
                    first,
                    last,
                    close_on_exec: false,
                } => {
                    self.wide.push((*pid, first, last, index, *thread));
                }
                Announced::Executed | Announced::Everything => {
                    self.wide.push((*pid, Fd(0), Fd(i32::MAX), index, *thread));
                    self.duplicated = true;
                }
                Announced::CreatedFrom { .. } | Announced::Received => self.duplicated = true,
                Announced::Created { .. }
                | Announced::CloseRange { .. }
                | Announced::Object { .. }
                | Announced::Epoll { .. } => {}
            }
        }
    }

    /// The last announcement that names the number: its index and thread.
    pub fn last(&self, pid: Pid, fd: Fd) -> Option<(usize, u32)> {
        let wide = self
            .wide
            .iter()
            .filter(|(owner, first, last, ..)| *owner == pid && (*first..=*last).contains(&fd));
        let wide = wide.map(|(.., index, thread)| (*index, *thread));
        self.single
            .get(&(pid, fd))
            .copied()
            .into_iter()
            .chain(wide)
            .max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoll::{EPOLLIN, EPOLLOUT};
    use libc::{EPOLL_CTL_ADD as ADD, EPOLL_CTL_DEL as DEL, EPOLL_CTL_MOD as MOD};

    const SOCKET: (Fd, ObjectId, Pollable) = (Fd(5), ObjectId(9), Pollable::Yes);

    #[test]
    fn calls_do_what_the_kernel_does() {
        let mut entries = Vec::new();
        let event = |events| Some((events, 77));
        assert_eq!(
            apply(&mut entries, MOD, SOCKET, event(EPOLLIN)),
            Outcome::Unchanged
        );
        assert_eq!(
            apply(&mut entries, ADD, SOCKET, event(EPOLLIN)),
            Outcome::Changed
        );
        assert_eq!(
            apply(&mut entries, ADD, SOCKET, event(EPOLLOUT)),
            Outcome::Unchanged
        );
        assert_eq!(entries[0].events, EPOLLIN | EPOLLERR | EPOLLHUP);
        assert_eq!(
            apply(&mut entries, MOD, SOCKET, event(EPOLLOUT)),
            Outcome::Changed
        );
        assert_eq!(entries[0].events, EPOLLOUT | EPOLLERR | EPOLLHUP);
        assert_eq!(apply(&mut entries, DEL, SOCKET, None), Outcome::Changed);
        assert_eq!(apply(&mut entries, DEL, SOCKET, None), Outcome::Unchanged);
        assert!(entries.is_empty());
    }

    #[test]
    fn uncertain_outcomes_are_called_so() {
        let mut entries = Vec::new();
        let nested = (Fd(6), ObjectId(4), Pollable::Unknown);
        assert_eq!(
            apply(&mut entries, ADD, nested, Some((EPOLLIN, 0))),
            Outcome::Doubtful
        );
        let exclusive = Some((EPOLLIN | EPOLLEXCLUSIVE, 0));
        assert_eq!(
            apply(&mut entries, ADD, SOCKET, exclusive),
            Outcome::Doubtful
        );
        assert_eq!(apply(&mut entries, ADD, SOCKET, None), Outcome::Doubtful);
        assert_eq!(apply(&mut entries, 99, SOCKET, None), Outcome::Doubtful);
        let file = (Fd(6), ObjectId(4), Pollable::No);
        assert_eq!(
            apply(&mut entries, ADD, file, Some((EPOLLIN, 0))),
            Outcome::Unchanged
        );
    }
}
