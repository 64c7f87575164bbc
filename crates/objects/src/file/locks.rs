//! Locks on regular files: those of a description come back with it, those of a process its own
//! process takes again.

use crate::{Context, Error};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use unbroken_image::object::{FileLock, LockOwner, RegularFile};
use unbroken_image::{Descriptor, Fd, Object, ObjectId, Pid};
use unbroken_sys::{fdinfo, lock};

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

/// Takes the locks of the description again, on the restored file. Only after the service that
/// held them is dead. False when another process has one of them now: it waited for it, and the
/// death of the service gave it away.
pub fn lock_again(fd: BorrowedFd<'_>, state: &RegularFile) -> Result<bool, Error> {
    let mut has_all = true;
    for held in &state.locks {
        // Positions beyond i64 cannot be locked, so none was captured.
        let (start, length) = (held.start as i64, held.length_bytes as i64);
        let locked = match held.owner {
            LockOwner::Description => lock::flock(fd, held.exclusive),
            LockOwner::DescriptionRange => {
                lock::description_lock(fd, held.exclusive, start, length)
            }
            LockOwner::Process(_) => Ok(()),
        };
        match locked {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => has_all = false,
            other => other.during("lock again", &state.path)?,
        }
    }
    Ok(has_all)
}

/// What to say of a lock that [`lock_again`], or the replica, could not have.
pub fn lost_lock(path: &str) -> String {
    format!("without its lock on {path}, which another process took as the service died")
}

/// The locks that process `pid` must take itself by `fcntl(F_SETLK)`, after the last descriptor of
/// the file that it closes: any close releases them.
pub fn process_locks(state: &RegularFile, pid: Pid) -> impl Iterator<Item = &FileLock> {
    state
        .locks
        .iter()
        .filter(move |lock| lock.owner == LockOwner::Process(pid))
}

/// The ranges that process `pid`, whose descriptors these are, must lock itself: such a lock is the
/// process's own, whoever opened the file.
pub fn locks_of_process(
    pid: Pid,
    descriptors: &BTreeMap<Fd, Descriptor>,
    objects: &BTreeMap<ObjectId, Object>,
) -> Vec<(Fd, FileLock)> {
    let mut locks: Vec<(Fd, FileLock)> = Vec::new();
    for (&fd, slot) in descriptors {
        if let Some(Object::RegularFile(state)) = objects.get(&slot.object) {
            // One call a lock is enough, whichever descriptor of the file it is made through.
            let access = state.flags & libc::O_ACCMODE;
            let own = process_locks(state, pid).filter(|lock| {
                access == libc::O_RDWR || (access == libc::O_WRONLY) == lock.exclusive
            });
            locks.extend(own.map(|lock| (fd, *lock)));
        }
    }
    locks
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
