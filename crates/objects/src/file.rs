//! Regular files: opened again, whatever their names are, at the same position, with the same locks.
//!
//! The replica works on the very file of the service (on one machine it is the same one), so at a
//! takeover the file can be ahead of the committed state. [`cut_back`] removes what a sequential
//! writer appended after the commit, because the replica will write it again. Bytes that were
//! overwritten in the middle after the commit are not rolled back.

mod locks;

pub use locks::{add_locks, lock_again, locks_of_process, lost_lock, process_locks};

use crate::description::{
    UNCHECKED, identity_of, open_again, path_of, position_of, refuse_ownership, set_position,
};
use crate::methods::{Capture, Look, Means, Methods, Pollable, Reading};
use crate::restored::{Batch, Phase, Restored, Scene, make_each};
use crate::watch::position_and_flags;
use crate::{Context, Error, proc_file};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::RegularFile;
use unbroken_image::{Object, Pid};
use unbroken_sys::{descriptor, fdinfo};

pub(crate) const METHODS: Methods = Methods {
    pollable: Pollable::No,
    is_volatile: |_| true,
    look,
    stale_after: |object| match object {
        Object::RegularFile(state) => proc_file::stale_after(&state.path),
        _ => None,
    },
    ..Methods::new(
        Capture::Descriptor(read),
        &[
            (Phase::Make, |batch, scene, restored| {
                make_each(batch, restored, |_, object| match object {
                    Object::RegularFile(state) => {
                        restore(state, scene.reference(state.identity)).map(Some)
                    }
                    _ => Ok(None),
                })
            }),
            (Phase::OldServiceEnded, take_over),
        ],
    )
};

fn read(reading: &mut Reading, fd: BorrowedFd<'_>, means: &mut Means<'_>) -> Result<(), Error> {
    let mut state = capture(fd)?;
    if state.identity == UNCHECKED {
        let opened = (state.path, state.flags);
        let host_pid = |pid| means.holders.host_pid(pid);
        state.path = proc_file::path_for_replica(fd, opened, host_pid)?;
    }
    reading.watches.open(&means.holders)?;
    reading.watches.refer(&means.holders)?;
    // Those of a process show in that process's own fdinfo alone.
    for (pid, text) in reading.watches.texts() {
        add_locks(text, pid, &mut state)?;
    }
    reading.state = Some(Object::RegularFile(state));
    Ok(())
}

fn look(reading: &mut Reading, _: &mut Means<'_>) -> Result<Look, Error> {
    let differs = reading.watches.read()?;
    let (Some(text), Some(Object::RegularFile(state))) =
        (reading.watches.text(), &mut reading.state)
    else {
        return Ok(Look::Unknown);
    };
    let length_bytes = match state.length_bytes {
        Some(_) => reading.watches.status()?.map(|(now, _)| now.length_bytes),
        None => None,
    };
    if !differs && state.length_bytes == length_bytes {
        return Ok(Look::Same);
    }
    match position_and_flags(text) {
        Some((position, flags)) if flags == state.flags => {
            state.position = position;
            state.length_bytes = length_bytes;
        }
        _ => return Ok(Look::Unknown),
    }
    state.locks.clear();
    for (pid, text) in reading.watches.texts() {
        add_locks(text, pid, state)?;
    }
    Ok(Look::Refreshed)
}

/// Reads out a descriptor of ours that names a regular file. Locks of a process (`F_SETLK`) show
/// only in that process's own fdinfo: see [`add_locks`].
pub fn capture(fd: BorrowedFd<'_>) -> Result<RegularFile, Error> {
    let path = path_of(fd)?;
    let flags = descriptor::status_flags(fd).during("read the flags of", &path)?;
    refuse_ownership(fd, flags, &path)?;
    let identity = identity_of(fd, &path)?;
    let writable = flags & libc::O_ACCMODE != libc::O_RDONLY && flags & libc::O_PATH == 0;
    let length_bytes = if writable && identity != UNCHECKED {
        Some(
            descriptor::status(fd)
                .during("look at", &path)?
                .length_bytes,
        )
    } else {
        None
    };
    let mut state = RegularFile {
        position: position_of(fd, flags, &path)?,
        path,
        identity,
        flags,
        length_bytes,
        locks: Vec::new(),
    };
    let mut text = Vec::new();
    fdinfo::own_fdinfo(fd, &mut text).during("read the locks of", &state.path)?;
    // Our duplicate is in our own table, so that no lock of a process shows here.
    add_locks(&text, Pid(0), &mut state)?;
    Ok(state)
}

/// Opens the file of `reference`, or, if it has no lasting identity, that of its path in the calling
/// thread's mount namespace, and puts the position back. Locks come later: see [`lock_again`] and
/// [`process_locks`].
pub fn restore(state: &RegularFile, reference: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    let fd = open_again((&state.path, state.flags), state.identity, reference)?;
    set_position(fd.as_fd(), state.flags, state.position, &state.path)?;
    Ok(fd)
}

/// What [`cut_back`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutBack {
    /// The file has its committed length, or the description cannot write.
    Unchanged,
    /// What was appended after the commit is gone.
    Cut { from_bytes: u64, to_bytes: u64 },
    /// The file is longer, but the description does not write at its end, so the rest may be
    /// another writer's.
    LongerKept {
        committed_bytes: u64,
        now_bytes: u64,
    },
    /// The file is shorter: it was truncated after the commit, and that cannot be undone.
    Shorter {
        committed_bytes: u64,
        now_bytes: u64,
    },
}

/// Cuts the restored file back to its committed length when the description is a sequential
/// writer: it appends (`O_APPEND`), or its position was the end of the file at the commit. Only
/// after the service that wrote to it is dead, and before the replica runs.
pub fn cut_back(fd: BorrowedFd<'_>, state: &RegularFile) -> Result<CutBack, Error> {
    let Some(committed_bytes) = state.length_bytes else {
        return Ok(CutBack::Unchanged);
    };
    let now_bytes = descriptor::status(fd)
        .during("look at", &state.path)?
        .length_bytes;
    let sequential = state.flags & libc::O_APPEND != 0 || state.position >= committed_bytes;
    if now_bytes == committed_bytes {
        Ok(CutBack::Unchanged)
    } else if now_bytes < committed_bytes {
        Ok(CutBack::Shorter {
            committed_bytes,
            now_bytes,
        })
    } else if !sequential {
        Ok(CutBack::LongerKept {
            committed_bytes,
            now_bytes,
        })
    } else {
        descriptor::truncate(fd, committed_bytes).during("cut back", &state.path)?;
        Ok(CutBack::Cut {
            from_bytes: now_bytes,
            to_bytes: committed_bytes,
        })
    }
}

/// What was appended after the last epoch is taken back, and what descriptions had locked is locked
/// again.
fn take_over(batch: &Batch<'_>, _: &Scene, restored: &mut Restored) -> Result<(), Error> {
    for (id, object) in batch {
        if let (Object::RegularFile(state), Some(descriptor)) =
            (object, restored.descriptors.get(id))
        {
            match cut_back(descriptor.as_fd(), state)? {
                CutBack::Unchanged | CutBack::Cut { .. } => {}
                other => restored
                    .shortcomings
                    .push(format!("{}: {other:?}", state.path)),
            }
            if !lock_again(descriptor.as_fd(), state)? {
                restored.shortcomings.push(lost_lock(&state.path));
            }
        }
    }
    Ok(())
}
