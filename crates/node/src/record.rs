//! What travels from the primary to the standby through the journal: this, encoded, behind the
//! page content that it describes.

use crate::control::Asker;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use unbroken_image::{Epoch, MemoryDelta, Pid};

/// One step of the replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// Memory sent ahead of an epoch, while the service runs or because one record cannot hold it
    /// all. During a fill it is applied at once, later with the epoch that follows.
    Memory { pid: Pid, memory: MemoryDelta },
    /// A committed epoch, and the connections that were found to be accepted since the one
    /// before: the service's end, the client's, and a number that the service acknowledged.
    Epoch {
        epoch: Box<Epoch>,
        accepted: Vec<(SocketAddr, SocketAddr, u32)>,
    },
    /// The primary is done and releases nothing more: take over from the last epoch.
    TakeOver(Cause),
    /// The service ended by itself or goes on without this standby: the replica is void.
    Retire,
}

/// Why the standby is to take over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Somebody killed the service with this signal.
    Killed(i32),
    /// A fault of its own ended the service with this signal.
    Crashed(i32),
    /// The user asked for it, and waits for the answer.
    Switchover(Asker),
    /// The primary died.
    PrimaryDied,
}
