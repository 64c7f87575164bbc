//! What a capture is told of connections, and what it tells of them.

use super::{KnownConnection, NamedConnection};
use crate::Tuple;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use unbroken_image::object::{TcpConnection, TcpPhase};

/// Where packets went, either way. A connection without any has not moved (KERNEL.md, Quiet
/// connections).
#[derive(Clone, Debug, Default)]
pub struct Activity {
    pub connections: HashSet<Tuple>,
    /// Others may have moved too: packets were lost on the way to the wire, or have not all been
    /// read.
    pub anywhere: bool,
}

/// What the primary's wire knows of connections and no descriptor table tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Connections {
    /// Those that were found to be accepted since the epoch before.
    pub accepted: Vec<NamedConnection>,
    /// With the epoch that completes a fill: those that have been in a descriptor table. The
    /// service has closed the ones that are not in this epoch's.
    pub known: Vec<KnownConnection>,
}

/// How an epoch changed the connections that stand.
#[derive(Clone, Debug, Default)]
pub struct ConnectionChange {
    pub stood: Vec<NamedConnection>,
    pub gone: Vec<Tuple>,
}

impl ConnectionChange {
    /// Takes in a connection of the epoch. One that is dead has a descriptor and nothing more: the
    /// same ends may belong to another connection by now.
    pub fn take(&mut self, connection: &TcpConnection) {
        match connection.phase {
            TcpPhase::Closed => self.gone.push(connection.into()),
            _ => self.stood.push(connection.into()),
        }
    }
}
