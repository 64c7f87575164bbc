//! Packets both ways: whose they are, and which are kept.

use super::connection::{Connection, Flow, Kept, Phase};
use super::{Flows, NamedConnection};
use crate::Tuple;
use crate::packet::{Packet, Segment, TcpFlags};
use std::collections::hash_map::Entry;

impl Flows {
    /// Takes in a frame from a client. Positions rise.
    pub fn input(&mut self, position: u64, frame: &[u8], now_ns: u64) {
        if let Some(recent) = &mut self.recent
            && !(recent.grow_for(frame.len(), self.limits.recent_bytes)
                && recent.push(0, position, frame))
        {
            self.losses.recent_packets += 1;
        }
        if let Packet::Tcp(segment) = Packet::parse(frame) {
            let tuple = Tuple::new(segment.destination, segment.source);
            if segment.is_opening() {
                let frame = frame.into();
                self.client_opens(tuple, segment.sequence, Kept { position, frame }, now_ns);
            } else {
                self.client_says(tuple, &segment, position, frame, now_ns);
            }
        }
        self.fade(now_ns);
    }

    /// Takes in a frame of the service, when it is read (a primary only). A connection on which
    /// the service sends data, FIN or RST has been accepted.
    pub fn output(&mut self, frame: &[u8], now_ns: u64) {
        let Packet::Tcp(segment) = Packet::parse(frame) else {
            return;
        };
        let finishes = segment.flags.has(TcpFlags::FIN);
        if segment.payload.is_empty() && !finishes && !segment.is_reset() {
            return;
        }
        let tuple = Tuple::new(segment.source, segment.destination);
        let Some(flow) = self.flows.get_mut(&tuple) else {
            return;
        };
        let Some(owner) = flow.owner_of_output(&segment) else {
            return;
        };
        if matches!(owner.phase, Phase::Waiting | Phase::Unkept) && !owner.accepted {
            owner.accepted = true;
            self.kept_bytes -= owner.drop_kept();
            // A reset that acknowledges nothing names the connection by what the client sent.
            let client_sequence = match owner.client.sequence_end {
                Some(end) if !segment.flags.has(TcpFlags::ACK) => end,
                _ => segment.acknowledgement,
            };
            self.newly_accepted.push(NamedConnection {
                tuple,
                client_sequence,
            });
        }
        let was_over = owner.is_over();
        if finishes {
            owner.service_end = Some(segment.sequence_end());
        }
        owner.service_reset |= segment.is_reset();
        if owner.is_over() && !was_over {
            self.fading.push_back((now_ns, tuple));
        }
    }

    fn client_opens(&mut self, tuple: Tuple, sequence: u32, syn: Kept, now_ns: u64) {
        let opening = Connection {
            syn: Some(syn),
            ..Connection::new(Phase::Opening { since_ns: now_ns }, Some(sequence))
        };
        match self.flows.get_mut(&tuple) {
            None => {
                self.flows.insert(tuple, Flow::new(opening));
            }
            // A SYN that is sent again.
            Some(flow) if flow.current.opening == Some(sequence) => return,
            Some(flow) => match flow.current.phase {
                Phase::Opening { .. } | Phase::Closed { .. } => flow.current = opening,
                Phase::Waiting | Phase::Unkept | Phase::Standing => {
                    let known = flow.next.as_ref().and_then(|next| next.opening);
                    if known == Some(sequence) {
                        return;
                    }
                    if let Some(mut old) = flow.next.replace(Box::new(opening)) {
                        self.kept_bytes -= old.drop_kept();
                    }
                }
            },
        }
        self.fading.push_back((now_ns, tuple));
    }

    fn client_says(
        &mut self,
        tuple: Tuple,
        segment: &Segment<'_>,
        position: u64,
        frame: &[u8],
        now_ns: u64,
    ) {
        let flow = match self.flows.entry(tuple) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if segment.is_reset() => return,
            // Its SYN came before this log began.
            Entry::Vacant(entry) => {
                self.fading.push_back((now_ns, tuple));
                let phase = Phase::Opening { since_ns: now_ns };
                entry.insert(Flow::new(Connection::new(phase, None)))
            }
        };
        let Some(owner) = flow.owner(segment.sequence) else {
            return;
        };
        let completes = segment.flags.has(TcpFlags::ACK) && !segment.is_reset();
        if matches!(owner.phase, Phase::Opening { .. }) && completes {
            owner.phase = Phase::Waiting;
            self.waiting.push_back(tuple);
        }
        let was_over = owner.is_over();
        owner.hear(segment);
        if owner.is_over() && !was_over {
            self.fading.push_back((now_ns, tuple));
        }
        if owner.phase == Phase::Waiting && !owner.accepted {
            owner.kept.push(Kept {
                position,
                frame: frame.into(),
            });
            self.kept_bytes += frame.len();
            self.give_up_the_longest_waiting();
        }
    }

    fn give_up_the_longest_waiting(&mut self) {
        while self.kept_bytes > self.limits.kept_bytes {
            let Some(tuple) = self.waiting.pop_front() else {
                return;
            };
            let Some(flow) = self.flows.get_mut(&tuple) else {
                continue;
            };
            for connection in std::iter::once(&mut flow.current).chain(flow.next.as_deref_mut()) {
                if connection.phase == Phase::Waiting {
                    self.kept_bytes -= connection.drop_kept();
                    connection.phase = Phase::Unkept;
                    self.losses.waiting_connections += 1;
                }
            }
        }
    }
}
