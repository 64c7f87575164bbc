//! Open directories.

use crate::{Context, Error, file};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::Directory;
use unbroken_sys::descriptor;

/// Reads out a descriptor of ours that names a directory.
pub fn capture(fd: BorrowedFd<'_>) -> Result<Directory, Error> {
    let path = file::path_of(fd)?;
    if path.ends_with(" (deleted)") {
        return Err(Error::refused(
            format!("the directory {path}"),
            "it has no path by which the replica could open it",
        ));
    }
    let flags = descriptor::status_flags(fd).during("read the flags of", &path)?;
    Ok(Directory {
        identity: file::identity_of(fd, &path)?,
        position: file::position_of(fd, flags, &path)?,
        flags,
        path,
    })
}

/// Opens the directory in the calling thread's mount namespace, or by `reference`, an `O_PATH`
/// descriptor of it.
///
/// # Errors
/// [`Error::Differs`] when the path leads to another directory here.
pub fn restore(state: &Directory, reference: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    let fd = file::open_again(&state.path, state.flags, state.identity, reference)?;
    file::set_position(fd.as_fd(), state.flags, state.position, &state.path)?;
    Ok(fd)
}
