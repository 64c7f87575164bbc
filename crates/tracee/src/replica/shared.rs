//! Memory that several mappings share, and perhaps a descriptor: one memfd for each identity.

use super::ReplicaError;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::{Backing, FileIdentity, Mapping};
use unbroken_sys::{descriptor, memfd};

#[derive(Debug, Default)]
pub(super) struct SharedObjects {
    objects: HashMap<FileIdentity, Object>,
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
        end_bytes: u64,
    ) -> Result<(), ReplicaError> {
        let object = match self.objects.entry(identity) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                // Seals may follow: it may be the memfd of a descriptor, too.
                let file = memfd::create(c"unbroken", libc::MFD_ALLOW_SEALING)
                    .map_err(ReplicaError::own("make shared memory"))?;
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

    pub(super) fn punch(
        &self,
        identity: FileIdentity,
        offset: u64,
        length_bytes: u64,
    ) -> Result<(), ReplicaError> {
        let file = self
            .get(identity)
            .ok_or(ReplicaError::UnknownMemory { identity })?;
        memfd::punch_hole(file, offset, length_bytes)
            .map_err(ReplicaError::own("empty shared memory"))
    }

    /// Forgets the objects that none of `mappings` shows.
    pub(super) fn keep_only<'a>(&mut self, mappings: impl Iterator<Item = &'a Mapping>) {
        let mut shown: Vec<FileIdentity> = mappings
            .filter_map(|mapping| match mapping.backing {
                Backing::SharedMemory { identity, .. } => Some(identity),
                _ => None,
            })
            .collect();
        shown.sort_unstable();
        self.objects
            .retain(|identity, _| shown.binary_search(identity).is_ok());
    }
}
