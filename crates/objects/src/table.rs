//! The mirror of the service's descriptor tables: which slots are open, which of them share a
//! description, and what each description's last state was.
//!
//! A [`Mirror::survey`] reads everything. After it, [`Mirror::update`] looks only at what the
//! announcements name; [`Mirror::volatile`] lists what must be looked at without one;
//! [`Mirror::verify`] compares all of it with the kernel. Everything here needs the service
//! stopped. After an error the mirror may be wrong, and a new survey is due.

mod announced;
mod entry;
mod flags;
mod interest;
mod interests;
mod order;
pub(crate) mod process;
mod source;
mod states;
mod verify;

pub use announced::{Announced, Announcement};
pub use source::Source;

use crate::Error;
use crate::classify::classify_into;
use crate::kinds::Kind;
use crate::methods::{Event, Inode, Tools};
use announced::Slots;
use entry::Entry;
use interest::Namings;
use order::Order;
use process::Process;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::AsFd;
use unbroken_image::{Descriptor, DescriptorChange, Fd, InterestChange, ObjectId, Pid};
use unbroken_sys::kcmp;

/// What an update found. The buffers are kept from epoch to epoch.
#[derive(Debug, Default)]
pub struct Changes {
    /// Slots that hold something else now, or nothing.
    pub slots: Vec<(Pid, DescriptorChange)>,
    /// Objects that are new, to be captured.
    pub appeared: Vec<ObjectId>,
    /// Objects that a call changed, to be captured again; of an epoll instance the mirror has the
    /// new state already.
    pub touched: Vec<ObjectId>,
    /// Entries of epoll instances that are not among the others, where what became of them could
    /// be followed.
    pub interests: Vec<InterestChange>,
    /// Objects whose last descriptor is gone.
    pub gone: Vec<ObjectId>,
}

impl Changes {
    pub fn clear(&mut self) {
        self.slots.clear();
        self.appeared.clear();
        self.touched.clear();
        self.interests.clear();
        self.gone.clear();
    }

    fn touch(&mut self, id: ObjectId) {
        if !self.touched.contains(&id) && !self.appeared.contains(&id) {
            self.touched.push(id);
        }
    }
}

/// The descriptor tables of all processes of the service, and the objects in them.
pub struct Mirror {
    processes: BTreeMap<Pid, Process>,
    objects: BTreeMap<ObjectId, Entry>,
    /// Objects that only `kcmp` tells apart.
    order: Order,
    /// Objects that their inode names.
    sockets: HashMap<u64, ObjectId>,
    /// The ends of each pipe.
    ends: BTreeMap<u64, Vec<ObjectId>>,
    volatile: BTreeSet<ObjectId>,
    /// What is to be captured again after which event.
    stale: BTreeSet<(Event, ObjectId)>,
    /// Objects at rest that moved before the last verification, and how, until it is known whether
    /// something woke them (I7).
    moved_at_rest: Vec<(ObjectId, String)>,
    /// How many of the objects are Unix sockets.
    unix_sockets: usize,
    /// Inodes of the pipes behind the service's standard output (1) and error (2).
    outputs: Vec<(u64, u8)>,
    next: u64,
    namings: Namings,
    tools: Tools,
    link: Vec<u8>,
    text: Vec<u8>,
    list: Vec<i32>,
}

impl Mirror {
    /// An empty mirror. `outputs` are the inodes of the pipes whose read ends are ours, with the
    /// stream each carries; `first` is the first object number to give out, above all that were
    /// given out in this term.
    pub fn new(outputs: &[(u64, u8)], first: ObjectId) -> Result<Mirror, Error> {
        Ok(Mirror {
            processes: BTreeMap::new(),
            objects: BTreeMap::new(),
            order: Order::default(),
            sockets: HashMap::new(),
            ends: BTreeMap::new(),
            volatile: BTreeSet::new(),
            stale: BTreeSet::new(),
            moved_at_rest: Vec::new(),
            unix_sockets: 0,
            outputs: outputs.to_vec(),
            next: first.0,
            namings: Namings::default(),
            tools: Tools::new()?,
            link: Vec::new(),
            text: Vec::new(),
            list: Vec::new(),
        })
    }

    /// Forgets everything and reads the whole tree: `changes` then lists every slot and object.
    /// Numbers of objects go on where they were.
    ///
    /// # Errors
    /// [`Error::Refused`] when two processes share a table, or two threads do not.
    pub fn survey(&mut self, sources: Vec<Source>, changes: &mut Changes) -> Result<(), Error> {
        self.processes.clear();
        self.objects.clear();
        self.order = Order::default();
        self.sockets.clear();
        self.ends.clear();
        self.volatile.clear();
        self.stale.clear();
        self.moved_at_rest.clear();
        self.unix_sockets = 0;
        changes.clear();
        let announcements = self.attach_all(sources)?;
        self.update(&announcements, changes)
    }

    fn attach_all(&mut self, sources: Vec<Source>) -> Result<Vec<Announcement>, Error> {
        let mut announcements = Vec::new();
        for source in sources {
            let what = Announced::Everything;
            announcements.push(Announcement {
                pid: source.pid,
                thread: 0,
                what,
            });
            self.attach(source)?;
        }
        Ok(announcements)
    }

    /// Adds a process that `fork` made; its slots come with the next update, which must have
    /// [`Announced::Everything`] for it.
    ///
    /// # Errors
    /// [`Error::Refused`] when it shares its table with another process.
    pub fn attach(&mut self, source: Source) -> Result<(), Error> {
        let others: Vec<i32> = self
            .processes
            .values()
            .map(|process| process.source.host_pid)
            .collect();
        source.refuse_odd_sharing(&others)?;
        self.processes.insert(
            source.pid,
            Process {
                source,
                slots: Slots::default(),
            },
        );
        Ok(())
    }

    /// Takes out a process that ended. Its slots are no changes; `gone` gets the objects that only
    /// it had. Before the update of the same epoch, which ignores its announcements.
    pub fn detach(&mut self, pid: Pid, changes: &mut Changes) {
        let Some(process) = self.processes.remove(&pid) else {
            return;
        };
        let mut lost = BTreeSet::new();
        for (fd, descriptor) in process.slots.all() {
            if let Some(entry) = self.objects.get_mut(&descriptor.object) {
                entry.remove_slot((pid, *fd));
                lost.insert(descriptor.object);
            }
        }
        self.remove_gone(&lost, changes);
    }

    /// Looks at everything that `announcements`, of any number of processes and in the order they
    /// came in, may have changed, and adds what it finds to `changes`, which the caller clears
    /// before each epoch.
    ///
    /// A call that is still blocked at the stop has changed nothing. The kernel makes it anew
    /// afterwards, so that it is announced once more: it need not be remembered.
    pub fn update(
        &mut self,
        announcements: &[Announcement],
        changes: &mut Changes,
    ) -> Result<(), Error> {
        let mut suspects = BTreeMap::new();
        self.collect_suspects(announcements, &mut suspects)?;
        let before = self.take_out(&suspects);
        for (pid, fd, old) in &before {
            self.look_at_slot(*pid, *fd, *old, changes)?;
        }
        let mut duplicated = self.follow_unannounced(announcements, changes)?;
        let lost = before
            .iter()
            .filter_map(|(_, _, old)| old.map(|old| old.object))
            .collect();
        self.remove_gone(&lost, changes);
        self.namings.collect(announcements);
        duplicated |= self.namings.duplicated;
        let named = self.touch_announced(announcements, &before, duplicated, changes)?;
        self.follow_epolls(announcements, &before, (named, duplicated), changes)?;
        self.refresh_volatile(changes);
        Ok(())
    }

    fn collect_suspects(
        &mut self,
        announcements: &[Announcement],
        suspects: &mut BTreeMap<Pid, BTreeSet<Fd>>,
    ) -> Result<(), Error> {
        for announcement in announcements {
            if self.processes.contains_key(&announcement.pid) {
                suspects.entry(announcement.pid).or_default();
            }
        }
        for (pid, found) in suspects {
            let Some(process) = self.processes.get(pid) else {
                continue;
            };
            let own = announcements
                .iter()
                .filter(|announcement| announcement.pid == *pid);
            let own = own.map(|announcement| &announcement.what);
            announced::add_suspects(&process.slots, own.clone(), found);
            if own.clone().any(|what| *what == Announced::Everything) {
                process.source.list(&mut self.list)?;
                found.extend(self.list.iter().map(|fd| Fd(*fd)));
                found.extend(process.slots.all().keys());
            }
        }
        Ok(())
    }

    /// Takes the suspects out of the mirror, so that what is left is certain: what each held.
    fn take_out(
        &mut self,
        suspects: &BTreeMap<Pid, BTreeSet<Fd>>,
    ) -> Vec<(Pid, Fd, Option<Descriptor>)> {
        let mut before = Vec::new();
        let mut unordered = false;
        for (pid, found) in suspects {
            let Some(process) = self.processes.get_mut(pid) else {
                continue;
            };
            for fd in found {
                let old = process.slots.remove(*fd);
                before.push((*pid, *fd, old));
                let entry = old.and_then(|old| self.objects.get_mut(&old.object));
                if let Some(entry) = entry {
                    entry.remove_slot((*pid, *fd));
                    unordered |= entry.slots.is_empty() && entry.kind.inode() != Inode::Unique;
                }
            }
        }
        if unordered {
            // Without a certain slot an object cannot be compared: what is found again in a
            // suspect slot counts as new, unless its inode proves what it is.
            let objects = &self.objects;
            self.order
                .retain(|id| objects.get(id).is_some_and(|entry| !entry.slots.is_empty()));
        }
        before
    }

    /// Finds out what a slot that is not in the mirror holds now.
    fn look_at_slot(
        &mut self,
        pid: Pid,
        fd: Fd,
        old: Option<Descriptor>,
        changes: &mut Changes,
    ) -> Result<(), Error> {
        let new = self.identify(pid, fd, changes)?;
        if let (Some(new), Some(process)) = (new, self.processes.get_mut(&pid)) {
            process.slots.insert(fd, new);
        }
        if new != old {
            changes.slots.push((
                pid,
                DescriptorChange {
                    fd,
                    descriptor: new,
                },
            ));
        }
        Ok(())
    }

    fn identify(
        &mut self,
        pid: Pid,
        fd: Fd,
        changes: &mut Changes,
    ) -> Result<Option<Descriptor>, Error> {
        let Some(process) = self.processes.get(&pid) else {
            return Ok(None);
        };
        let Some(duplicate) = process.source.duplicate(fd)? else {
            return Ok(None);
        };
        let close_on_exec = process.source.close_on_exec(fd, &mut self.text)?;
        let (kind, status) = classify_into(duplicate.as_fd(), &self.outputs, &mut self.link)?;
        let known = if kind.inode() == Inode::Unique {
            self.sockets.get(&status.inode).copied().ok_or(0)
        } else {
            let host_pid = process.source.host_pid;
            self.order.find(|id| {
                let (host, slot) = self.certain_slot(id);
                kcmp::files(host, slot, host_pid, fd.0)
            })?
        };
        let id = match known {
            Ok(id) => id,
            Err(place) => {
                let id = ObjectId(self.next);
                self.next += 1;
                if kind.inode() == Inode::Unique {
                    self.sockets.insert(status.inode, id);
                } else {
                    self.order.insert(place, id);
                }
                self.unix_sockets += usize::from(kind == Kind::Unix);
                if kind.inode() == Inode::OfAllEnds {
                    self.ends.entry(status.inode).or_default().push(id);
                }
                self.objects.insert(id, Entry::new(kind, &status));
                changes.appeared.push(id);
                id
            }
        };
        if let Some(entry) = self.objects.get_mut(&id) {
            entry.add_slot((pid, fd));
        }
        Ok(Some(Descriptor {
            object: id,
            close_on_exec,
        }))
    }

    /// The host pid and number of a slot of an object in `order`. An object without one gives
    /// numbers that no process has, and the comparison fails.
    fn certain_slot(&self, id: ObjectId) -> (i32, i32) {
        let slot = self.objects.get(&id).and_then(|entry| entry.slots.first());
        slot.and_then(|(pid, fd)| Some((self.processes.get(pid)?.source.host_pid, fd.0)))
            .unwrap_or((0, -1))
    }

    /// Descriptors that came in a message over a Unix socket need no announcement: the number of
    /// open ones shows that there are some. Whether any process had any.
    fn follow_unannounced(
        &mut self,
        announcements: &[Announcement],
        changes: &mut Changes,
    ) -> Result<bool, Error> {
        let mut found = false;
        let pids: Vec<Pid> = self.processes.keys().copied().collect();
        for pid in pids {
            let Some(process) = self.processes.get(&pid) else {
                continue;
            };
            let is_announced = announcements.iter().any(|announcement| {
                announcement.pid == pid && announcement.what == Announced::Received
            });
            let is_more = || -> Result<bool, Error> {
                let known = process.slots.all().len() as u64;
                Ok(self.unix_sockets > 0 && process.source.count()? != known)
            };
            if !is_announced && !is_more()? {
                continue;
            }
            found = true;
            process.source.list(&mut self.list)?;
            let list = std::mem::take(&mut self.list);
            for fd in list.iter().map(|fd| Fd(*fd)) {
                let is_known = self
                    .processes
                    .get(&pid)
                    .is_some_and(|process| process.slots.get(fd).is_some());
                if !is_known {
                    self.look_at_slot(pid, fd, None, changes)?;
                }
            }
            self.list = list;
        }
        Ok(found)
    }

    /// Removes the objects of `lost` that no slot names any more.
    fn remove_gone(&mut self, lost: &BTreeSet<ObjectId>, changes: &mut Changes) {
        for id in lost {
            if self
                .objects
                .get(id)
                .is_none_or(|entry| !entry.slots.is_empty())
            {
                continue;
            }
            let Some(entry) = self.objects.remove(id) else {
                continue;
            };
            changes.gone.push(*id);
            self.volatile.remove(id);
            self.unix_sockets -= usize::from(entry.kind == Kind::Unix);
            if entry.kind.inode() == Inode::Unique {
                self.sockets.remove(&entry.identity.inode);
            } else {
                self.order.retain(|other| other != id);
            }
            if let Some(ends) = self.ends.get_mut(&entry.identity.inode) {
                ends.retain(|end| end != id);
                if ends.is_empty() {
                    self.ends.remove(&entry.identity.inode);
                }
            }
            if let Some(methods) = entry.kind.methods_if_any()
                && let Some(event) = entry.reading.state.as_ref().and_then(methods.stale_after)
            {
                self.stale.remove(&(event, *id));
            }
            self.forget_interest(*id, &entry, changes);
        }
    }
}
