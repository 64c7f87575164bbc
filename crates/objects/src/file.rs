//! Regular files: opened again by path, at the same position, with the same locks.
//!
//! The replica works on the very file of the service (on one machine it is the same one), so at a
//! takeover the file can be ahead of the committed state. [`cut_back`] removes what a sequential
//! writer appended after the commit, because the replica will write it again. Bytes that were
//! overwritten in the middle after the commit are not rolled back.

use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::{FileLock, LockOwner, RegularFile};
use unbroken_image::{FileIdentity, Pid};
use unbroken_sys::{descriptor, fdinfo, lock};

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

/// Adds to `state` the locks that an fdinfo text of process `pid` shows and `state` lacks.
pub fn add_locks(text: &[u8], pid: Pid, state: &mut RegularFile) -> Result<(), Error> {
    for line in fdinfo::fields(text, "lock") {
        let lock = parse_lock(line, pid, &state.path)?;
        if !state.locks.contains(&lock) {
            state.locks.push(lock);
        }
    }
    Ok(())
}

/// One lock line, as `lock_get_status` of fs/locks.c prints it:
/// `1: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF`.
fn parse_lock(line: &str, pid: Pid, path: &str) -> Result<FileLock, Error> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let kind = words.next().unwrap_or_default();
    let owner = match kind {
        "FLOCK" => LockOwner::Description,
        "OFDLCK" => LockOwner::DescriptionRange,
        "POSIX" => LockOwner::Process(pid),
        "LEASE" | "DELEG" => {
            return Err(Error::refused(
                format!("the lease on {path}"),
                "a takeover would break it without the notice it promises",
            ));
        }
        _ => return Err(not_understood(line, path)),
    };
    let exclusive = words.nth(1) == Some("WRITE");
    let start = words.nth(2).and_then(|word| word.parse::<u64>().ok());
    let end = words.next().unwrap_or_default();
    let (Some(start), true) = (start, !end.is_empty()) else {
        return Err(not_understood(line, path));
    };
    let length_bytes = match end.parse::<u64>() {
        Ok(end) => end.saturating_sub(start).saturating_add(1),
        Err(_) => 0,
    };
    Ok(FileLock {
        owner,
        exclusive,
        start,
        length_bytes,
    })
}

fn not_understood(line: &str, path: &str) -> Error {
    Error::Answer {
        operation: "read the locks of",
        subject: path.to_owned(),
        answer: line.to_owned(),
    }
}

/// Opens the file in the calling thread's mount namespace and puts the position back. With
/// `reference`, an `O_PATH` descriptor of the file, it is found even when it was renamed since.
/// Locks are the caller's: see [`lock_again`] and [`process_locks`].
///
/// # Errors
/// [`Error::Differs`] when the path leads to another file here.
pub fn restore(state: &RegularFile, reference: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    let fd = open_again(&state.path, state.flags, state.identity, reference)?;
    set_position(fd.as_fd(), state.flags, state.position, &state.path)?;
    Ok(fd)
}

/// Takes the locks of the description again, on the restored file. Only after the service that
/// held them is dead.
///
/// # Errors
/// `EWOULDBLOCK` when another holds one.
pub fn lock_again(fd: BorrowedFd<'_>, state: &RegularFile) -> Result<(), Error> {
    for held in &state.locks {
        // Positions beyond i64 cannot be locked, so none was captured.
        let (start, length) = (held.start as i64, held.length_bytes as i64);
        match held.owner {
            LockOwner::Description => lock::flock(fd, held.exclusive),
            LockOwner::DescriptionRange => {
                lock::description_lock(fd, held.exclusive, start, length)
            }
            LockOwner::Process(_) => Ok(()),
        }
        .during("lock again", &state.path)?;
    }
    Ok(())
}

/// The locks that process `pid` must take itself by `fcntl(F_SETLK)`, after the last descriptor of
/// the file that it closes: any close releases them.
pub fn process_locks(state: &RegularFile, pid: Pid) -> impl Iterator<Item = &FileLock> {
    state
        .locks
        .iter()
        .filter(move |lock| lock.owner == LockOwner::Process(pid))
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

/// The identity of files on filesystems that make their inodes as they are looked up, and so give
/// the same path another number on each mount.
pub(crate) const UNCHECKED: FileIdentity = FileIdentity {
    device: 0,
    inode: 0,
};

// include/uapi/linux/magic.h
const PROC_SUPER_MAGIC: i64 = 0x9fa0;
const SYSFS_MAGIC: i64 = 0x6265_6572;
const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

pub(crate) fn is_of_proc(fd: BorrowedFd<'_>, path: &str) -> Result<bool, Error> {
    let magic = descriptor::filesystem_magic(fd).during("look at the filesystem of", path)?;
    Ok(magic == PROC_SUPER_MAGIC)
}

pub(crate) fn identity_of(fd: BorrowedFd<'_>, path: &str) -> Result<FileIdentity, Error> {
    let magic = descriptor::filesystem_magic(fd).during("look at the filesystem of", path)?;
    if [
        PROC_SUPER_MAGIC,
        SYSFS_MAGIC,
        CGROUP_SUPER_MAGIC,
        CGROUP2_SUPER_MAGIC,
    ]
    .contains(&magic)
    {
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
    // O_NOCTTY: a terminal opened by chance must not become the replica's.
    flags & KEPT | libc::O_CLOEXEC | libc::O_NOCTTY
}

pub(crate) fn open_again(
    path: &str,
    flags: i32,
    identity: FileIdentity,
    reference: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, Error> {
    let flags = open_flags(flags);
    let fd = match reference {
        // The link in /proc/self/fd is followed, so O_NOFOLLOW would open the link itself.
        Some(reference) => fdinfo::reopen(reference, flags & !libc::O_NOFOLLOW),
        None => fdinfo::c_path(path).and_then(|path| descriptor::open(None, &path, flags)),
    }
    .during("open", path)?;
    let found = descriptor::status(fd.as_fd()).during("look at", path)?;
    let found = FileIdentity {
        device: found.device,
        inode: found.inode,
    };
    if identity != UNCHECKED && found != identity {
        return Err(Error::differs(
            path,
            "another file has this name now; it was renamed or replaced since the commit",
        ));
    }
    Ok(fd)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_of_every_sort() {
        let parse = |line| parse_lock(line, Pid(7), "/x").map_err(|error| error.to_string());
        assert_eq!(
            parse("1: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF"),
            Ok(FileLock {
                owner: LockOwner::Description,
                exclusive: true,
                start: 0,
                length_bytes: 0
            })
        );
        assert_eq!(
            parse("2: OFDLCK ADVISORY  READ -1 00:1f:12 100 199"),
            Ok(FileLock {
                owner: LockOwner::DescriptionRange,
                exclusive: false,
                start: 100,
                length_bytes: 100
            })
        );
        assert_eq!(
            parse("3: POSIX  ADVISORY  READ 12 00:1f:12 5 5"),
            Ok(FileLock {
                owner: LockOwner::Process(Pid(7)),
                exclusive: false,
                start: 5,
                length_bytes: 1
            })
        );
        assert!(parse("3: LEASE  ACTIVE    READ 12 00:1f:12 0 EOF").is_err());
        assert!(parse("3: POSIX").is_err());
        assert!(parse("").is_err());
    }
}
