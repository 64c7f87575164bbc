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
//!   listener with syncookies the same packets bring it up again (HAZARDS 121).
//!
//! The primary keeps the second kind too, for the standby that it may have to fill next.

mod connection;

pub use connection::ClientView;

use crate::Tuple;
use crate::craft::{self, CraftedPacket, Direction, SegmentNumbers};
use crate::frames::FrameQueue;
use crate::packet::{Packet, Segment, TcpFlags, Timestamps};
use crate::serial::{is_after, later};
use connection::{Connection, Flow, Kept, Stage, is_near};
use serde::{Deserialize, Serialize};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
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
            fade_ns: 60_000_000_000,
            fading: 1 << 16,
        }
    }
}

/// Fewer entries than this are not worth going through.
const TIDY_AT_LEAST: usize = 1024;

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

/// A connection that the service has closed and whose client may not know it yet: no kernel but
/// the present one remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosedConnection {
    pub tuple: Tuple,
    pub client: ClientView,
}

/// How the descriptor table of an epoch differs from that of the epoch before, in connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableChange<'a> {
    /// Connections whose last descriptor is gone; by object, so a connection that still stands is
    /// not among them, and one whose client has come back from the same port is.
    pub gone: &'a [Tuple],
    /// Connections that now have one.
    pub stood: &'a [NamedConnection],
    /// What the primary's [`Flows::take_accepted`] gave at the epoch's mark. Those that are not in
    /// `stood` came and went between two epochs.
    pub accepted: &'a [NamedConnection],
    /// [`unbroken_image::Mark::input_position`] of the epoch.
    pub input_position: u64,
}

/// What to do with a packet ([`Flows::answer_for_closed`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LatePacket {
    /// Give it to the service's kernel.
    ForTheKernel,
    /// Drop it: the kernel would answer with a reset, which would end a client that only waits for
    /// its FIN to be acknowledged.
    Swallow,
    /// Drop it, and send this to the client.
    Answer(CraftedPacket),
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
        if matches!(owner.stage, Stage::Waiting | Stage::Unkept) && !owner.accepted {
            owner.accepted = true;
            self.kept_bytes -= owner.drop_kept();
            let heard_end = owner.client.sequence_end;
            let acknowledged = segment.flags.has(TcpFlags::ACK);
            let client_sequence = match heard_end {
                Some(end) if !acknowledged => end,
                _ => segment.acknowledgement,
            };
            self.newly_accepted.push(NamedConnection {
                tuple,
                client_sequence,
            });
        }
        let was_over = owner.is_over();
        owner.service_finished |= finishes;
        owner.service_reset |= segment.is_reset();
        if owner.is_over() && !was_over {
            self.fading.push_back((now_ns, tuple));
        }
    }

    /// Connections that were found to be accepted since the last call; a primary takes them at an
    /// epoch's mark and sends them with the epoch.
    pub fn take_accepted(&mut self, into: &mut Vec<NamedConnection>) {
        into.append(&mut self.newly_accepted);
    }

    /// Takes in a committed epoch: drops the recent input that it contains, and the packets kept
    /// for connections that now stand in the table.
    pub fn commit(&mut self, change: TableChange<'_>, now_ns: u64) {
        for tuple in change.gone {
            self.close(*tuple, now_ns);
        }
        for named in change.accepted {
            self.close_accepted(*named, now_ns);
        }
        for named in change.stood {
            self.stand(*named);
        }
        self.advance_to(change.input_position, now_ns);
    }

    /// Takes in the committed epoch that completes a fill, whose table is complete: a connection
    /// that is not in it has been closed, or waits.
    pub fn commit_survey(
        &mut self,
        standing: &[NamedConnection],
        accepted: &[NamedConnection],
        input_position: u64,
        now_ns: u64,
    ) {
        let listed: HashSet<Tuple> = standing.iter().map(|named| named.tuple).collect();
        let gone: Vec<Tuple> = self
            .flows
            .iter()
            .filter(|(tuple, flow)| {
                let known = flow.current.stage == Stage::Standing || flow.current.accepted;
                known && !listed.contains(*tuple)
            })
            .map(|(tuple, _)| *tuple)
            .collect();
        let change = TableChange {
            gone: &gone,
            stood: standing,
            accepted,
            input_position,
        };
        self.commit(change, now_ns);
    }

    fn advance_to(&mut self, input_position: u64, now_ns: u64) {
        self.input_position = input_position;
        if let Some(recent) = &mut self.recent {
            while recent
                .front()
                .is_some_and(|frame| frame.stamp < input_position)
            {
                recent.pop();
            }
        }
        self.fade(now_ns);
    }

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

    /// What the client of a connection has told and was told.
    pub fn client(&self, tuple: Tuple) -> Option<ClientView> {
        let flow = self.flows.get(&tuple)?;
        Some(flow.standing_or_current().client)
    }

    /// Whether packets are kept for a connection, as it stands in no committed table.
    pub fn is_waiting(&self, tuple: Tuple) -> bool {
        self.flows.get(&tuple).is_some_and(|flow| {
            flow.current.stage == Stage::Waiting
                || flow
                    .next
                    .as_ref()
                    .is_some_and(|next| next.stage == Stage::Waiting)
        })
    }

    /// This node has taken over: its kernel knows nothing of connections that were closed before.
    /// Those in `restored` (orphans that were brought back) it does know. Recent input is no
    /// longer kept.
    pub fn became_primary(&mut self, restored: &[Tuple]) {
        self.recent = None;
        for (tuple, flow) in &mut self.flows {
            if let Stage::Closed { inherited, .. } = &mut flow.current.stage {
                *inherited = !restored.contains(tuple);
            }
        }
    }

    /// What is to be done with a client's packet on a connection that was closed before the
    /// takeover: what the old kernel's TIME_WAIT would have done, which this one has not.
    pub fn answer_for_closed(&self, frame: &[u8]) -> LatePacket {
        let Packet::Tcp(segment) = Packet::parse(frame) else {
            return LatePacket::ForTheKernel;
        };
        let tuple = Tuple::new(segment.destination, segment.source);
        let Some(flow) = self.flows.get(&tuple) else {
            return LatePacket::ForTheKernel;
        };
        let Connection { stage, client, .. } = &flow.current;
        let inherited = matches!(
            stage,
            Stage::Closed {
                inherited: true,
                ..
            }
        );
        let Some(known_end) = flow.current.client_end() else {
            return LatePacket::ForTheKernel;
        };
        // The client's own FIN may be new, when it was the service that closed first. New data is
        // answered with a reset, as by any kernel whose program has closed.
        let last_byte_end = segment.sequence.wrapping_add(segment.payload.len() as u32);
        let old = is_near(known_end, segment.sequence)
            && !is_after(last_byte_end, known_end)
            && !segment.is_opening()
            && !segment.is_reset();
        if !inherited || !old || client.reset {
            return LatePacket::ForTheKernel;
        }
        // Anything but FIN wants no answer here: answering bare ACKs could go on for ever, and data
        // that is sent again has a FIN behind it that settles both.
        if !segment.flags.has(TcpFlags::FIN.with(TcpFlags::ACK)) {
            return LatePacket::Swallow;
        }
        let timestamps = segment.options.timestamps.map(|new| Timestamps {
            // Not older than what the client last took from the service (PAWS, RFC 7323, 5.3).
            value: client.timestamps.map_or(new.echo, |known| known.echo),
            echo: new.value,
        });
        // The number that the client expects next: of the service's FIN, or after it.
        let told = segment.acknowledgement;
        let numbers = SegmentNumbers {
            sequence: client.acknowledged.map_or(told, |known| later(known, told)),
            acknowledgement: segment.sequence_end(),
            window: u16::MAX,
            timestamps,
        };
        LatePacket::Answer(craft::ack(tuple, Direction::ToClient, numbers))
    }

    /// What could not be kept so far.
    pub fn losses(&self) -> FlowLosses {
        self.losses
    }

    /// Connections that are remembered, whatever their stage.
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

    fn kept(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.connections()
            .flat_map(|connection| &connection.kept)
            .map(|kept| (kept.position, &*kept.frame))
    }

    fn client_opens(&mut self, tuple: Tuple, sequence: u32, syn: Kept, now_ns: u64) {
        let opening = Connection {
            syn: Some(syn),
            ..Connection::new(Stage::Opening { since_ns: now_ns }, Some(sequence))
        };
        match self.flows.get_mut(&tuple) {
            None => {
                self.flows.insert(tuple, Flow::new(opening));
            }
            // A SYN that is sent again.
            Some(flow) if flow.current.opening == Some(sequence) => return,
            Some(flow) => match flow.current.stage {
                Stage::Opening { .. } | Stage::Closed { .. } => flow.current = opening,
                Stage::Waiting | Stage::Unkept | Stage::Standing => {
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
                let stage = Stage::Opening { since_ns: now_ns };
                entry.insert(Flow::new(Connection::new(stage, None)))
            }
        };
        let Some(owner) = flow.owner(segment.sequence) else {
            return;
        };
        let completes = segment.flags.has(TcpFlags::ACK) && !segment.is_reset();
        if matches!(owner.stage, Stage::Opening { .. }) && completes {
            owner.stage = Stage::Waiting;
            self.waiting.push_back(tuple);
        }
        let was_over = owner.is_over();
        owner.hear(segment);
        if owner.is_over() && !was_over {
            self.fading.push_back((now_ns, tuple));
        }
        if owner.stage == Stage::Waiting && !owner.accepted {
            owner.kept.push(Kept {
                position,
                frame: frame.into(),
            });
            self.kept_bytes += frame.len();
            self.give_up_the_longest_waiting();
        }
    }

    /// A connection that left no descriptor, unless it turns out to stand in the table.
    fn close_accepted(&mut self, named: NamedConnection, now_ns: u64) {
        let Some(flow) = self.flows.get_mut(&named.tuple) else {
            return;
        };
        let replaced = flow
            .next
            .as_ref()
            .is_some_and(|next| next.may_own(named.client_sequence));
        let waits = |stage| matches!(stage, Stage::Waiting | Stage::Unkept);
        if replaced {
            self.close(named.tuple, now_ns);
            self.close(named.tuple, now_ns);
        } else if waits(flow.current.stage) && flow.current.may_own(named.client_sequence) {
            self.close(named.tuple, now_ns);
        }
    }

    fn stand(&mut self, named: NamedConnection) {
        let new = || Flow::new(Connection::new(Stage::Standing, None));
        let flow = self.flows.entry(named.tuple).or_insert_with(new);
        self.kept_bytes -= flow.turn_to(named.client_sequence);
        self.kept_bytes -= flow.current.drop_kept();
        flow.current.stage = Stage::Standing;
        flow.current.service_acknowledged = Some(named.client_sequence);
    }

    fn close(&mut self, tuple: Tuple, now_ns: u64) {
        let Some(flow) = self.flows.get_mut(&tuple) else {
            return;
        };
        self.kept_bytes -= flow.current.drop_kept();
        if !flow.promote_next() {
            flow.current.stage = Stage::Closed {
                since_ns: now_ns,
                inherited: false,
            };
            self.fading.push_back((now_ns, tuple));
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
                if connection.stage == Stage::Waiting {
                    self.kept_bytes -= connection.drop_kept();
                    connection.stage = Stage::Unkept;
                    self.losses.waiting_connections += 1;
                }
            }
        }
    }

    /// Forgets connections that closed, or half opened, long ago.
    fn fade(&mut self, now_ns: u64) {
        while let Some((since_ns, tuple)) = self.fading.front().copied() {
            let due = now_ns.saturating_sub(since_ns) >= self.limits.fade_ns;
            if !due && self.fading.len() <= self.limits.fading {
                break;
            }
            self.fading.pop_front();
            let Some(flow) = self.flows.get_mut(&tuple) else {
                continue;
            };
            let half_open = Stage::Opening { since_ns };
            if flow
                .next
                .as_ref()
                .is_some_and(|next| next.stage == half_open)
            {
                flow.next = None;
            }
            let over = match flow.current.stage {
                Stage::Closed {
                    since_ns: closed_ns,
                    ..
                } => closed_ns == since_ns,
                // No epoch will say that it is gone while the service is unprotected.
                Stage::Standing => flow.current.is_over(),
                Stage::Waiting | Stage::Unkept => flow.current.accepted && flow.current.is_over(),
                stage @ Stage::Opening { .. } => stage == half_open,
            };
            if over && !flow.promote_next() {
                self.flows.remove(&tuple);
            }
        }
        self.tidy_waiting();
    }

    /// Drops entries of connections that do not wait any more, once they may be the greater part.
    fn tidy_waiting(&mut self) {
        if self.waiting.len() < self.tidy_at {
            return;
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|tuple| self.is_waiting(*tuple));
        self.tidy_at = (waiting.len() * 2).max(TIDY_AT_LEAST);
        self.waiting = waiting;
    }
}

#[cfg(test)]
mod tests;
