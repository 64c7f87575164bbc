//! One client's connection, as its packets and the committed epochs tell it.

use crate::packet::{Segment, TcpFlags, Timestamps};
use crate::serial::{is_after, later};
use serde::{Deserialize, Serialize};

/// A segment whose numbers lie further than this from the connection's was made up, or belongs to
/// another connection between the same ports: windows here stay below 16 MiB.
const WINDOW: u32 = 1 << 24;

/// A connection whose client has sent this much is not taken for another by its first number.
const FORGET_OPENING_AFTER: u32 = 1 << 30;

/// What a client has told and has been told, from its own packets alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientView {
    /// The highest acknowledgement of the client: the service's bytes before it have arrived.
    pub acknowledged: Option<u32>,
    /// The sequence number after the last byte, or FIN, that the client sent.
    pub sequence_end: Option<u32>,
    /// The client's newest timestamp, and the newest of the service that it echoed.
    pub timestamps: Option<Timestamps>,
    /// Scaled down, of the newest segment.
    pub window: u16,
    /// The client has closed its direction.
    pub finished: bool,
    pub reset: bool,
}

impl ClientView {
    /// Takes in what a segment of the client says; ignores one that cannot be of this connection.
    pub fn note(&mut self, segment: &Segment<'_>) {
        if !self.accepts(segment) {
            return;
        }
        let end = segment.sequence_end();
        self.sequence_end = Some(self.sequence_end.map_or(end, |known| later(known, end)));
        self.finished |= segment.flags.has(TcpFlags::FIN);
        // The kernel believes a reset only at the exact number (RFC 5961, 3.2).
        self.reset |= segment.is_reset() && self.sequence_end == Some(end);
        if segment.flags.has(TcpFlags::ACK) && !segment.is_reset() {
            let number = segment.acknowledgement;
            if self
                .acknowledged
                .is_none_or(|known| !is_after(known, number))
            {
                self.window = window_scaled_down(segment);
                self.acknowledged = Some(number);
            }
        }
        if let Some(new) = segment.options.timestamps {
            self.timestamps = Some(self.timestamps.map_or(new, |known| Timestamps {
                value: later(known.value, new.value),
                echo: later(known.echo, new.echo),
            }));
        }
    }

    /// What two views of one connection know together; `newer` has heard more.
    pub(super) fn joined(self, newer: Self) -> Self {
        let later_of = |a: Option<u32>, b: Option<u32>| match (a, b) {
            (Some(a), Some(b)) => Some(later(a, b)),
            (a, b) => a.or(b),
        };
        Self {
            acknowledged: later_of(self.acknowledged, newer.acknowledged),
            sequence_end: later_of(self.sequence_end, newer.sequence_end),
            timestamps: newer.timestamps.or(self.timestamps),
            window: if newer.acknowledged.is_some() {
                newer.window
            } else {
                self.window
            },
            finished: self.finished || newer.finished,
            reset: self.reset || newer.reset,
        }
    }

    fn accepts(&self, segment: &Segment<'_>) -> bool {
        let acknowledges = segment.flags.has(TcpFlags::ACK);
        self.sequence_end
            .is_none_or(|end| is_near(end, segment.sequence))
            && (!acknowledges
                || self
                    .acknowledged
                    .is_none_or(|known| is_near(known, segment.acknowledgement)))
    }
}

/// In the window of a segment with SYN bytes are counted without a scale (RFC 7323, 2.2).
fn window_scaled_down(segment: &Segment<'_>) -> u16 {
    let scale = match segment.options.window_scale {
        Some(scale) if segment.flags.has(TcpFlags::SYN) => scale,
        _ => 0,
    };
    segment.window.checked_shr(scale.into()).unwrap_or(0)
}

pub(super) fn is_near(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).wrapping_add(WINDOW) <= 2 * WINDOW
}

/// Where a connection stands with the committed epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A SYN was seen, and the ACK that completes the handshake was not.
    Opening { since_ns: u64 },
    /// Complete, and in no committed descriptor table: its packets are kept (KERNEL.md,
    /// Syncookies).
    Waiting,
    /// As `Waiting`, but there was too much to keep.
    Unkept,
    /// In the committed descriptor table.
    Standing,
    /// The service has closed it. `inherited` when that was before this node took over, so that
    /// no kernel here knows of it (KERNEL.md, Connections without a descriptor).
    Closed { since_ns: u64, inherited: bool },
}

/// A packet that is kept, and where it stood in the input.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub position: u64,
    pub frame: Box<[u8]>,
}

/// One connection between two ends, from its SYN to its last ACK.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub phase: Phase,
    /// The client's first sequence number, when its SYN was seen.
    pub opening: Option<u32>,
    /// The packet that said so, as long as packets are kept: for the next standby.
    pub syn: Option<Kept>,
    pub client: ClientView,
    /// What a committed table said that the service has acknowledged: all that is known of a
    /// client that has not spoken since this node began to listen.
    pub service_acknowledged: Option<u32>,
    pub kept: Vec<Kept>,
    /// The service has sent something on it, so it has been accepted.
    pub accepted: bool,
    /// The number after the service's FIN, once that was seen.
    pub service_end: Option<u32>,
    pub service_reset: bool,
}

impl Connection {
    pub fn new(phase: Phase, opening: Option<u32>) -> Self {
        let client = ClientView {
            sequence_end: opening.map(|sequence| sequence.wrapping_add(1)),
            ..ClientView::default()
        };
        Self {
            phase,
            opening,
            syn: None,
            client,
            service_acknowledged: None,
            kept: Vec::new(),
            accepted: false,
            service_end: None,
            service_reset: false,
        }
    }

    /// Whether a number of the client's after its SYN is of this connection and not of another
    /// between the same ends: it lies behind the SYN, and no further ahead of what was heard than a
    /// window reaches. (A comparison with the SYN alone would be wrong after 2 GiB, and where the
    /// clock that gives first numbers has gone half round since the connection before.)
    pub fn may_own(&self, client_sequence: u32) -> bool {
        let Some(opening) = self.opening else {
            return true;
        };
        let heard_end = self.client.sequence_end.unwrap_or(opening);
        let reach = heard_end.wrapping_sub(opening).saturating_add(WINDOW);
        let offset = client_sequence.wrapping_sub(opening);
        offset > 0 && offset <= reach
    }

    /// Takes in what a segment of the client says.
    pub fn hear(&mut self, segment: &Segment<'_>) {
        self.client.note(segment);
        let heard = |opening| {
            let end = self.client.sequence_end.unwrap_or(opening);
            end.wrapping_sub(opening)
        };
        // Before the numbers come round to the first one, which then would say nothing more.
        if self
            .opening
            .is_some_and(|opening| heard(opening) > FORGET_OPENING_AFTER)
        {
            self.opening = None;
        }
    }

    /// Where the client's bytes end, as far as anything says.
    pub fn client_end(&self) -> Option<u32> {
        match (self.client.sequence_end, self.service_acknowledged) {
            (Some(heard), Some(told)) if is_near(heard, told) => Some(later(heard, told)),
            (heard, told) => heard.or(told),
        }
    }

    /// Whether neither end can say anything more.
    pub fn is_over(&self) -> bool {
        let reset = self.client.reset || self.service_reset;
        reset || (self.client.finished && self.service_end.is_some())
    }

    /// Forgets the kept packets, and says how many bytes that frees.
    pub fn drop_kept(&mut self) -> usize {
        self.syn = None;
        std::mem::take(&mut self.kept)
            .iter()
            .map(|kept| kept.frame.len())
            .sum()
    }
}

/// All that is known between two ends: a connection, and perhaps the one that the client opened
/// after it, of which the committed epochs know nothing yet.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub current: Connection,
    pub next: Option<Box<Connection>>,
}

impl Flow {
    pub fn new(current: Connection) -> Self {
        Self {
            current,
            next: None,
        }
    }

    /// The connection to which a number of the client's belongs; none when that was over before
    /// the current one opened.
    pub fn owner(&mut self, client_sequence: u32) -> Option<&mut Connection> {
        self.newest_first()
            .find(|connection| connection.may_own(client_sequence))
    }

    /// The connection to which a segment of the service belongs.
    pub fn owner_of_output(&mut self, segment: &Segment<'_>) -> Option<&mut Connection> {
        if segment.flags.has(TcpFlags::ACK) {
            // The service acknowledges the client that it talks to.
            return self.owner(segment.acknowledgement);
        }
        // A reset that answers a segment has that one's acknowledgement for its own number, and
        // none itself (RFC 9293, 3.10.7.1).
        self.newest_first()
            .find(|connection| connection.client.acknowledged == Some(segment.sequence))
    }

    fn newest_first(&mut self) -> impl Iterator<Item = &mut Connection> {
        let current = std::iter::once(&mut self.current);
        self.next.as_deref_mut().into_iter().chain(current)
    }

    /// Makes the connection to which a number of the client's belongs the current one; those before
    /// it are over. Says how many kept bytes that frees.
    pub fn turn_to(&mut self, client_sequence: u32) -> usize {
        let next_owns = |next: &Connection| next.may_own(client_sequence);
        if self.next.as_deref().is_some_and(next_owns) {
            let freed = self.current.drop_kept();
            self.promote_next();
            return freed;
        }
        if self.current.may_own(client_sequence) {
            return 0;
        }
        // All that was heard is of connections that the client opened later: the log of a standby
        // begins at a mark, and the connection may not have said anything since.
        let unheard = Connection::new(Phase::Standing, None);
        let mut later = std::mem::replace(&mut self.current, unheard);
        match &self.next {
            Some(_) => later.drop_kept(),
            None => {
                self.next = Some(Box::new(later));
                0
            }
        }
    }

    /// The newest that stands: one before it, still in the table, is dead.
    pub fn standing_or_current(&self) -> &Connection {
        match &self.next {
            Some(next) if next.phase == Phase::Standing => next,
            _ => &self.current,
        }
    }

    /// The current connection is over; true when a newer one takes its place.
    pub fn promote_next(&mut self) -> bool {
        match self.next.take() {
            Some(next) => {
                self.current = *next;
                true
            }
            None => false,
        }
    }
}
