//! The order of steps between clients and the service, without any I/O of its own: what is known,
//! logged and held before a frame goes on, and what each step of an epoch means for all of that.
//!
//! ```text
//!  input(frame)   answered for the service?  ->  input log  ->  flows  ->  the service
//!  output(read)   gate  ->  flows
//!
//!  mark  ->  published  ->  commit  ->  release        an epoch; others may be marked meanwhile
//!    \-> unmark                                        one that was not made
//! ```
//!
//! Whoever drives it brings the frames and the epochs: the primary's main thread, from devices and
//! from the thread that captures, or a simulation.

use crate::Tuple;
use crate::flows::{Activity, ConnectionChange, Connections, Flows, LatePacket};
use crate::gate::{Gate, OutputKind, ReleaseError, Released};
use crate::packet::Packet;
use crate::pending::{PendingEpoch, PendingEpochs};
use crate::sent::SentBytes;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use unbroken_core::epoch::{Committed, EpochNumber};
use unbroken_core::role::{PassPermit, ReleasePermit};

/// What the service's TUN device queues at least (drivers/net/tun.c, TUN_READQ_SIZE).
const SERVICE_QUEUE_FRAMES: usize = 500;

/// Where the standby reads what clients have said.
pub trait InputLog {
    /// Whether a frame of `most_bytes` fits now.
    fn has_room(&self, most_bytes: usize) -> bool;

    /// Appends a frame; false when there is no room.
    #[must_use]
    fn append(&mut self, position: u64, frame: &[u8]) -> bool;
}

/// What became of a frame of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The service has it.
    Given,
    /// The service's kernel knows nothing of its connection any more: the answer waits at the gate,
    /// or there is none.
    Answered,
    /// The log had no room: the service must not have it, and its client sends it again.
    Unlogged,
}

/// What a mark says of its epoch.
#[derive(Debug)]
pub struct Mark {
    /// The service has been given the input before this, and none after it.
    pub input_position: u64,
    /// What goes with the epoch.
    pub connections: Connections,
    /// Whether the standby can know what clients say from here on. An epoch without that is one on
    /// which nobody can stand.
    pub is_logged: bool,
}

/// What is known of the clients' input so far.
#[derive(Debug)]
pub struct Input {
    pub flows: Flows,
    /// The number that the next frame gets.
    pub position: u64,
}

/// See the module. Times are nanoseconds of the caller's monotonic clock.
#[derive(Debug)]
pub struct Exchange<L> {
    gate: Gate,
    flows: Flows,
    /// The number that the next input frame gets.
    input_position: u64,
    /// `None` while no standby needs the input.
    log: Option<L>,
    pending: PendingEpochs,
    /// The newest epoch that is safe, while its output has no leave to go.
    committed: Option<Committed>,
    sent: Arc<Mutex<SentBytes>>,
    activity: Activity,
    /// Frames of the service since the last mark.
    output_frames: usize,
    /// Whether all the service's output was read, as of the last time.
    is_drained: bool,
}

impl<L: InputLog> Exchange<L> {
    /// For a primary of `term`. At most `gate_bytes` of output wait. `sent` is kept for whoever
    /// captures.
    pub fn new(input: Input, sent: Arc<Mutex<SentBytes>>, gate_bytes: usize, term: u64) -> Self {
        Self {
            gate: Gate::new(gate_bytes, term),
            flows: input.flows,
            input_position: input.position,
            log: None,
            pending: PendingEpochs::default(),
            committed: None,
            sent,
            activity: Activity::default(),
            output_frames: 0,
            is_drained: true,
        }
    }

    /// Whether a frame of up to `most_bytes` may be brought to [`input`](Self::input). When not,
    /// leave it where it is: the standby is behind.
    pub fn takes_input(&self, most_bytes: usize) -> bool {
        self.log.as_ref().is_none_or(|log| log.has_room(most_bytes))
    }

    /// A client's frame on its way to the service: it stands in the log before `give` has it. What
    /// is given may be a reset besides, in front of it.
    pub fn input<E>(
        &mut self,
        frame: &[u8],
        now_ns: u64,
        mut give: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Arrival, E> {
        let mut reset = None;
        match self.flows.answer_for_closed(frame) {
            LatePacket::ForTheKernel => {}
            LatePacket::Reopens(first) => reset = Some(first),
            LatePacket::Swallow => return Ok(Arrival::Answered),
            LatePacket::Answer(answer) => {
                // Without room its client asks again.
                let _ = self.gate.hold(OutputKind::Packet, now_ns, answer.frame());
                return Ok(Arrival::Answered);
            }
        }
        let position = self.input_position;
        if let Some(log) = &mut self.log
            && !log.append(position, frame)
        {
            return Ok(Arrival::Unlogged);
        }
        if let Some(reset) = reset {
            give(reset.frame())?;
        }
        self.flows.input(position, frame, now_ns);
        note(&mut self.activity, &self.sent, frame, Direction::ToService);
        self.input_position += 1;
        give(frame)?;
        Ok(Arrival::Given)
    }

    /// Whether there is room for a frame of output of up to `most_bytes`.
    pub fn takes_output(&self, most_bytes: usize) -> bool {
        self.gate.has_room(most_bytes)
    }

    /// Lets `read` put a packet of the service into the gate; false when there was none.
    pub fn output<E>(
        &mut self,
        now_ns: u64,
        most_bytes: usize,
        read: impl FnOnce(&mut [u8]) -> Result<Option<usize>, E>,
    ) -> Result<bool, E> {
        let held = self
            .gate
            .hold_with(OutputKind::Packet, now_ns, most_bytes, read)?;
        let Some(frame) = held else {
            return Ok(false);
        };
        self.flows.output(frame, now_ns);
        note(&mut self.activity, &self.sent, frame, Direction::ToClient);
        self.output_frames += 1;
        Ok(true)
    }

    /// As [`output`](Self::output), for what the service writes to its standard output or error.
    pub fn text<E>(
        &mut self,
        kind: OutputKind,
        now_ns: u64,
        most_bytes: usize,
        read: impl FnOnce(&mut [u8]) -> Result<Option<usize>, E>,
    ) -> Result<bool, E> {
        let held = self.gate.hold_with(kind, now_ns, most_bytes, read)?;
        Ok(held.is_some())
    }

    /// Packets of the service were read, until there were no more or some are left.
    pub fn was_read(&mut self, until_empty: bool) {
        self.is_drained = until_empty;
    }

    /// Whether output waits that no epoch under way covers.
    pub fn output_waits(&self) -> bool {
        self.gate.open_epoch_has_output()
    }

    /// The mark of an epoch, taken while the service stands: what was read so far belongs to it.
    /// `activity` is where packets went since the last mark, and is given an old one to be filled
    /// again.
    pub fn mark(&mut self, activity: &mut Activity) -> Mark {
        self.take_mark(false, activity)
    }

    /// The mark of the epoch that completes the fill of a standby, under a term no older than the
    /// one before. From here on `log` has the input, and first what connections in their handshake
    /// have said. With it goes all that the standby cannot know.
    pub fn mark_fill(&mut self, log: Option<L>, term: u64, activity: &mut Activity) -> Mark {
        self.log = log.and_then(|mut log| {
            let retained = self.flows.retained();
            let logged = retained
                .into_iter()
                .all(|(position, frame)| log.append(position, frame));
            logged.then_some(log)
        });
        self.gate.restart(term);
        self.pending.clear();
        self.committed = None;
        self.take_mark(true, activity)
    }

    fn take_mark(&mut self, completes_fill: bool, activity: &mut Activity) -> Mark {
        let number = self.gate.close_epoch();
        self.take_activity(activity);
        let mut connections = Connections::default();
        self.flows.take_accepted(&mut connections.accepted);
        if completes_fill {
            connections.known = self.flows.known();
        }
        let input_position = self.input_position;
        self.pending.mark(PendingEpoch {
            number,
            input_position,
            accepted: connections.accepted.clone(),
            completes_fill,
            change: ConnectionChange::default(),
        });
        Mark {
            input_position,
            connections,
            is_logged: self.log.is_some(),
        }
    }

    fn take_activity(&mut self, taken: &mut Activity) {
        // Fewer frames than its queue takes cannot have overrun it, if it was empty before.
        self.activity.anywhere |= !self.is_drained || self.output_frames >= SERVICE_QUEUE_FRAMES;
        std::mem::swap(&mut self.activity, taken);
        self.activity.connections.clear();
        self.activity.anywhere = !self.is_drained;
        self.output_frames = 0;
    }

    /// Takes the newest mark back: its epoch was not made, and what it was to have is the next's.
    pub fn unmark(&mut self) {
        self.gate.reopen_epoch();
        if let Some(epoch) = self.pending.unmark() {
            self.flows.give_accepted_back(epoch.accepted);
        }
    }

    /// A marked epoch was published, and changed this.
    pub fn published(&mut self, number: EpochNumber, change: ConnectionChange) {
        self.pending.published(number, change);
    }

    /// An epoch is safe, and those before it: their output goes as soon as there is leave.
    pub fn commit(&mut self, committed: Committed, now_ns: u64) {
        self.pending
            .commit(committed.epoch(), &mut self.flows, now_ns);
        self.committed = Some(committed);
    }

    /// Lets out what is committed.
    pub fn release(&mut self, permit: ReleasePermit<'_>) -> Result<(), ReleaseError> {
        match self.committed.take() {
            Some(committed) => self.gate.release(committed, permit),
            None => Ok(()),
        }
    }

    /// Lets everything out, because the service is unprotected.
    pub fn pass(&mut self, permit: PassPermit<'_>) {
        self.gate.pass(permit);
    }

    /// What may go and has not gone yet.
    pub fn released(&mut self) -> Released<'_> {
        self.gate.released()
    }

    /// The standby is gone: nobody reads the log, and what is safe is so no more.
    pub fn end_log(&mut self) {
        self.log = None;
        self.committed = None;
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToService,
    ToClient,
}

/// Notes whose packet it is, and what it says of the service's bytes under way.
fn note(activity: &mut Activity, sent: &Mutex<SentBytes>, frame: &[u8], direction: Direction) {
    match Packet::parse(frame) {
        Packet::Tcp(segment) => {
            let (from, to) = (segment.source, segment.destination);
            let tuple = match direction {
                Direction::ToService => Tuple::new(to, from),
                Direction::ToClient => Tuple::new(from, to),
            };
            activity.connections.insert(tuple);
            match direction {
                Direction::ToService => lock(sent).input(tuple, &segment),
                Direction::ToClient => lock(sent).output(tuple, &segment),
            }
        }
        // Of no connection of TCP.
        Packet::Udp(_) => {}
        // ICMP may speak of any.
        _ if direction == Direction::ToService => activity.anywhere = true,
        _ => {}
    }
}

/// It is whole between any two of its operations, so a panic elsewhere does not spoil it.
fn lock(sent: &Mutex<SentBytes>) -> MutexGuard<'_, SentBytes> {
    sent.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
