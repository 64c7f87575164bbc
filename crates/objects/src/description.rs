//! What open file descriptions of several kinds share: path, identity, position, flags, owner.

use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::FileIdentity;
use unbroken_image::object::Ownership;
use unbroken_sys::descriptor::Status;
use unbroken_sys::{descriptor, fdinfo};

/// The identity of files that have none that lasts ([`descriptor::has_lasting_identity`]): their paths
/// stand for them.
pub(crate) const UNCHECKED: FileIdentity = FileIdentity {
    device: 0,
    inode: 0,
};

// include/uapi/linux/magic.h
const PROC_SUPER_MAGIC: i64 = 0x9fa0;

pub(crate) fn is_of_proc(fd: BorrowedFd<'_>, path: &str) -> Result<bool, Error> {
    let magic = descriptor::filesystem_magic(fd).during("look at the filesystem of", path)?;
    Ok(magic == PROC_SUPER_MAGIC)
}

pub(crate) fn identity_of(fd: BorrowedFd<'_>, path: &str) -> Result<FileIdentity, Error> {
    if !descriptor::has_lasting_identity(fd).during("look at the filesystem of", path)? {
        return Ok(UNCHECKED);
    }
    let status = descriptor::status(fd).during("look at", path)?;
    Ok(FileIdentity {
        device: status.device,
        inode: status.inode,
    })
}

/// The path of what `fd` names, from the root of its mount namespace.
pub(crate) fn path_of(fd: BorrowedFd<'_>) -> Result<String, Error> {
    let mut link = Vec::new();
    fdinfo::own_link(fd, &mut link).during("read the path of", "a descriptor")?;
    String::from_utf8(link).map_err(|error| {
        Error::refused(
            format!("the file {}", String::from_utf8_lossy(error.as_bytes())),
            "its path is not UTF-8",
        )
    })
}

pub(crate) fn ownership_of(status: &Status) -> Ownership {
    Ownership {
        user: status.user,
        group: status.group,
        mode: status.mode & !libc::S_IFMT,
    }
}

/// Gives what a replica has made itself its owner and mode, so that a service without rights may open
/// it once more.
pub(crate) fn set_ownership(
    fd: BorrowedFd<'_>,
    ownership: Ownership,
    subject: &str,
) -> Result<(), Error> {
    let status = descriptor::status(fd).during("look at", subject)?;
    if ownership_of(&status) == ownership {
        return Ok(());
    }
    let Ownership { user, group, mode } = ownership;
    descriptor::set_owner(fd, user, group)
        .and_then(|()| descriptor::set_mode(fd, mode))
        .during("set the owner and mode of", subject)
}

pub(crate) fn position_of(fd: BorrowedFd<'_>, flags: i32, path: &str) -> Result<u64, Error> {
    if flags & libc::O_PATH != 0 {
        return Ok(0);
    }
    match descriptor::seek(fd, 0, libc::SEEK_CUR) {
        // A stream, such as some files of /proc, has no position.
        Err(error) if error.raw_os_error() == Some(libc::ESPIPE) => Ok(0),
        other => other.during("read the position of", path),
    }
}

pub(crate) fn set_position(
    fd: BorrowedFd<'_>,
    flags: i32,
    position: u64,
    path: &str,
) -> Result<(), Error> {
    if flags & libc::O_PATH != 0 || position == 0 {
        return Ok(());
    }
    let offset = i64::try_from(position)
        .map_err(|_| Error::differs(path, format!("position {position} is out of range")))?;
    descriptor::seek(fd, offset, libc::SEEK_SET)
        .during("set the position of", path)
        .map(drop)
}

/// What of `F_GETFL` may be given to `open` again: nothing that creates or cuts off.
pub(crate) fn open_flags(flags: i32) -> i32 {
    const KEPT: i32 = libc::O_ACCMODE
        | libc::O_APPEND
        | libc::O_NONBLOCK
        | libc::O_SYNC
        | libc::O_DSYNC
        | libc::O_DIRECT
        | libc::O_NOATIME
        | libc::O_DIRECTORY
        | libc::O_NOFOLLOW
        | libc::O_PATH;
    // The flag of what was made without a name has the bit of O_DIRECTORY, too.
    let flags = if flags & libc::O_TMPFILE == libc::O_TMPFILE {
        flags & !libc::O_TMPFILE
    } else {
        flags
    };
    // O_NOCTTY: a terminal opened by chance must not become the replica's.
    flags & KEPT | libc::O_CLOEXEC | libc::O_NOCTTY
}

/// Opens a file with the flags that its description had: the one that `reference` refers to, whatever
/// its name is, or the one of this path if the file has no identity that lasts.
pub(crate) fn open_again(
    (path, flags): (&str, i32),
    identity: FileIdentity,
    reference: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, Error> {
    let flags = open_flags(flags);
    let Some(reference) = reference else {
        if identity != UNCHECKED {
            return Err(Error::differs(path, "nothing refers to the file"));
        }
        return open_by_path(path, flags);
    };
    if flags & libc::O_NOFOLLOW != 0
        && let Ok(fd) = path_of(reference).and_then(|path| open_by_path(&path, flags))
        && identity_of(fd.as_fd(), path)? == identity
    {
        return Ok(fd);
    }
    // The way by way of a descriptor is a link.
    fdinfo::reopen(reference, flags & !libc::O_NOFOLLOW).during("open once more", path)
}

fn open_by_path(path: &str, flags: i32) -> Result<OwnedFd, Error> {
    fdinfo::c_path(path)
        .and_then(|path| descriptor::open(None, &path, flags))
        .during("open", path)
}

/// Refuses what `fcntl` can hang on a description and a replica would not have.
pub(crate) fn refuse_ownership(fd: BorrowedFd<'_>, flags: i32, subject: &str) -> Result<(), Error> {
    if flags & libc::O_ASYNC != 0 {
        return Err(Error::refused(
            format!("signal-driven I/O (O_ASYNC) on {subject}"),
            "a signal that is due at the takeover would be lost",
        ));
    }
    if flags & libc::O_PATH != 0 {
        return Ok(());
    }
    match descriptor::lease(fd) {
        Ok(libc::F_RDLCK | libc::F_WRLCK) => Err(Error::refused(
            format!("the lease on {subject}"),
            "a takeover would break it without the notice it promises",
        )),
        // Filesystems without leases say EINVAL or ENOLCK.
        _ => Ok(()),
    }
}
