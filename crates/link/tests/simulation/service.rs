//! The service and the part of its kernel that matters: sockets, a listener with syncookies, an
//! accept queue, TIME_WAIT.

use crate::Random;
use std::collections::{BTreeMap, VecDeque};
use unbroken_wire::Tuple;
use unbroken_wire::craft::{self, CraftedPacket, Direction, Resend, SegmentNumbers};
use unbroken_wire::flows::{ClientView, NamedConnection};
use unbroken_wire::packet::{Packet, Segment, TcpFlags, VNET_HEADER_BYTES};
use unbroken_wire::serial::is_after;

/// A segment holds whole answers.
const MSS: u16 = 800;

#[derive(Clone, Debug, Default)]
pub struct Socket {
    /// No two connections have the same: the client's first number, shifted, and its port.
    object: u64,
    /// First unacknowledged number; `queue` begins there.
    acknowledged: u32,
    queue: Vec<u8>,
    expected: u32,
    unread: usize,
    client_finished: bool,
}

/// What an epoch carries.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub counter: u64,
    pub table: BTreeMap<Tuple, Socket>,
    /// Where the last connection from each port ended. On a kernel with syncookies a handshake's
    /// ACK that outlives its connection makes a ghost of it; so that none haunts a run, this
    /// network is taken to keep no packet that long.
    ended: BTreeMap<Tuple, u32>,
}

impl State {
    /// The connections of the table by object.
    pub fn named(&self) -> BTreeMap<u64, NamedConnection> {
        let named = |(tuple, socket): (&Tuple, &Socket)| {
            let client_sequence = socket.expected;
            (
                socket.object,
                NamedConnection {
                    tuple: *tuple,
                    client_sequence,
                },
            )
        };
        self.table.iter().map(named).collect()
    }

    /// What the service has acknowledged on a connection.
    pub fn expected(&self, tuple: &Tuple) -> Option<u32> {
        self.table.get(tuple).map(|socket| socket.expected)
    }
}

/// The running service. What is not in `state` dies with it.
#[derive(Debug, Default)]
pub struct Service {
    pub state: State,
    waiting: BTreeMap<Tuple, Socket>,
    time_wait: BTreeMap<Tuple, SegmentNumbers>,
    pub output: VecDeque<Vec<u8>>,
    /// Handshakes of connections that have ended, which came again.
    pub ghosts: usize,
}

impl Service {
    /// Brings a committed state to life: drops what each client has acknowledged, and sends the
    /// rest again.
    pub fn restored(mut state: State, view: impl Fn(Tuple) -> Option<ClientView>) -> Self {
        for (tuple, socket) in &mut state.table {
            if let Some(number) = view(*tuple).and_then(|client| client.acknowledged) {
                socket.acknowledge(number);
            }
        }
        let mut service = Self {
            state,
            ..Self::default()
        };
        let tuples: Vec<Tuple> = service.state.table.keys().copied().collect();
        for tuple in tuples {
            service.send_again(tuple);
        }
        service
    }

    /// The program does something: accepts, reads and answers, or closes.
    pub fn act(&mut self, random: &mut Random) {
        if random.one_in(3) && !self.waiting.is_empty() {
            let index = random.below(self.waiting.len());
            let tuple = *self.waiting.keys().nth(index).unwrap();
            let socket = self.waiting.remove(&tuple).unwrap();
            self.state.table.insert(tuple, socket);
        }
        if self.state.table.is_empty() {
            return;
        }
        let index = random.below(self.state.table.len());
        let (tuple, socket) = self.state.table.iter_mut().nth(index).unwrap();
        let tuple = *tuple;
        if socket.unread > 0 {
            let count = 1 + random.below(socket.unread);
            socket.unread -= count;
            let start = socket.queue.len();
            for _ in 0..count {
                self.state.counter += 1;
                socket
                    .queue
                    .extend_from_slice(&self.state.counter.to_be_bytes());
            }
            let numbers = socket.numbers(start);
            let data = socket.queue[start..].to_vec();
            self.send(Resend {
                tuple,
                numbers,
                mss: MSS,
                data: &data,
            });
        } else if socket.client_finished && socket.queue.is_empty() {
            let numbers = socket.numbers(0);
            self.state.ended.insert(tuple, socket.expected);
            self.state.table.remove(&tuple);
            self.emit(craft::fin(tuple, Direction::ToClient, numbers));
            let after = SegmentNumbers {
                sequence: numbers.sequence.wrapping_add(1),
                ..numbers
            };
            self.time_wait.insert(tuple, after);
        }
    }

    /// The kernel's retransmission timer.
    pub fn retry(&mut self, random: &mut Random) {
        if !self.state.table.is_empty() {
            let index = random.below(self.state.table.len());
            let tuple = *self.state.table.keys().nth(index).unwrap();
            self.send_again(tuple);
        }
    }

    pub fn input(&mut self, frame: &[u8]) {
        let Packet::Tcp(segment) = Packet::parse(frame) else {
            panic!("not a segment")
        };
        let tuple = Tuple::new(segment.destination, segment.source);
        if let Some(socket) = self.state.table.get_mut(&tuple) {
            let answer = socket.input(&segment);
            self.answer(tuple, answer);
        } else if let Some(socket) = self.waiting.get_mut(&tuple) {
            let answer = socket.input(&segment);
            self.answer(tuple, answer);
        } else if segment.is_reset() {
            self.time_wait.remove(&tuple);
        } else if segment.is_opening() {
            self.offer_a_cookie(tuple, &segment);
        } else if self.completes_a_handshake(tuple, &segment) {
            self.time_wait.remove(&tuple);
            let port = u64::from(tuple.remote().port());
            let mut socket = Socket {
                object: u64::from(segment.sequence) << 16 | port,
                acknowledged: segment.acknowledgement,
                expected: segment.sequence,
                ..Socket::default()
            };
            let answer = socket.input(&segment);
            self.waiting.insert(tuple, socket);
            self.answer(tuple, answer);
        } else if let Some(numbers) = self.time_wait.get(&tuple) {
            if segment.flags.has(TcpFlags::FIN) {
                let answer = craft::ack(tuple, Direction::ToClient, *numbers);
                self.emit(answer);
            }
        } else {
            let numbers = numbers(segment.acknowledgement, segment.sequence_end());
            self.emit_with(
                craft::ack(tuple, Direction::ToClient, numbers),
                TcpFlags::RST,
            );
        }
    }

    fn completes_a_handshake(&mut self, tuple: Tuple, segment: &Segment<'_>) -> bool {
        let returned = segment.acknowledgement == cookie(tuple, segment.sequence).wrapping_add(1);
        let ended = self.state.ended.get(&tuple);
        let is_ghost = ended.is_some_and(|end| !is_after(segment.sequence, *end));
        self.ghosts += usize::from(returned && is_ghost);
        returned && !is_ghost
    }

    fn offer_a_cookie(&mut self, tuple: Tuple, segment: &Segment<'_>) {
        let first = segment.sequence.wrapping_add(1);
        let numbers = numbers(cookie(tuple, first), first);
        self.emit_with(
            craft::ack(tuple, Direction::ToClient, numbers),
            TcpFlags::SYN,
        );
    }

    fn answer(&mut self, tuple: Tuple, numbers: Option<SegmentNumbers>) {
        if let Some(numbers) = numbers {
            self.emit(craft::ack(tuple, Direction::ToClient, numbers));
        }
    }

    fn send_again(&mut self, tuple: Tuple) {
        let Some(socket) = self.state.table.get(&tuple) else {
            return;
        };
        let data = socket.queue.clone();
        let numbers = socket.numbers(0);
        self.send(Resend {
            tuple,
            numbers,
            mss: MSS,
            data: &data,
        });
    }

    fn send(&mut self, resend: Resend<'_>) {
        craft::data_segments(&resend).for_each(|packet| self.emit(packet));
    }

    fn emit(&mut self, packet: CraftedPacket) {
        self.output.push_back(packet.frame().to_vec());
    }

    fn emit_with(&mut self, packet: CraftedPacket, flag: TcpFlags) {
        let mut frame = packet.frame().to_vec();
        // Nobody here looks at checksums.
        frame[VNET_HEADER_BYTES + 20 + 13] |= flag.0;
        self.output.push_back(frame);
    }
}

impl Socket {
    fn input(&mut self, segment: &Segment<'_>) -> Option<SegmentNumbers> {
        if segment.is_opening() {
            return None;
        }
        self.acknowledge(segment.acknowledgement);
        let old = self.expected.wrapping_sub(segment.sequence) as usize;
        let finishes = segment.flags.has(TcpFlags::FIN);
        if old <= segment.payload.len() && !self.client_finished {
            let new = segment.payload.len() - old;
            self.unread += new;
            self.expected = self.expected.wrapping_add(new as u32);
            if finishes {
                self.client_finished = true;
                self.expected = self.expected.wrapping_add(1);
            }
        }
        let wants_answer = finishes || !segment.payload.is_empty();
        wants_answer.then(|| self.numbers(self.queue.len()))
    }

    fn acknowledge(&mut self, number: u32) {
        let count = number.wrapping_sub(self.acknowledged) as usize;
        if is_after(number, self.acknowledged) && count <= self.queue.len() {
            self.queue.drain(..count);
            self.acknowledged = number;
        }
    }

    fn numbers(&self, offset: usize) -> SegmentNumbers {
        numbers(self.acknowledged.wrapping_add(offset as u32), self.expected)
    }
}

fn numbers(sequence: u32, acknowledgement: u32) -> SegmentNumbers {
    SegmentNumbers {
        sequence,
        acknowledgement,
        window: u16::MAX,
        timestamps: None,
    }
}

/// The same on every kernel of one machine: the secret is per boot.
fn cookie(tuple: Tuple, first: u32) -> u32 {
    Random(u64::from(tuple.remote().port()) << 32 | u64::from(first)).draw() as u32
}
