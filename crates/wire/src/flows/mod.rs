//! What each client was told and has told us, and the input that a takeover must say again.
//!
//! Everything here follows from input packets and committed epochs, so a standby that reads the
//! input log and the journal knows it all. Two things are kept:
//!
//! - *recent* input: every packet at or after the last committed epoch's mark. None of it is in
//!   the committed state, and no client has been told that it arrived (I4).
//! - for each connection that stands in no committed descriptor table, because it waits in a
//!   listener's queue: every packet from the ACK that completed its handshake. The committed state
//!   cannot hold such a connection, while its client may have been told of it; replayed to a
//!   listener with syncookies the same packets bring it up again (KERNEL.md, Syncookies).
//!
//! The primary keeps the second kind too, for the standby that it may have to fill next.

mod change;
mod connection;
mod epochs;
mod fading;
mod handover;
mod late;
mod packets;

pub use change::{Activity, ConnectionChange, Connections};
pub use connection::ClientView;
pub use epochs::TableChange;
pub use handover::KnownConnection;
pub use late::LatePacket;

use crate::Tuple;
use crate::frames::FrameQueue;
use connection::{Connection, Flow, Phase};
use fading::TIDY_AT_LEAST;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use unbroken_image::object::TcpConnection;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowLimits {
    /// Bytes of packets kept for connections that wait. Beyond it the longest waiting are given
    /// up: they would end with a reset at a takeover.
    pub kept_bytes: usize,
    /// Bytes of recent input. Beyond it packets are not stored: their clients send them again.
    pub recent_bytes: usize,
    /// How long closed and half-open connections are remembered.
    pub fade_ns: u64,
    /// How many of them.
    pub fading: usize,
}

impl Default for FlowLimits {
    fn default() -> Self {
        Self {
            kept_bytes: 256 << 20,
            recent_bytes: 256 << 20,
            // Longer than the kernel's TIME_WAIT, and more than those that a stage allows: a SYN
            // that meets one must find it here (`LatePacket::Reopens`).
            fade_ns: 65_000_000_000,
            fading: 1 << 18,
        }
    }
}

/// What could not be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowLosses {
    /// Connections that wait in a listener's queue and would not survive a takeover.
    pub waiting_connections: u64,
    /// Packets that clients would have to send again after a takeover.
    pub recent_packets: u64,
}

/// One connection among those that a client may have had, one after the other, from one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamedConnection {
    pub tuple: Tuple,
    /// Any number that the service has acknowledged on it, such as the next one it expects.
    pub client_sequence: u32,
}

impl From<&TcpConnection> for NamedConnection {
    fn from(connection: &TcpConnection) -> Self {
        let unread = connection.receive_queue.len() as u32;
        let client_sequence = connection.receive_sequence.wrapping_add(unread);
        Self {
            tuple: connection.into(),
            client_sequence,
        }
    }
}

/// See the module. Times are nanoseconds of the caller's monotonic clock.
#[derive(Debug)]
pub struct Flows {
    limits: FlowLimits,
    flows: HashMap<Tuple, Flow>,
    recent: Option<FrameQueue>,
    /// Connections that began to wait, oldest first; some of them do not wait any more.
    waiting: VecDeque<Tuple>,
    tidy_at: usize,
    /// When each connection closed or half opened, oldest first; some have changed since.
    fading: VecDeque<(u64, Tuple)>,
    kept_bytes: usize,
    input_position: u64,
    newly_accepted: Vec<NamedConnection>,
    losses: FlowLosses,
}

impl Flows {
    /// For a standby: keeps recent input.
    pub fn of_standby(limits: FlowLimits) -> Self {
        Self {
            recent: Some(FrameQueue::default()),
            ..Self::of_primary(limits)
        }
    }

    /// For a primary, whose kernel has the recent input itself.
    pub fn of_primary(limits: FlowLimits) -> Self {
        Self {
            limits,
            flows: HashMap::new(),
            recent: None,
            waiting: VecDeque::new(),
            tidy_at: TIDY_AT_LEAST,
            fading: VecDeque::new(),
            kept_bytes: 0,
            input_position: 0,
            newly_accepted: Vec::new(),
            losses: FlowLosses::default(),
        }
    }

    /// Connections that were found to be accepted since the last call; a primary takes them at an
    /// epoch's mark and sends them with the epoch.
    pub fn take_accepted(&mut self, into: &mut Vec<NamedConnection>) {
        into.append(&mut self.newly_accepted);
    }

    /// What was taken went with no epoch.
    pub fn give_accepted_back(&mut self, mut accepted: Vec<NamedConnection>) {
        accepted.append(&mut self.newly_accepted);
        self.newly_accepted = accepted;
    }

    /// What the client of a connection has told and was told.
    pub fn client(&self, tuple: Tuple) -> Option<ClientView> {
        let flow = self.flows.get(&tuple)?;
        Some(flow.standing_or_current().client)
    }

    /// Whether packets are kept for a connection, as it stands in no committed table.
    pub fn is_waiting(&self, tuple: Tuple) -> bool {
        self.flows.get(&tuple).is_some_and(|flow| {
            flow.current.phase == Phase::Waiting
                || flow
                    .next
                    .as_ref()
                    .is_some_and(|next| next.phase == Phase::Waiting)
        })
    }

    /// This node has taken over: its kernel knows nothing of connections that were closed before.
    /// Those in `restored` (orphans that were brought back) it does know. Recent input is no
    /// longer kept.
    pub fn became_primary(&mut self, restored: &[Tuple]) {
        self.recent = None;
        for (tuple, flow) in &mut self.flows {
            if let Phase::Closed { inherited, .. } = &mut flow.current.phase {
                *inherited = !restored.contains(tuple);
            }
        }
    }

    /// What could not be kept so far.
    pub fn losses(&self) -> FlowLosses {
        self.losses
    }

    /// Connections that are remembered, whatever their phase.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Bytes of packets kept for connections that wait.
    pub fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.flows
            .values()
            .flat_map(|flow| std::iter::once(&flow.current).chain(flow.next.as_deref()))
    }
}

#[cfg(test)]
mod tests;
