use crate::FileIdentity;
use serde::{Deserialize, Serialize};

/// A regular file, reached by path in the service's mount namespace.
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

/// A memfd. Its mapped pages travel with memory; `content` is set when it is not mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFile {
    pub name: String,
    pub identity: FileIdentity,
    pub flags: i32,
    pub position: u64,
    pub length_bytes: u64,
    pub seals: i32,
    pub content: Vec<u8>,
}
