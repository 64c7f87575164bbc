//! Memory that several mappings share, and perhaps a descriptor: one memfd for each identity.
//!
//! Pages come through the mappings, and what was written by `write(2)`, which no page table shows,
//! comes with the state of the memfd: both are put in as they come, so the later one counts. A
//! memfd with a descriptor is kept without a mapping, too, because it may be mapped again.

use super::ReplicaError;
use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::MemoryFile;
use unbroken_image::{Backing, FileIdentity, Mapping, Object as KernelObject, ObjectId};
use unbroken_sys::{descriptor, memfd};

#[derive(Debug, Default)]
pub(super) struct SharedObjects {
    objects: HashMap<FileIdentity, Object>,
    /// The memfds that have a descriptor.
    described: HashMap<ObjectId, FileIdentity>,
}

#[derive(Debug)]
struct Object {
    file: OwnedFd,
    length_bytes: u64,
}

impl SharedObjects {
    /// Makes sure that the object exists and reaches to `end_bytes`.
    pub(super) fn provide(
        &mut self,
        identity: FileIdentity,
        name: &str,
        end_bytes: u64,
    ) -> Result<(), ReplicaError> {
        let object = match self.objects.entry(identity) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let failed = || ReplicaError::own("make shared memory");
                let name = CString::new(name).map_err(|error| failed()(error.into()))?;
                // Seals may follow: it may be the memfd of a descriptor, too.
                let file = memfd::create(&name, libc::MFD_ALLOW_SEALING).map_err(failed())?;
                entry.insert(Object {
                    file,
                    length_bytes: 0,
                })
            }
        };
        if object.length_bytes < end_bytes {
            descriptor::truncate(object.file.as_fd(), end_bytes)
                .map_err(ReplicaError::own("give shared memory its length"))?;
            object.length_bytes = end_bytes;
        }
        Ok(())
    }

    pub(super) fn get(&self, identity: FileIdentity) -> Option<BorrowedFd<'_>> {
        self.objects
            .get(&identity)
            .map(|object| object.file.as_fd())
    }

    pub(super) fn write(
        &self,
        identity: FileIdentity,
        content: &[u8],
        offset: u64,
    ) -> Result<(), ReplicaError> {
        let file = self
            .get(identity)
            .ok_or(ReplicaError::UnknownMemory { identity })?;
        let mut done = 0;
        while done < content.len() {
            done += descriptor::write_at(file, &content[done..], offset + done as u64)
                .map_err(ReplicaError::own("write shared memory"))?;
        }
        Ok(())
    }

    /// Takes in the memfds of an epoch: `changed` are the states of objects, whole.
    pub(super) fn take_states(
        &mut self,
        changed: &[(ObjectId, KernelObject)],
        gone: &[ObjectId],
    ) -> Result<(), ReplicaError> {
        for id in gone {
            self.described.remove(id);
        }
        for (id, object) in changed {
            if let KernelObject::MemoryFile(state) = object {
                self.described.insert(*id, state.identity);
                self.take_content(state)?;
            }
        }
        Ok(())
    }

    fn take_content(&mut self, state: &MemoryFile) -> Result<(), ReplicaError> {
        let identity = state.identity;
        self.provide(identity, &state.name, state.length_bytes)?;
        let Some(object) = self.objects.get_mut(&identity) else {
            return Ok(());
        };
        // What was emptied since must not show through, and it may have been cut short.
        for length_bytes in [0, state.length_bytes] {
            descriptor::truncate(object.file.as_fd(), length_bytes)
                .map_err(ReplicaError::own("give shared memory its length"))?;
        }
        object.length_bytes = state.length_bytes;
        for (start, bytes) in &state.content {
            self.write(identity, bytes, *start)?;
        }
        Ok(())
    }

    /// Forgets the objects that have no descriptor and that none of `mappings` shows.
    pub(super) fn keep_only<'a>(&mut self, mappings: impl Iterator<Item = &'a Mapping>) {
        if self.objects.is_empty() {
            return;
        }
        let mut kept: HashSet<FileIdentity> = mappings
            .filter_map(|mapping| match mapping.backing {
                Backing::SharedMemory { identity, .. } => Some(identity),
                _ => None,
            })
            .collect();
        kept.extend(self.described.values());
        self.objects.retain(|identity, _| kept.contains(identity));
    }
}
