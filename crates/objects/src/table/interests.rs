//! The entries of all epoll instances: followed, and read again when in doubt.

use super::announced::{Announced, Announcement};
use super::entry::Entry;
use super::interest::{self, Outcome};
use super::{Changes, Mirror};
use crate::Error;
use crate::epoll::{self, RawEntry};
use crate::kinds::Kind;
use crate::methods::Inode;
use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsFd;
use unbroken_image::object::{Epoll, EpollEntry};
use unbroken_image::{Descriptor, Fd, InterestChange, Object, ObjectId, Pid};
use unbroken_sys::kcmp;

/// What a slot held before an update.
type Before = (Pid, Fd, Option<Descriptor>);

impl Mirror {
    /// Removes what a vanished object leaves in epoll instances: the kernel dropped the entries
    /// with the description. When it may only have changed its number, they are read again.
    pub(super) fn forget_interest(&mut self, id: ObjectId, gone: &Entry, changes: &mut Changes) {
        if let Some(Object::Epoll(state)) = &gone.reading.state {
            for entry in &state.entries {
                self.unwatch(entry.target, (id, entry.fd));
            }
        }
        for (watcher, fd) in &gone.watched_by {
            let watcher_entry = self.objects.get_mut(watcher);
            let Some(state) = watcher_entry.and_then(Entry::epoll_mut) else {
                continue;
            };
            let change = InterestChange {
                instance: *watcher,
                fd: *fd,
                target: id,
                event: None,
            };
            state.apply(&change);
            note(&self.volatile, change, changes);
        }
    }

    fn unwatch(&mut self, target: ObjectId, watcher: (ObjectId, Fd)) {
        if let Some(entry) = self.objects.get_mut(&target) {
            entry.watched_by.retain(|other| *other != watcher);
        }
    }

    /// Brings every epoll instance up to date after the slots are. `named` are objects that a call
    /// changed in ways that are not followed; `duplicated`: descriptions may have come to further
    /// numbers.
    pub(super) fn follow_epolls(
        &mut self,
        announcements: &[Announcement],
        before: &[Before],
        (named, duplicated): (BTreeSet<ObjectId>, bool),
        changes: &mut Changes,
    ) -> Result<(), Error> {
        let mut doubtful: BTreeSet<ObjectId> = named
            .into_iter()
            .chain(changes.appeared.iter().copied())
            .filter(|id| self.kind(*id) == Some(Kind::Epoll))
            .collect();
        self.doubt_moved_targets(before, changes, &mut doubtful);
        self.follow_calls(announcements, before, duplicated, changes, &mut doubtful);
        // An entry that was armed by a followed call can have fired since, and an instance that is
        // named as touched gets no other look in this epoch.
        let touched = changes.touched.iter().copied();
        doubtful.extend(touched.filter(|id| self.entries_may_fire(*id)));
        for id in doubtful {
            if self.read_epoll(id)? {
                changes.touch(id);
            }
        }
        // Of those the whole is told.
        let (touched, appeared) = (&changes.touched, &changes.appeared);
        changes.interests.retain(|InterestChange { instance, .. }| {
            !touched.contains(instance) && !appeared.contains(instance)
        });
        Ok(())
    }

    fn entries_may_fire(&self, id: ObjectId) -> bool {
        let entry = self.objects.get(&id);
        entry.is_some_and(|entry| entry.kind == Kind::Epoll && entry.is_volatile())
    }

    /// An object that counts as gone may only have moved to another slot, where it counts as new:
    /// then its entries live on under the new number of the object.
    fn doubt_moved_targets(
        &self,
        before: &[Before],
        changes: &Changes,
        doubtful: &mut BTreeSet<ObjectId>,
    ) {
        let may_have_moved = !changes.gone.is_empty()
            && before.iter().any(|(_, _, old)| old.is_some())
            && changes.appeared.iter().any(|id| {
                self.objects
                    .get(id)
                    .is_some_and(|entry| entry.kind.inode() != Inode::Unique)
            });
        if may_have_moved {
            let touched = changes.touched.iter().copied();
            doubtful.extend(touched.filter(|id| self.kind(*id) == Some(Kind::Epoll)));
            doubtful.extend(changes.interests.iter().map(|change| change.instance));
        }
    }

    fn follow_calls(
        &mut self,
        announcements: &[Announcement],
        before: &[Before],
        duplicated: bool,
        changes: &mut Changes,
        doubtful: &mut BTreeSet<ObjectId>,
    ) {
        let mut callers: HashMap<(ObjectId, Fd), (Pid, u32)> = HashMap::new();
        let mut unproved: Vec<(ObjectId, Pid, Fd)> = Vec::new();
        let is_creation = |announcement: &Announcement| {
            matches!(
                announcement.what,
                Announced::Created { .. } | Announced::CreatedFrom { .. }
            )
        };
        let last_creation = announcements.iter().rposition(is_creation).unwrap_or(0);
        for (index, announcement) in announcements.iter().enumerate() {
            let Announcement { pid, thread, what } = *announcement;
            let Announced::Epoll {
                epoll,
                operation,
                target,
                event,
            } = what
            else {
                continue;
            };
            let old = |fd| {
                let held = before
                    .iter()
                    .find(|(owner, slot, _)| (*owner, *slot) == (pid, fd));
                held.and_then(|(_, _, old)| *old).map(|old| old.object)
            };
            if self.namings.last(pid, epoll).is_some() {
                // The number of the instance itself changed its meaning meanwhile.
                let now = self.slot(pid, epoll).map(|slot| slot.object);
                doubtful.extend(now.into_iter().chain(old(epoll)));
                continue;
            }
            let Some(instance) = self.slot(pid, epoll).map(|slot| slot.object) else {
                continue;
            };
            if self.kind(instance) != Some(Kind::Epoll) || doubtful.contains(&instance) {
                continue;
            }
            let is_first = !callers.contains_key(&(instance, target));
            let caller = *callers.entry((instance, target)).or_insert((pid, thread));
            let mut is_certain = caller == (pid, thread);
            let is_new = before
                .iter()
                .any(|(owner, fd, _)| (*owner, *fd) == (pid, target));
            if is_new && index < last_creation {
                // The number may have been free at the call and given out after it.
                is_certain &= is_first;
                unproved.push((instance, pid, target));
            }
            if let Some((last, by)) = self.namings.last(pid, target) {
                is_certain &= by == thread;
                if index < last {
                    // The call concerned a description that left the number since. Its entry is
                    // gone with it, unless the description lives on elsewhere.
                    let lives = old(target).is_some_and(|id| self.objects.contains_key(&id));
                    if is_certain && !duplicated && !lives {
                        continue;
                    }
                    is_certain = false;
                }
            }
            if !is_certain {
                doubtful.insert(instance);
                continue;
            }
            // EBADF when the number is free.
            let Some(slot) = self.slot(pid, target) else {
                continue;
            };
            match self.apply_call(instance, operation, target, slot.object, event) {
                Outcome::Unchanged => {}
                Outcome::Changed => {
                    let change = self.interest(instance, target, slot.object);
                    note(&self.volatile, change, changes);
                }
                Outcome::Doubtful => {
                    doubtful.insert(instance);
                }
            }
        }
        for (instance, pid, target) in unproved {
            if !doubtful.contains(&instance) && !self.is_proved(instance, pid, target) {
                doubtful.insert(instance);
            }
        }
        doubtful.retain(|id| self.kind(*id) == Some(Kind::Epoll));
    }

    /// Whether the kernel, too, has an entry for what the number names now, or has none. One
    /// question costs about 15 ns for each entry of the instance, so of one with thousands it is
    /// not asked: only a program that adds a number before a call gave it out could be mistaken.
    fn is_proved(&self, instance: ObjectId, pid: Pid, target: Fd) -> bool {
        const ASKED_ENTRIES_MAX: usize = 4096;
        let Some(entry) = self.objects.get(&instance) else {
            return true;
        };
        let Some(Object::Epoll(state)) = &entry.reading.state else {
            return true;
        };
        let here = entry.slots.iter().find(|(owner, _)| *owner == pid);
        let (Some((_, epoll)), Some(process), Some(slot)) =
            (here, self.processes.get(&pid), self.slot(pid, target))
        else {
            return state.entries.len() > ASKED_ENTRIES_MAX;
        };
        if state.entries.len() > ASKED_ENTRIES_MAX {
            return true;
        }
        let host = process.source.host_pid;
        let expected = state
            .entries
            .binary_search_by_key(&(target, slot.object), EpollEntry::key)
            .is_ok();
        let mut nth = 0;
        loop {
            match kcmp::epoll_target(host, target.0, host, epoll.0, target.0, nth) {
                Ok(order) if order.is_eq() => return expected,
                Ok(_) => nth += 1,
                Err(_) => return !expected,
            }
        }
    }

    fn apply_call(
        &mut self,
        instance: ObjectId,
        operation: i32,
        fd: Fd,
        target: ObjectId,
        event: Option<(u32, u64)>,
    ) -> Outcome {
        let Some(kind) = self.kind(target) else {
            return Outcome::Doubtful;
        };
        let entry = self.objects.get_mut(&instance);
        let Some(state) = entry.and_then(Entry::epoll_mut) else {
            return Outcome::Doubtful;
        };
        let outcome = interest::apply(
            &mut state.entries,
            operation,
            (fd, target, kind.pollable()),
            event,
        );
        if outcome == Outcome::Changed {
            self.unwatch(target, (instance, fd));
            if operation != libc::EPOLL_CTL_DEL
                && let Some(entry) = self.objects.get_mut(&target)
            {
                entry.watched_by.push((instance, fd));
            }
        }
        outcome
    }

    /// What an entry is now.
    fn interest(&self, instance: ObjectId, fd: Fd, target: ObjectId) -> InterestChange {
        let entries = match self.state(instance) {
            Some(Object::Epoll(state)) => state.entries.as_slice(),
            _ => &[],
        };
        let place = entries.binary_search_by_key(&(fd, target), EpollEntry::key);
        let entry = place.ok().map(|place| &entries[place]);
        InterestChange {
            instance,
            fd,
            target,
            event: entry.map(|entry| (entry.events, entry.data)),
        }
    }

    /// Reads an instance from the kernel; whether it differs from the mirror, which has it now.
    pub(super) fn read_epoll(&mut self, id: ObjectId) -> Result<bool, Error> {
        let state = self.epoll_in_kernel(id)?;
        let Some(entry) = self.objects.get_mut(&id) else {
            return Ok(false);
        };
        let new = Object::Epoll(state);
        if entry.reading.state.as_ref() == Some(&new) {
            return Ok(false);
        }
        let old = entry.reading.state.replace(new);
        for (target, fd) in targets(old.as_ref()) {
            self.unwatch(target, (id, fd));
        }
        for (target, fd) in targets(self.state(id)) {
            if let Some(entry) = self.objects.get_mut(&target) {
                entry.watched_by.push((id, fd));
            }
        }
        Ok(true)
    }

    pub(super) fn epoll_in_kernel(&self, id: ObjectId) -> Result<Epoll, Error> {
        let fd = self.duplicate(id)?;
        let place = self
            .objects
            .get(&id)
            .and_then(|entry| entry.slots.first().copied());
        let Some(place) = place else {
            return Err(Error::differs(
                format!("epoll instance {id}"),
                "no slot names it",
            ));
        };
        epoll::capture(fd.as_fd(), |raw| self.resolve(place, raw))
    }

    /// The object that an entry of the instance at `place` watches.
    fn resolve(&self, (pid, instance): (Pid, Fd), raw: &RawEntry) -> Result<ObjectId, Error> {
        // A socket is named by its inode, and most targets are sockets.
        if let Some(id) = self.sockets.get(&raw.inode)
            && self
                .slot(pid, raw.fd)
                .is_some_and(|slot| slot.object == *id)
        {
            return Ok(*id);
        }
        let host = self
            .processes
            .get(&pid)
            .map_or(0, |process| process.source.host_pid);
        let compare = |id| {
            let (owner, slot) = self.certain_slot(id);
            kcmp::epoll_target(owner, slot, host, instance.0, raw.fd.0, raw.nth)
        };
        if let Ok(id) = self.order.find(compare)? {
            return Ok(id);
        }
        let socket = self.sockets.get(&raw.inode).copied();
        socket.filter(|id| compare(*id).is_ok_and(|order| order.is_eq())).ok_or_else(|| {
            Error::refused(
                format!("epoll entry {} of object with inode {}", raw.fd, raw.inode),
                "no process of the service has its target open any more, so nobody could add it",
            )
        })
    }
}

/// Says what became of an entry. An instance with entries that fire by themselves is read in every
/// epoch, and told whole.
fn note(volatile: &BTreeSet<ObjectId>, change: InterestChange, changes: &mut Changes) {
    let fires = |(events, _)| epoll::may_fire(events);
    match volatile.contains(&change.instance) || change.event.is_some_and(fires) {
        true => changes.touch(change.instance),
        false => changes.interests.push(change),
    }
}

fn targets(state: Option<&Object>) -> Vec<(ObjectId, Fd)> {
    match state {
        Some(Object::Epoll(state)) => state
            .entries
            .iter()
            .map(|entry| (entry.target, entry.fd))
            .collect(),
        _ => Vec::new(),
    }
}
