//! Open directories.

use crate::methods::{Capture, Look, Means, Methods, Pollable, Reading};
use crate::restored::{Phase, make_each};
use crate::watch::position_and_flags;
use crate::{Context, Error, description, proc_file};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::Object;
use unbroken_image::object::Directory;
use unbroken_sys::descriptor;

pub(crate) const METHODS: Methods = Methods {
    pollable: Pollable::No,
    is_volatile: |_| true,
    look,
    stale_after: |object| match object {
        Object::Directory(state) => proc_file::stale_after(&state.path),
        _ => None,
    },
    ..Methods::new(
        Capture::Descriptor(|reading, fd, means| {
            let mut state = capture(fd)?;
            if state.identity == description::UNCHECKED {
                let opened = (state.path, state.flags);
                let host_pid = |pid| means.holders.host_pid(pid);
                state.path = proc_file::path_for_replica(fd, opened, host_pid)?;
            }
            reading.state = Some(Object::Directory(state));
            reading.watches.refer(&means.holders)?;
            reading.watches.open(&means.holders)
        }),
        &[(Phase::Make, |batch, scene, restored| {
            make_each(batch, restored, |_, object| match object {
                Object::Directory(state) => {
                    restore(state, scene.reference(state.identity)).map(Some)
                }
                _ => Ok(None),
            })
        })],
    )
};

fn look(reading: &mut Reading, _: &mut Means<'_>) -> Result<Look, Error> {
    if !reading.watches.read()? {
        return Ok(Look::Same);
    }
    let told = reading.watches.text().and_then(position_and_flags);
    match (&mut reading.state, told) {
        (Some(Object::Directory(state)), Some((position, flags))) if flags == state.flags => {
            state.position = position;
            Ok(Look::Refreshed)
        }
        _ => Ok(Look::Unknown),
    }
}

/// Reads out a descriptor of ours that names a directory.
pub fn capture(fd: BorrowedFd<'_>) -> Result<Directory, Error> {
    let path = description::path_of(fd)?;
    let flags = descriptor::status_flags(fd).during("read the flags of", &path)?;
    Ok(Directory {
        identity: description::identity_of(fd, &path)?,
        position: description::position_of(fd, flags, &path)?,
        flags,
        path,
    })
}

/// Opens the directory of `reference`, or, if it has no lasting identity, that of its path in the
/// calling thread's mount namespace.
pub fn restore(state: &Directory, reference: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    let opened = (state.path.as_str(), state.flags);
    let fd = description::open_again(opened, state.identity, reference)?;
    description::set_position(fd.as_fd(), state.flags, state.position, &state.path)?;
    Ok(fd)
}
