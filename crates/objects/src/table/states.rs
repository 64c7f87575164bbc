//! The states of objects: full captures, and which need a look in every epoch.

use super::entry::Entry;
use super::process::Holders;
use super::{Changes, Mirror};
use crate::Error;
use crate::kinds::Kind;
use crate::methods::{Capture, Event, Inode, Look, Means, Methods, Others};
use crate::tcp::known::Known;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use unbroken_image::{Descriptor, Fd, Object, ObjectId, Pid};

impl Mirror {
    /// The slots of every process, for [`crate::epoll::plan`].
    pub fn tables(&self) -> BTreeMap<Pid, BTreeMap<Fd, Descriptor>> {
        self.processes
            .iter()
            .map(|(pid, process)| (*pid, process.slots.all().clone()))
            .collect()
    }

    /// What a slot holds.
    pub fn slot(&self, pid: Pid, fd: Fd) -> Option<Descriptor> {
        self.processes.get(&pid)?.slots.get(fd)
    }

    /// How many descriptors a process has open.
    pub fn open_slots(&self, pid: Pid) -> usize {
        let process = self.processes.get(&pid);
        process.map_or(0, |process| process.slots.all().len())
    }

    /// The kind of an object.
    pub fn kind(&self, id: ObjectId) -> Option<Kind> {
        self.objects.get(&id).map(|entry| entry.kind)
    }

    /// The state of an object at its last capture or look.
    pub fn state(&self, id: ObjectId) -> Option<&Object> {
        self.objects.get(&id)?.reading.state.as_ref()
    }

    /// A descriptor (`O_PATH`) of the file, directory or FIFO that an object names, whatever becomes of
    /// its name.
    pub fn reference(&self, id: ObjectId) -> Option<&Arc<OwnedFd>> {
        self.objects.get(&id)?.reading.watches.reference()
    }

    /// A number for an object that stands in no table.
    pub fn number_unlisted(&mut self) -> ObjectId {
        let id = ObjectId(self.next);
        self.next += 1;
        id
    }

    /// The objects that must be looked at in every epoch, announced or not: their state changes
    /// by calls that nobody announces, or by none. A TCP connection that a look found at rest is not
    /// among them.
    pub fn volatile(&self) -> impl Iterator<Item = (ObjectId, Kind)> + '_ {
        self.volatile
            .iter()
            .filter_map(|id| Some((*id, self.objects.get(id)?.kind)))
    }

    /// Says that an object at rest must be looked at again in every epoch.
    pub fn wake(&mut self, id: ObjectId) {
        let entry = self.objects.get(&id);
        if entry.is_some_and(Entry::is_volatile) {
            self.volatile.insert(id);
        }
    }

    /// Adds the objects that are stale after `event` to those that a call changed.
    pub fn touch_stale(&self, event: Event, changes: &mut Changes) {
        let stale = self.stale.iter().filter(|(after, _)| *after == event);
        stale.for_each(|(_, id)| changes.touch(*id));
    }

    pub(super) fn refresh_volatile(&mut self, changes: &Changes) {
        for id in changes.appeared.iter().chain(&changes.touched) {
            self.refresh_one(*id);
        }
    }

    fn refresh_one(&mut self, id: ObjectId) {
        let Some(entry) = self.objects.get(&id) else {
            return;
        };
        if entry.is_volatile() {
            self.volatile.insert(id);
        } else {
            self.volatile.remove(&id);
        }
    }

    /// A fresh duplicate of an object, to be closed before the service goes on.
    ///
    /// # Errors
    /// `EBADF` when no slot of the mirror names it.
    pub(super) fn duplicate(&self, id: ObjectId) -> Result<OwnedFd, Error> {
        let entry = self.objects.get(&id);
        let entry = entry.ok_or_else(|| Error::differs(format!("object {id}"), "it is unknown"))?;
        self.duplicate_of(entry)
    }

    fn duplicate_of(&self, entry: &Entry) -> Result<OwnedFd, Error> {
        let holders = Holders {
            processes: &self.processes,
            slots: &entry.slots,
        };
        holders.require_duplicate()
    }

    /// Captures an object whole: after it appeared or was touched. The state stays in the mirror.
    ///
    /// # Errors
    /// [`Error::Refused`] when no replica can have the object.
    pub fn capture(&mut self, id: ObjectId, known: &Known<'_>) -> Result<Option<&Object>, Error> {
        self.read(id, true, known)?;
        Ok(self.state(id))
    }

    /// Looks cheaply at a volatile object, and captures it again when that does not tell all: the
    /// new state, or `None` when it is as it was.
    pub fn look(&mut self, id: ObjectId, known: &Known<'_>) -> Result<Option<&Object>, Error> {
        let Some(entry) = self.objects.get_mut(&id) else {
            return Ok(None);
        };
        let methods = entry.kind.methods()?;
        if let Capture::Mirror = methods.capture {
            let changed = self.read_epoll(id)?;
            self.refresh_one(id);
            return Ok(if changed { self.state(id) } else { None });
        }
        let look = match entry.reading.state {
            None => Look::Unknown,
            Some(_) => {
                let mut means = Means {
                    holders: Holders {
                        processes: &self.processes,
                        slots: &entry.slots,
                    },
                    announced: false,
                    other_ends: &[],
                    outputs: &self.outputs,
                    known,
                    tools: &mut self.tools,
                };
                (methods.look)(&mut entry.reading, &mut means)?
            }
        };
        match look {
            Look::Same => Ok(None),
            Look::AtRest => {
                self.volatile.remove(&id);
                Ok(None)
            }
            Look::Refreshed => {
                let state = self.state(id);
                if let Some(state) = state {
                    refuse(methods, state, &self.sockets)?;
                }
                Ok(state)
            }
            Look::Unknown => {
                let before = entry.reading.state.clone();
                self.read(id, false, known)?;
                let state = self.state(id);
                Ok(if state == before.as_ref() {
                    None
                } else {
                    state
                })
            }
        }
    }

    fn read(&mut self, id: ObjectId, announced: bool, known: &Known<'_>) -> Result<(), Error> {
        let Some(entry) = self.objects.get(&id) else {
            return Ok(());
        };
        let methods = entry.kind.methods()?;
        let Capture::Descriptor(capture) = methods.capture else {
            // An update has read it already, or followed the calls.
            return Ok(());
        };
        let fd = self.duplicate_of(entry)?;
        let other_ends = match methods.inode {
            Inode::OfAllEnds => self.other_ends(id, entry)?,
            Inode::Unique | Inode::Shared => Vec::new(),
        };
        let Some(entry) = self.objects.get_mut(&id) else {
            return Ok(());
        };
        let mut means = Means {
            holders: Holders {
                processes: &self.processes,
                slots: &entry.slots,
            },
            announced,
            other_ends: &other_ends,
            outputs: &self.outputs,
            known,
            tools: &mut self.tools,
        };
        capture(&mut entry.reading, fd.as_fd(), &mut means)?;
        if let Some(state) = &entry.reading.state {
            refuse(methods, state, &self.sockets)?;
            self.stale
                .extend((methods.stale_after)(state).map(|event| (event, id)));
        }
        match entry.is_volatile() {
            true => self.volatile.insert(id),
            false => self.volatile.remove(&id),
        };
        Ok(())
    }

    /// Duplicates of the other ends of a pipe.
    fn other_ends(&self, id: ObjectId, entry: &Entry) -> Result<Vec<OwnedFd>, Error> {
        let ends = self.ends.get(&entry.identity.inode).into_iter().flatten();
        ends.filter(|end| **end != id)
            .map(|end| self.duplicate(*end))
            .collect()
    }
}

/// What a restore would refuse.
fn refuse(
    methods: &Methods,
    state: &Object,
    sockets: &HashMap<u64, ObjectId>,
) -> Result<(), Error> {
    let others = Others {
        has_socket: &|inode| sockets.contains_key(&inode),
    };
    (methods.refuse)(state, &others)
}
