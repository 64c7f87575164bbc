//! What another node is told: the replica at a takeover, a new standby at its fill.

use super::Flows;
use super::connection::{ClientView, Connection, Flow, Phase};
use crate::Tuple;
use serde::{Deserialize, Serialize};

/// A connection that the service has accepted, and what its client has said. Where it has closed it
/// the client may not know that yet, and no kernel but the present one remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownConnection {
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

    /// What a new standby must hear besides ([`adopt_known`](Self::adopt_known)): connections that
    /// have been in a descriptor table.
    pub fn known(&self) -> Vec<KnownConnection> {
        let known = |(tuple, flow): (&Tuple, &Flow)| {
            let Connection {
                phase,
                accepted,
                mut client,
                ..
            } = flow.current;
            client.sequence_end = flow.current.client_end();
            let stood = accepted || matches!(phase, Phase::Standing | Phase::Closed { .. });
            // Where the client has opened another one, it has done with this one.
            let last = flow.next.is_none() && !client.reset;
            (stood && last).then_some(KnownConnection {
                tuple: *tuple,
                client,
            })
        };
        self.flows.iter().filter_map(known).collect()
    }

    /// Remembers what the primary's [`known`](Self::known) gave, before the epoch that completes the
    /// fill is committed here. It says which of them stand; the service has closed the others.
    pub fn adopt_known(&mut self, known: &[KnownConnection], now_ns: u64) {
        for KnownConnection { tuple, client } in known {
            let new = || Flow::new(Connection::new(Phase::Waiting, None));
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
