//! Where the replica's files are: references to what the service has open, mapped, or stands in.

use super::ReplicaError;
use super::calls::{Calls, Expect};
use super::descriptors::give;
use crate::{HostTid, Stopped};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::{FileIdentity, NamedDirectory, ProcessState};
use unbroken_sys::channel::Channel;
use unbroken_sys::{descriptor, fdinfo};

/// Descriptors (`O_PATH`) of the files that an epoch names, whatever their names are by now.
pub type References = HashMap<FileIdentity, OwnedFd>;

#[derive(Clone, Copy)]
pub struct Files<'a> {
    pub references: &'a References,
    /// The root of the replica's mount namespace.
    pub root: BorrowedFd<'a>,
}

impl Files<'_> {
    fn reference(&self, identity: FileIdentity) -> Result<BorrowedFd<'_>, ReplicaError> {
        let reference = self.references.get(&identity).map(OwnedFd::as_fd);
        reference.ok_or(ReplicaError::UnknownFile { identity })
    }

    pub(super) fn open(
        &self,
        identity: FileIdentity,
        writable: bool,
    ) -> Result<OwnedFd, ReplicaError> {
        let flags = if writable {
            libc::O_RDWR
        } else {
            libc::O_RDONLY
        };
        fdinfo::reopen(self.reference(identity)?, flags)
            .map_err(ReplicaError::own("open a mapped file"))
    }

    fn directory(&self, directory: &NamedDirectory) -> Result<OwnedFd, ReplicaError> {
        let failed = ReplicaError::own("open a directory that the service stands in");
        let opened = if directory.identity == FileIdentity::default() {
            let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
            fdinfo::c_path(&directory.path)
                .and_then(|path| descriptor::open_beneath(self.root, &path, flags))
        } else {
            self.reference(directory.identity)?.try_clone_to_owned()
        };
        opened.map_err(failed)
    }
}

/// Brings a process to the root and the working directory of `state`, from those of `before`.
pub(super) fn enter(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    channel: &Channel,
    files: Files<'_>,
    (before, state): (Option<&ProcessState>, &ProcessState),
) -> Result<(), ReplicaError> {
    let places = |state: &ProcessState| {
        let (working, root) = (&state.working_directory, &state.root_directory);
        (working.clone(), root.clone())
    };
    if before.map(places) == Some(places(state)) {
        return Ok(());
    }
    for (directory, is_root) in [
        (&state.root_directory, true),
        (&state.working_directory, false),
    ] {
        let opened = files.directory(directory)?;
        let mut calls = Calls::new(stopped, leader);
        give(&mut calls, channel, opened.as_fd())?;
        calls.add("fchdir", libc::SYS_fchdir, &[0], Expect::Success)?;
        if is_root {
            let here = calls.string(b".")?;
            calls.add("chroot", libc::SYS_chroot, &[here.0], Expect::Success)?;
        }
        calls.add("close", libc::SYS_close, &[0], Expect::Success)?;
        calls.run()?;
    }
    Ok(())
}
