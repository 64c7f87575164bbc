//! What another node is told: the replica at a takeover, a new standby at its fill.

use super::connection::{ClientView, Connection, Flow, Stage};
use super::{Flows, NamedConnection};
use crate::Tuple;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// A connection that the service has closed and whose client may not know it yet: no kernel but
/// the present one remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosedConnection {
    pub tuple: Tuple,
    pub client: ClientView,
}

impl Flows {
    /// What a takeover gives the replica, in the order of its arrival: the kept packets of every
    /// connection that waits, and all input at or after the committed mark.
    pub fn replay_after_takeover(&self) -> Vec<(u64, &[u8])> {
        let mut packets: Vec<_> = self.kept().collect();
        if let Some(recent) = &self.recent {
            packets.retain(|(position, _)| *position < self.input_position);
            packets.sort_unstable_by_key(|(position, _)| *position);
            packets.extend(recent.iter().map(|frame| (frame.stamp, frame.bytes)));
        } else {
            packets.sort_unstable_by_key(|(position, _)| *position);
        }
        packets
    }

    /// What a new standby must hear before any other input, in the order of its arrival: of every
    /// connection that opens or waits its SYN, without which the standby could take it for the one
    /// before it from the same port, and its kept packets.
    pub fn retained(&self) -> Vec<(u64, &[u8])> {
        let openings = self
            .connections()
            .filter_map(|connection| connection.syn.as_ref())
            .map(|syn| (syn.position, &*syn.frame));
        let mut packets: Vec<_> = self.kept().chain(openings).collect();
        packets.sort_unstable_by_key(|(position, _)| *position);
        packets
    }

    /// What a new standby must hear besides ([`adopt_closed`](Self::adopt_closed)): connections
    /// that have been in a descriptor table and are not in `standing`.
    pub fn closed(&self, standing: &[NamedConnection]) -> Vec<ClosedConnection> {
        let listed: HashSet<Tuple> = standing.iter().map(|named| named.tuple).collect();
        let closed = |(tuple, flow): (&Tuple, &Flow)| {
            let Connection {
                stage,
                accepted,
                mut client,
                ..
            } = flow.current;
            client.sequence_end = flow.current.client_end();
            let stood = accepted || matches!(stage, Stage::Standing | Stage::Closed { .. });
            // Where the client has opened another one, it has done with this one.
            let last = flow.next.is_none() && !client.reset;
            let closed = stood && last && !listed.contains(tuple);
            closed.then_some(ClosedConnection {
                tuple: *tuple,
                client,
            })
        };
        self.flows.iter().filter_map(closed).collect()
    }

    /// Remembers what the primary's [`closed`](Self::closed) gave, before the epoch that completes
    /// the fill is committed here.
    pub fn adopt_closed(&mut self, closed: &[ClosedConnection], now_ns: u64) {
        for ClosedConnection { tuple, client } in closed {
            let new = || Flow::new(Connection::new(Stage::Waiting, None));
            let flow = self.flows.entry(*tuple).or_insert_with(new);
            // A SYN that was seen here is of a connection that its client opened since. Without
            // one, what was heard since the mark is of the old one.
            if flow.current.opening.is_none() {
                flow.current.client = client.joined(flow.current.client);
                self.close(*tuple, now_ns);
            }
        }
    }

    fn kept(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.connections()
            .flat_map(|connection| &connection.kept)
            .map(|kept| (kept.position, &*kept.frame))
    }
}
