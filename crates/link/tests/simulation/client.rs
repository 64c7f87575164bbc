//! A client: opens a connection, sends requests, checks answers, closes, comes back.

use crate::Random;
use unbroken_wire::Tuple;
use unbroken_wire::craft::{self, CraftedPacket, Direction, Resend, SegmentNumbers};
use unbroken_wire::packet::{Packet, Segment, TcpFlags};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Closed,
    Opening,
    Established,
    Closing,
}

pub struct Client {
    tuple: Tuple,
    phase: Phase,
    opening: u32,
    /// First unacknowledged number, and the next new one.
    acknowledged: u32,
    next: u32,
    /// The next number expected of the service.
    expected: u32,
    /// Requests of this connection that have no answer yet.
    unanswered: usize,
    rounds_left: usize,
    requests_left: usize,
    retry_at_ns: u64,
    pub answers: Vec<u64>,
    pub requested: usize,
}

const RETRY_NS: u64 = 200_000_000;

impl Client {
    pub fn new(tuple: Tuple, rounds: usize, opening: u32) -> Self {
        Self {
            tuple,
            phase: Phase::Closed,
            opening,
            acknowledged: 0,
            next: 0,
            expected: 0,
            unanswered: 0,
            rounds_left: rounds,
            requests_left: 0,
            retry_at_ns: 0,
            answers: Vec::new(),
            requested: 0,
        }
    }

    pub fn is_done(&self) -> bool {
        self.phase == Phase::Closed && self.rounds_left == 0
    }

    /// When this client would next say something again by itself.
    pub fn retry_at_ns(&self) -> Option<u64> {
        (!self.is_done()).then_some(self.retry_at_ns)
    }

    /// Does what it feels like, or what its timer demands.
    pub fn act(&mut self, random: &mut Random, now_ns: u64, out: &mut Vec<CraftedPacket>) {
        match self.phase {
            Phase::Closed if self.rounds_left > 0 => {
                self.rounds_left -= 1;
                self.requests_left = random.below(20);
                // From the same port again: a little or a lot further on.
                let stride = if random.one_in(2) { 1_000 } else { 1 << 26 };
                self.opening = self.opening.wrapping_add(stride);
                self.acknowledged = self.opening.wrapping_add(1);
                self.next = self.acknowledged;
                self.phase = Phase::Opening;
                self.say_again(now_ns, out);
            }
            Phase::Established if self.requests_left > 0 && self.next == self.acknowledged => {
                let count = 1 + random.below(self.requests_left.min(5));
                self.requests_left -= count;
                self.requested += count;
                self.unanswered += count;
                self.next = self.next.wrapping_add(count as u32);
                self.say_again(now_ns, out);
            }
            Phase::Established if self.requests_left == 0 && self.unanswered == 0 => {
                self.phase = Phase::Closing;
                self.next = self.next.wrapping_add(1);
                self.say_again(now_ns, out);
            }
            _ if now_ns >= self.retry_at_ns => self.say_again(now_ns, out),
            _ => {}
        }
    }

    pub fn hear(&mut self, frame: &[u8], now_ns: u64, out: &mut Vec<CraftedPacket>) {
        let Packet::Tcp(segment) = Packet::parse(frame) else {
            panic!("not a segment")
        };
        if self.phase == Phase::Closed {
            return;
        }
        if self.phase == Phase::Opening {
            self.hear_the_answer_to_syn(&segment, now_ns, out);
            return;
        }
        let ahead = segment.acknowledgement.wrapping_sub(self.acknowledged);
        if ahead > self.next.wrapping_sub(self.acknowledged) {
            return;
        }
        assert!(
            !segment.is_reset(),
            "{:?} was reset: {segment:?}",
            self.tuple
        );
        self.acknowledged = segment.acknowledgement;
        self.take_answers(&segment, now_ns, out);
        if self.phase == Phase::Closing && self.acknowledged == self.next {
            self.phase = Phase::Closed;
            self.opening = self.next;
        }
    }

    fn hear_the_answer_to_syn(
        &mut self,
        segment: &Segment<'_>,
        now_ns: u64,
        out: &mut Vec<CraftedPacket>,
    ) {
        let answers = segment.flags.has(TcpFlags::SYN.with(TcpFlags::ACK));
        if answers && segment.acknowledgement == self.opening.wrapping_add(1) {
            self.expected = segment.sequence.wrapping_add(1);
            self.phase = Phase::Established;
            self.say_again(now_ns, out);
        }
    }

    fn take_answers(&mut self, segment: &Segment<'_>, now_ns: u64, out: &mut Vec<CraftedPacket>) {
        if segment.payload.is_empty() {
            return;
        }
        let old = self.expected.wrapping_sub(segment.sequence) as usize;
        if old <= segment.payload.len() {
            for value in segment.payload[old..].chunks_exact(8) {
                let value = value
                    .iter()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte));
                assert!(
                    self.unanswered > 0,
                    "an answer {value} that nobody asked for"
                );
                self.unanswered -= 1;
                self.answers.push(value);
            }
            self.expected = self
                .expected
                .wrapping_add((segment.payload.len() - old) as u32);
        }
        self.retry_at_ns = now_ns + RETRY_NS;
        out.push(craft::ack(
            self.tuple,
            Direction::ToService,
            self.numbers(self.next),
        ));
    }

    /// Sends all that is not acknowledged.
    fn say_again(&mut self, now_ns: u64, out: &mut Vec<CraftedPacket>) {
        self.retry_at_ns = now_ns + RETRY_NS;
        let numbers = self.numbers(self.acknowledged);
        match self.phase {
            Phase::Closed => {}
            Phase::Opening => out.push(craft::syn(self.tuple, self.opening)),
            Phase::Closing => out.push(craft::fin(self.tuple, Direction::ToService, numbers)),
            Phase::Established => {
                let unacknowledged = self.next.wrapping_sub(self.acknowledged) as usize;
                if unacknowledged == 0 {
                    out.push(craft::ack(self.tuple, Direction::ToService, numbers));
                }
                // Data to the service is data to a client between exchanged ends.
                let tuple = Tuple::new(self.tuple.remote(), self.tuple.local());
                let data = vec![b'?'; unacknowledged];
                let resend = Resend {
                    tuple,
                    numbers,
                    mss: 1400,
                    data: &data,
                };
                out.extend(craft::data_segments(&resend));
            }
        }
    }

    fn numbers(&self, sequence: u32) -> SegmentNumbers {
        let acknowledgement = self.expected;
        SegmentNumbers {
            sequence,
            acknowledgement,
            window: u16::MAX,
            timestamps: None,
        }
    }
}
