//! The states of objects: full captures, and which need a look in every epoch.

use super::entry::Look;
use super::{Changes, Mirror, duplicate};
use crate::{Context, Error, Kind};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use unbroken_image::{Descriptor, Fd, FileIdentity, Object, ObjectId, Pid};
use unbroken_sys::descriptor;

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

    /// All objects and their kinds.
    pub fn objects(&self) -> impl Iterator<Item = (ObjectId, Kind)> + '_ {
        self.objects.iter().map(|(id, entry)| (*id, entry.kind))
    }

    /// The kind of an object.
    pub fn kind(&self, id: ObjectId) -> Option<Kind> {
        self.objects.get(&id).map(|entry| entry.kind)
    }

    /// The state of an object at its last capture; `None` for sockets.
    pub fn state(&self, id: ObjectId) -> Option<&Object> {
        self.objects.get(&id)?.state.as_ref()
    }

    /// Says which memfds are mapped somewhere in the service: their content is left out of later
    /// captures, because it travels with memory.
    pub fn set_mapped(&mut self, identities: impl IntoIterator<Item = FileIdentity>) {
        self.mapped.clear();
        self.mapped.extend(identities);
    }

    /// The number that the next new object will get.
    pub fn next_object(&self) -> ObjectId {
        ObjectId(self.next)
    }

    /// A number for an object that stands in no table.
    pub fn number_unlisted(&mut self) -> ObjectId {
        let id = self.next_object();
        self.next += 1;
        id
    }

    /// The objects that must be looked at in every epoch, announced or not: their state changes
    /// by calls that nobody announces. TCP connections are among them until they are marked
    /// quiet.
    pub fn volatile(&self) -> impl Iterator<Item = (ObjectId, Kind)> + '_ {
        self.volatile
            .iter()
            .filter_map(|id| Some((*id, self.objects.get(id)?.kind)))
    }

    /// Says that a socket needs no look until [`Mirror::mark_active`] (KERNEL.md, Quiet
    /// connections).
    pub fn mark_quiet(&mut self, id: ObjectId) {
        self.volatile.remove(&id);
    }

    /// Says that a socket must be looked at again in every epoch.
    pub fn mark_active(&mut self, id: ObjectId) {
        if self
            .objects
            .get(&id)
            .is_some_and(|entry| entry.is_volatile())
        {
            self.volatile.insert(id);
        }
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

    /// A fresh duplicate of an object, for the modules of the sockets; to be closed before the
    /// service goes on.
    ///
    /// # Errors
    /// `EBADF` when no slot of the mirror names it.
    pub fn duplicate(&self, id: ObjectId) -> Result<OwnedFd, Error> {
        let slots = self
            .objects
            .get(&id)
            .map(|entry| entry.slots.as_slice())
            .unwrap_or_default();
        duplicate(&self.processes, slots)?
            .ok_or_else(|| std::io::Error::from_raw_os_error(libc::EBADF))
            .during("take a duplicate of object", id)
    }

    /// Captures an object of any kind but a socket whole: after it appeared or was touched. The
    /// state stays in the mirror.
    ///
    /// # Errors
    /// [`Error::Refused`] when no replica can have the object.
    pub fn capture(&mut self, id: ObjectId) -> Result<Option<&Object>, Error> {
        self.refuse_outside_pipe(id)?;
        self.capture_announced(id, true)?;
        Ok(self.state(id))
    }

    /// Looks cheaply at a volatile object that is no socket, and captures it again when something
    /// changed: the new state, or `None` when it is as it was.
    pub fn look(&mut self, id: ObjectId) -> Result<Option<&Object>, Error> {
        let Some(entry) = self.objects.get_mut(&id) else {
            return Ok(None);
        };
        if entry.kind == Kind::Epoll {
            let changed = self.read_epoll(id)?;
            self.refresh_one(id);
            return Ok(if changed { self.state(id) } else { None });
        }
        if entry.kind.is_socket() {
            return Ok(None);
        }
        match entry.look(&self.processes, &mut self.scratch)? {
            Look::Same => Ok(None),
            Look::Refreshed => Ok(self.state(id)),
            Look::Unknown => {
                let before = entry.state.clone();
                self.capture_announced(id, false)?;
                let state = self.state(id);
                Ok(if state == before.as_ref() {
                    None
                } else {
                    state
                })
            }
        }
    }

    fn capture_announced(&mut self, id: ObjectId, announced: bool) -> Result<(), Error> {
        if self.kind(id) == Some(Kind::Epoll) {
            // An update has read it already, or followed the calls.
            return Ok(());
        }
        let fd = self.duplicate(id)?;
        let Some(entry) = self.objects.get_mut(&id) else {
            return Ok(());
        };
        let mapped = self.mapped.contains(&entry.identity);
        entry.capture(
            fd.as_fd(),
            (announced, mapped),
            &self.processes,
            &mut self.scratch,
        )?;
        self.refresh_one(id);
        Ok(())
    }

    /// Refuses a pipe whose other end some process outside the service has open.
    fn refuse_outside_pipe(&self, id: ObjectId) -> Result<(), Error> {
        let Some(entry) = self.objects.get(&id) else {
            return Ok(());
        };
        if !matches!(entry.kind, Kind::Pipe | Kind::Fifo) || entry.output.is_some() {
            return Ok(());
        }
        let fd = self.duplicate(id)?;
        let access = access_mode(&fd)?;
        if access == libc::O_RDWR || self.has_other_end(id, access)? {
            return Ok(());
        }
        // The kernel says whether there is any other end at all.
        let (events, closed) = match access {
            libc::O_RDONLY => (libc::POLLIN, libc::POLLHUP),
            _ => (libc::POLLOUT, libc::POLLERR),
        };
        let ready = descriptor::poll_now(fd.as_fd(), events).during("poll", "a pipe")?;
        // A FIFO that never had a writer shows no hang-up, and nothing can have come through it.
        let is_unused = entry.kind == Kind::Fifo && ready == 0 && access == libc::O_RDONLY;
        if ready & closed != 0 || is_unused {
            return Ok(());
        }
        Err(Error::refused(
            format!(
                "a {} with inode {}",
                entry.kind.name(),
                entry.identity.inode
            ),
            "a process outside the service holds its other end; start that process as part of \
             the service, or give the service /dev/null or a file instead",
        ))
    }

    fn has_other_end(&self, id: ObjectId, access: i32) -> Result<bool, Error> {
        let Some(entry) = self.objects.get(&id) else {
            return Ok(false);
        };
        for other in self.pipes.get(&entry.identity.inode).into_iter().flatten() {
            if *other != id && access_mode(&self.duplicate(*other)?)? != access {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn access_mode(fd: &OwnedFd) -> Result<i32, Error> {
    let flags = descriptor::status_flags(fd.as_fd()).during("read the flags of", "a pipe")?;
    Ok(flags & libc::O_ACCMODE)
}
