use super::Ownership;
use crate::FileIdentity;
use serde::{Deserialize, Serialize};

/// The pipe behind one or two ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    pub capacity_bytes: u64,
    /// Unread content. One entry holds a whole byte stream; a packet-mode pipe (`O_DIRECT`) has
    /// one entry a packet.
    pub content: Vec<Vec<u8>>,
    /// Whether each entry of `content` is a packet: what a short read leaves of it is lost.
    pub packets: bool,
}

/// One open end of a pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// The pipe's inode, on pipefs or where the FIFO is: ends of the same one belong together.
    pub identity: FileIdentity,
    /// `F_GETFL`, access mode included.
    pub flags: i32,
    pub ownership: Ownership,
    /// Set on a read end; a pipe whose read end is closed has no content that matters.
    pub pipe: Option<Pipe>,
    /// What a FIFO was called when it was read; `None` for `pipe(2)`.
    pub fifo_path: Option<String>,
}
