//! Frames and text between the host and the service.

use super::Common;
use crate::clock::now_ns;
use crate::log;
use crate::primary::line::Line;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use unbroken_core::epoch::Committed;
use unbroken_core::role::Role;
use unbroken_link::{Connections, InputLogWriter};
use unbroken_wire::Tuple;
use unbroken_wire::flows::{
    Activity, ConnectionChange, Flows, LatePacket, NamedConnection, TableChange,
};
use unbroken_wire::gate::{Gate, OutputKind};
use unbroken_wire::merge::{self, Run};
use unbroken_wire::packet::Packet;
use unbroken_wire::tun::{ClientSide, ServiceSide};

/// A frame is at most 64 KiB of packet behind its virtio header.
const FRAME_BYTES_MAX: usize = 65_536 + 64;
/// Output that may wait for one commit; more stays in the kernel's queues.
const GATE_BYTES: usize = 32 << 20;
/// What the service's TUN device queues at least (drivers/net/tun.c, TUN_READQ_SIZE).
const SERVICE_QUEUE_FRAMES: usize = 500;
/// Frames carried one way before the other way has its turn.
const FRAMES_PER_TURN: usize = 64;
/// Frames among which segments are joined: those of an epoch, mostly.
const FRAMES_PER_SENDING: usize = 1024;

/// What is known of the clients' input so far.
pub struct Input {
    pub flows: Flows,
    /// The number that the next frame gets.
    pub position: u64,
}

pub(super) struct Traffic {
    clients: ClientSide,
    service: ServiceSide,
    /// The service's standard output and error, `None` once it closed them.
    texts: [Option<OwnedFd>; 2],
    outputs: [OwnedFd; 2],
    gate: Gate,
    flows: Flows,
    log: Option<InputLogWriter>,
    /// The number that the next input frame gets.
    input_position: u64,
    buffer: Vec<u8>,
    activity: Activity,
    line: Arc<Line>,
    /// Frames of the service since the last mark.
    output_frames: usize,
    /// Whether the last mark found everything read.
    drained: bool,
}

impl Traffic {
    pub fn new(
        common: &Common,
        tun: OwnedFd,
        texts: [Option<OwnedFd>; 2],
        input: Input,
        line: Arc<Line>,
        term: u64,
    ) -> io::Result<Traffic> {
        Ok(Traffic {
            clients: ClientSide::new(common.host_tun.try_clone()?),
            service: ServiceSide::new(tun),
            texts,
            outputs: [
                common.outputs[0].try_clone()?,
                common.outputs[1].try_clone()?,
            ],
            gate: Gate::new(GATE_BYTES, term),
            flows: input.flows,
            log: None,
            input_position: input.position,
            buffer: vec![0; FRAME_BYTES_MAX],
            activity: Activity::default(),
            line,
            output_frames: 0,
            drained: true,
        })
    }

    /// What tells that there is something to carry.
    pub fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.clients.as_fd(), self.service.as_fd()]
            .into_iter()
            .chain(self.texts.iter().flatten().map(|text| text.as_fd()))
    }

    pub fn service_tun(&self) -> BorrowedFd<'_> {
        self.service.as_fd()
    }

    pub fn texts(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        self.texts
            .iter()
            .enumerate()
            .filter_map(|(number, text)| Some((number, text.as_ref()?.as_fd())))
    }

    pub fn input_position(&self) -> u64 {
        self.input_position
    }

    /// Whether output waits that no capture under way covers.
    pub fn output_waits(&self) -> bool {
        self.gate.open_epoch_has_output()
    }

    /// Carries input to the service; true when there was any. The frame stands in the log before
    /// the service can see it.
    pub fn carry_input(&mut self) -> io::Result<bool> {
        let mut count = 0;
        let now = now_ns();
        while count < FRAMES_PER_TURN {
            if self
                .log
                .as_ref()
                .is_some_and(|log| !log.has_room(FRAME_BYTES_MAX))
            {
                break;
            }
            let Some(length) = self.clients.read(&mut self.buffer)? else {
                break;
            };
            let frame = &self.buffer[..length];
            let mut reset = None;
            match self.flows.answer_for_closed(frame) {
                LatePacket::ForTheKernel => {}
                LatePacket::Reopens(first) => reset = Some(first),
                LatePacket::Swallow => continue,
                LatePacket::Answer(answer) => {
                    // Without room its client asks again.
                    let _ = self.gate.hold(OutputKind::Packet, now, answer.frame());
                    continue;
                }
            }
            if let Some(log) = &mut self.log
                && !log.append(self.input_position, frame)
            {
                return Err(io::Error::other(
                    "the input log has no room for a frame that fits",
                ));
            }
            if let Some(reset) = reset {
                let _ = self.service.write(reset.frame())?;
            }
            self.flows.input(self.input_position, frame, now);
            note(&mut self.activity, &self.line, frame, Direction::ToService);
            self.input_position += 1;
            // A network may lose a packet; its sender brings it again.
            let _ = self.service.write(frame)?;
            count += 1;
        }
        Ok(count > 0)
    }

    /// Takes the service's output to the gate; true when there was any. `all` reads until there is
    /// no more: the drain of a capture.
    pub fn collect_output(&mut self, all: bool) -> io::Result<bool> {
        let now = now_ns();
        let (mut count, mut empty) = (0, false);
        while (all || count < FRAMES_PER_TURN) && self.gate.has_room(FRAME_BYTES_MAX) {
            let service = &self.service;
            let read = |room: &mut [u8]| service.read(room);
            match self
                .gate
                .hold_with(OutputKind::Packet, now, FRAME_BYTES_MAX, read)?
            {
                Some(frame) => {
                    self.flows.output(frame, now);
                    note(&mut self.activity, &self.line, frame, Direction::ToClient);
                }
                None => {
                    empty = true;
                    break;
                }
            }
            count += 1;
        }
        self.output_frames += count;
        self.drained = empty;
        for (number, kind) in [
            (0, OutputKind::StandardOutput),
            (1, OutputKind::StandardError),
        ] {
            count += self.collect_text(number, kind, all, now)?;
        }
        Ok(count > 0)
    }

    fn collect_text(
        &mut self,
        number: usize,
        kind: OutputKind,
        all: bool,
        now: u64,
    ) -> io::Result<usize> {
        let mut count = 0;
        while (all || count < FRAMES_PER_TURN) && self.gate.has_room(FRAME_BYTES_MAX) {
            let Some(text) = &self.texts[number] else {
                break;
            };
            let mut closed = false;
            let read = |room: &mut [u8]| match rustix::io::read(text, room) {
                Ok(0) => {
                    closed = true;
                    Ok(None)
                }
                Ok(length) => Ok(Some(length)),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
                Err(error) => Err(io::Error::from(error)),
            };
            if self
                .gate
                .hold_with(kind, now, FRAME_BYTES_MAX, read)?
                .is_none()
            {
                if closed {
                    self.texts[number] = None;
                }
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// The mark of an epoch: everything read so far belongs to it.
    pub fn mark(&mut self) {
        self.gate.close_epoch();
    }

    /// Leaves where packets went since the last mark on the line; to be called at each.
    pub fn take_activity(&mut self) {
        // Fewer frames than its queue takes cannot have overrun it, if it was empty before.
        self.activity.anywhere |= !self.drained || self.output_frames >= SERVICE_QUEUE_FRAMES;
        let unread = !self.drained;
        self.line.swap_activity(&mut self.activity);
        self.activity.connections.clear();
        self.activity.anywhere = unread;
        self.output_frames = 0;
    }

    /// Takes the mark back: the epoch was not made.
    pub fn unmark(&mut self) {
        self.gate.reopen_epoch();
    }

    /// Lets out what the commit covers.
    pub fn release(&mut self, role: &Role, committed: Committed) -> Result<(), String> {
        let Some(permit) = role.release_permit() else {
            return Ok(());
        };
        self.gate
            .release(committed, permit)
            .map_err(|error| error.to_string())
    }

    /// Lets everything out when the service is unprotected; nothing otherwise.
    pub fn pass(&mut self, role: &Role) {
        if let Some(permit) = role.pass_permit() {
            self.gate.pass(permit);
        }
    }

    /// Sends what may go; true when there was any. `held` is told of each how long it waited.
    pub fn send_released(&mut self, mut held: impl FnMut(u64)) -> io::Result<bool> {
        let mut any = false;
        let mut released = self.gate.released();
        loop {
            let runs = merge::merge(released.iter().take(FRAMES_PER_SENDING));
            let mut count = 0;
            for run in &runs {
                match run {
                    Run::Joined(joined) => {
                        self.clients.send_joined(joined)?;
                        count += joined.frames().len();
                        continue;
                    }
                    Run::Alone(frame) => match frame.kind() {
                        OutputKind::Packet => {
                            let _ = self.clients.send(*frame)?;
                        }
                        OutputKind::StandardOutput => write_text(&self.outputs[0], frame.bytes()),
                        OutputKind::StandardError => write_text(&self.outputs[1], frame.bytes()),
                    },
                }
                count += 1;
            }
            if count == 0 {
                return Ok(any);
            }
            let now = now_ns();
            for _ in 0..count {
                released.pop(now).into_iter().for_each(&mut held);
            }
            any = true;
        }
    }

    /// From now on input is logged for a standby, which first gets what connections in their
    /// handshake have said.
    pub fn begin_log(&mut self, mut log: InputLogWriter) -> bool {
        for (position, frame) in self.flows.retained() {
            if !log.append(position, frame) {
                return false;
            }
        }
        self.log = Some(log);
        true
    }

    /// What goes with an epoch, at its mark; with the one that completes a fill, all that the
    /// standby cannot know.
    pub fn take_connections(&mut self, completes_fill: bool) -> Connections {
        let mut connections = Connections::default();
        self.flows.take_accepted(&mut connections.accepted);
        if completes_fill {
            connections.known = self.flows.known();
        }
        connections
    }

    /// Takes in what an epoch that is committed says of connections.
    pub fn commit(
        &mut self,
        change: &ConnectionChange,
        accepted: &[NamedConnection],
        input_position: u64,
        completes_fill: bool,
    ) {
        let (stood, now) = (&change.stood, now_ns());
        if completes_fill {
            self.flows
                .commit_survey(stood, accepted, input_position, now);
        } else {
            let change = TableChange {
                gone: &change.gone,
                stood,
                accepted,
                input_position,
            };
            self.flows.commit(change, now);
        }
    }

    pub fn end_log(&mut self) {
        self.log = None;
    }

    /// Begins the epochs of a new standby.
    pub fn restart_gate(&mut self, term: u64) {
        self.gate.restart(term);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToService,
    ToClient,
}

/// Notes whose packet it is, and what it says of the service's bytes under way.
fn note(activity: &mut Activity, line: &Line, frame: &[u8], direction: Direction) {
    match Packet::parse(frame) {
        Packet::Tcp(segment) => {
            let (from, to) = (segment.source, segment.destination);
            let tuple = match direction {
                Direction::ToService => Tuple::new(to, from),
                Direction::ToClient => Tuple::new(from, to),
            };
            activity.connections.insert(tuple);
            match direction {
                Direction::ToService => line.sent().input(tuple, &segment),
                Direction::ToClient => line.sent().output(tuple, &segment),
            }
        }
        // Of no connection of TCP.
        Packet::Udp(_) => {}
        // ICMP may speak of any.
        _ if direction == Direction::ToService => activity.anywhere = true,
        _ => {}
    }
}

/// Whoever reads our output may have gone; the service must not suffer for it.
fn write_text(output: &OwnedFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(output, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log!(
                    "{} bytes of the service's output could not be written: {error}",
                    bytes.len()
                );
                return;
            }
        }
    }
}
