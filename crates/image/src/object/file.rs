use crate::{FileIdentity, Pid};
use serde::{Deserialize, Serialize};

/// Whose a file lock is: this decides what releases it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockOwner {
    /// `flock(2)`: the open file description's.
    Description,
    /// `F_OFD_SETLK`: the open file description's, on a range.
    DescriptionRange,
    /// `F_SETLK`: the process's, on a range.
    Process(Pid),
}

/// Of what has no name, and lies on no filesystem that keeps it: who may open it once more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    pub user: u32,
    pub group: u32,
    /// The permission bits.
    pub mode: u32,
}

/// A lock held on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    pub owner: LockOwner,
    pub exclusive: bool,
    pub start: u64,
    /// 0 reaches to the end of the file, wherever that moves.
    pub length_bytes: u64,
}

/// A regular file: the one that `identity` says. Its path is what it was called when it was read, and
/// counts only on filesystems that give no file a lasting identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegularFile {
    pub path: String,
    pub identity: FileIdentity,
    /// `F_GETFL`: access mode, `O_APPEND`, `O_NONBLOCK`, ...
    pub flags: i32,
    pub position: u64,
    /// The file's length at the epoch, when the description can write: what a takeover cuts it
    /// back to.
    pub length_bytes: Option<u64>,
    pub locks: Vec<FileLock>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    pub path: String,
    pub identity: FileIdentity,
    pub flags: i32,
    pub position: u64,
}

/// `/dev/null`, `/dev/zero`, `/dev/full`, `/dev/random`, `/dev/urandom`: devices without state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CharacterDevice {
    pub path: String,
    /// `st_rdev`.
    pub device: u64,
    pub flags: i32,
}

/// A memfd. Its mapped pages travel with memory; `content` is filled when it is not mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFile {
    pub name: String,
    pub identity: FileIdentity,
    pub flags: i32,
    pub ownership: Ownership,
    pub position: u64,
    pub length_bytes: u64,
    pub seals: i32,
    /// Where there is data, and the data; the rest is holes.
    pub content: Vec<(u64, Vec<u8>)>,
}
