//! The unit of replication.

use crate::object::{InterestChange, Object};
use crate::{Descriptor, Fd, MemoryDelta, ObjectId, Pid, ProcessState, ThreadState};
use serde::{Deserialize, Serialize};

/// Where an epoch stands in the streams around the service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mark {
    /// Every input packet before this position of the input log had reached the service's
    /// sockets; none at or after it had.
    pub input_position: u64,
}

/// A process that a replica is to have from now on: told before anything else of it, its memory
/// included. All four are numbers of the service's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Birth {
    pub pid: Pid,
    pub parent: Pid,
    /// Those that named these two may have ended: a session and a group live as long as a member.
    pub session: Pid,
    pub process_group: Pid,
}

/// What one process became since the epoch before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessDelta {
    pub pid: Pid,
    pub parent: Pid,
    /// Every live thread, the leader first: the list is complete, so a thread that is missing has
    /// ended.
    pub threads: Vec<ThreadState>,
    pub memory: MemoryDelta,
    /// `None` when it is as in the epoch before.
    pub state: Option<ProcessState>,
    /// Slots that changed.
    pub descriptors: Vec<DescriptorChange>,
}

/// A slot of a descriptor table and what it holds now; `None` when it is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorChange {
    pub fd: Fd,
    pub descriptor: Option<Descriptor>,
}

/// A consistent cut of the whole service: everything that changed since the epoch before, and for
/// the first epoch of a standby, everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    pub term: u64,
    /// 1 is the epoch that completes a fill; each one after is the next number.
    pub sequence: u64,
    pub mark: Mark,
    /// Every live process, each born before ([`Birth`]), parents before children; one that is
    /// missing has ended.
    pub processes: Vec<ProcessDelta>,
    /// New and changed kernel objects.
    pub objects: Vec<(ObjectId, Object)>,
    /// What became of entries of epoll instances that are not among `objects`, in the order in
    /// which it came about: with thousands of entries a change is worth more than the whole.
    pub interests: Vec<InterestChange>,
    /// Objects whose last descriptor is gone.
    pub gone: Vec<ObjectId>,
}
