use serde::{Deserialize, Serialize};

/// The pipe behind one or two ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    pub capacity_bytes: u64,
    /// Unread content. One entry holds a whole byte stream; a packet-mode pipe (`O_DIRECT`) has
    /// one entry a packet.
    pub content: Vec<Vec<u8>>,
}

/// One open end of a pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeEnd {
    /// The pipe's inode on pipefs: ends with the same number belong together.
    pub inode: u64,
    /// `F_GETFL`, access mode included.
    pub flags: i32,
    /// Set on a read end; a pipe whose read end is closed has no content that matters.
    pub pipe: Option<Pipe>,
    /// The path of a FIFO in the filesystem; `None` for `pipe(2)`.
    pub fifo_path: Option<String>,
}
