//! Frames and text between the host and the service.

use super::Common;
use crate::clock::now_ns;
use crate::log;
use crate::primary::mailbox::Mailbox;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_core::epoch::{Committed, EpochNumber};
use unbroken_core::role::Role;
use unbroken_link::InputLogWriter;
use unbroken_wire::exchange::{Arrival, Exchange, Input, Mark};
use unbroken_wire::flows::{Activity, ConnectionChange};
use unbroken_wire::gate::{OutputKind, ReleaseError};
use unbroken_wire::merge::{self, Run};
use unbroken_wire::tun::{ClientSide, ServiceSide};

/// A frame is at most 64 KiB of packet behind its virtio header.
const FRAME_BYTES_MAX: usize = 65_536 + 64;
/// Output that may wait for one commit; more stays in the kernel's queues.
const GATE_BYTES: usize = 32 << 20;
/// Frames carried one way before the other way has its turn.
const FRAMES_PER_TURN: usize = 64;
/// Frames among which segments are joined: those of an epoch, mostly.
const FRAMES_PER_SENDING: usize = 1024;

pub(super) struct Traffic {
    clients: ClientSide,
    service: ServiceSide,
    /// The service's standard output and error, `None` once it closed them.
    texts: [Option<OwnedFd>; 2],
    outputs: [OwnedFd; 2],
    exchange: Exchange<InputLogWriter>,
    buffer: Vec<u8>,
}

impl Traffic {
    pub fn new(
        common: &Common,
        tun: OwnedFd,
        texts: [Option<OwnedFd>; 2],
        input: Input,
        mailbox: &Mailbox,
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
            exchange: Exchange::new(input, mailbox.sent_bytes(), GATE_BYTES, term),
            buffer: vec![0; FRAME_BYTES_MAX],
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

    /// Whether output waits that no capture under way covers.
    pub fn output_waits(&self) -> bool {
        self.exchange.output_waits()
    }

    /// Carries input to the service; true when there was any.
    pub fn carry_input(&mut self) -> io::Result<bool> {
        let mut count = 0;
        let now = now_ns();
        while count < FRAMES_PER_TURN && self.exchange.takes_input(FRAME_BYTES_MAX) {
            let Some(length) = self.clients.read(&mut self.buffer)? else {
                break;
            };
            let service = &self.service;
            // A network may lose a packet; its sender brings it again.
            let give = |frame: &[u8]| service.write(frame).map(|_| ());
            match self.exchange.input(&self.buffer[..length], now, give)? {
                Arrival::Given => count += 1,
                Arrival::Answered => {}
                Arrival::Unlogged => {
                    return Err(io::Error::other(
                        "the input log has no room for a frame that fits",
                    ));
                }
            }
        }
        Ok(count > 0)
    }

    /// Takes the service's output to the gate; true when there was any. `all` reads until there is
    /// no more: the drain of a capture.
    pub fn collect_output(&mut self, all: bool) -> io::Result<bool> {
        let now = now_ns();
        let (mut count, mut empty) = (0, false);
        while !empty
            && (all || count < FRAMES_PER_TURN)
            && self.exchange.takes_output(FRAME_BYTES_MAX)
        {
            let service = &self.service;
            let read = |room: &mut [u8]| service.read(room);
            match self.exchange.output(now, FRAME_BYTES_MAX, read)? {
                true => count += 1,
                false => empty = true,
            }
        }
        self.exchange.was_read(empty);
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
        while (all || count < FRAMES_PER_TURN) && self.exchange.takes_output(FRAME_BYTES_MAX) {
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
            if !self.exchange.text(kind, now, FRAME_BYTES_MAX, read)? {
                if closed {
                    self.texts[number] = None;
                }
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Lets out what is committed, if this node may.
    pub fn release(&mut self, role: &Role) -> Result<(), ReleaseError> {
        match role.release_permit() {
            Some(permit) => self.exchange.release(permit),
            None => Ok(()),
        }
    }

    /// Lets everything out when the service is unprotected; nothing otherwise.
    pub fn pass(&mut self, role: &Role) {
        if let Some(permit) = role.pass_permit() {
            self.exchange.pass(permit);
        }
    }

    /// Sends what may go; true when there was any. `held` is told of each how long it waited.
    pub fn send_released(&mut self, mut held: impl FnMut(u64)) -> io::Result<bool> {
        let mut any = false;
        let mut released = self.exchange.released();
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

    /// The mark of an epoch: everything read so far belongs to it.
    pub fn mark(&mut self, activity: &mut Activity) -> Mark {
        self.exchange.mark(activity)
    }

    /// The mark of the epoch that completes the fill of a standby, which reads `log`.
    pub fn mark_fill(
        &mut self,
        log: Option<InputLogWriter>,
        term: u64,
        activity: &mut Activity,
    ) -> Mark {
        self.exchange.mark_fill(log, term, activity)
    }

    /// Takes the mark back: the epoch was not made.
    pub fn unmark(&mut self) {
        self.exchange.unmark();
    }

    pub fn published(&mut self, number: EpochNumber, change: ConnectionChange) {
        self.exchange.published(number, change);
    }

    pub fn commit(&mut self, committed: Committed) {
        self.exchange.commit(committed, now_ns());
    }

    pub fn end_log(&mut self) {
        self.exchange.end_log();
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
