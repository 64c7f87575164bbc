//! What the service has sent and its clients have not acknowledged: the send queues of its
//! connections, as their packets tell.
//!
//! A capture takes the bytes from here and need not read each queue out of the kernel, which takes
//! repair mode and four calls. It asks for exactly what the kernel says is in the queue; when this
//! has it otherwise (packets were lost on the way to the wire, or were sent before this node began
//! to listen) it says so, and the kernel is asked.

use crate::Tuple;
use crate::packet::{Segment, TcpFlags};
use crate::serial::is_after;
use std::collections::{HashMap, VecDeque};

/// Bytes kept for all connections together, what each takes for itself included. Beyond it all are
/// forgotten: queues that long are rarely sent whole anyway, and what is not sent yet is read from
/// the kernel.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// What a connection takes for itself. A client that is gone without a word leaves it here.
const STREAM_BYTES: usize = 256;
/// Buffers kept for the next connection that sends.
const SPARE_MAX: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub struct SentBytes {
    streams: HashMap<Tuple, Stream>,
    spare: Vec<VecDeque<u8>>,
    kept_bytes: usize,
}

/// One connection's bytes from the first that is not acknowledged; there is at least one.
#[derive(Debug)]
struct Stream {
    first: u32,
    bytes: VecDeque<u8>,
}

impl Stream {
    fn end(&self) -> u32 {
        self.first.wrapping_add(self.bytes.len() as u32)
    }
}

impl SentBytes {
    /// Takes in a segment of the service.
    pub fn output(&mut self, tuple: Tuple, segment: &Segment<'_>) {
        if segment.flags.has(TcpFlags::SYN) || segment.is_reset() {
            return self.forget(tuple);
        }
        if segment.payload.is_empty() {
            return;
        }
        if self.kept_bytes + segment.payload.len() + STREAM_BYTES > KEPT_BYTES_MAX {
            self.streams.clear();
            self.kept_bytes = 0;
        }
        let Self {
            streams,
            spare,
            kept_bytes,
        } = self;
        let stream = streams.entry(tuple).or_insert_with(|| {
            *kept_bytes += STREAM_BYTES;
            Stream {
                first: segment.sequence,
                bytes: spare.pop().unwrap_or_default(),
            }
        });
        let end = stream.end();
        let known = end.wrapping_sub(segment.sequence);
        let new = if is_after(segment.sequence, end) {
            // Something between was lost on the way here.
            *kept_bytes -= stream.bytes.len();
            stream.bytes.clear();
            stream.first = segment.sequence;
            segment.payload
        } else {
            // Sent again, in whole or in part.
            segment.payload.get(known as usize..).unwrap_or_default()
        };
        stream.bytes.extend(new);
        *kept_bytes += new.len();
    }

    /// Takes in a segment of the client.
    pub fn input(&mut self, tuple: Tuple, segment: &Segment<'_>) {
        if segment.is_reset() {
            return self.forget(tuple);
        }
        if !segment.flags.has(TcpFlags::ACK) {
            return;
        }
        let Some(stream) = self.streams.get_mut(&tuple) else {
            return;
        };
        if !is_after(segment.acknowledgement, stream.first) {
            return;
        }
        let count = segment.acknowledgement.wrapping_sub(stream.first) as usize;
        if count >= stream.bytes.len() {
            return self.forget(tuple);
        }
        stream.bytes.drain(..count);
        stream.first = segment.acknowledgement;
        self.kept_bytes -= count;
    }

    fn forget(&mut self, tuple: Tuple) {
        let Some(mut stream) = self.streams.remove(&tuple) else {
            return;
        };
        self.kept_bytes -= stream.bytes.len() + STREAM_BYTES;
        if self.spare.len() < SPARE_MAX {
            stream.bytes.clear();
            self.spare.push(stream.bytes);
        }
    }

    /// Fills `into` with the `length` bytes from `first` on, if they end where all that was sent
    /// does; says whether they do, and otherwise leaves it as it is.
    pub fn copy(&self, tuple: Tuple, first: u32, length: usize, into: &mut Vec<u8>) -> bool {
        let Some(stream) = self.streams.get(&tuple) else {
            return false;
        };
        let Some(skipped) = stream.bytes.len().checked_sub(length) else {
            return false;
        };
        if stream.first.wrapping_add(skipped as u32) != first {
            return false;
        }
        into.clear();
        let (front, back) = stream.bytes.as_slices();
        into.extend_from_slice(front.get(skipped..).unwrap_or_default());
        into.extend_from_slice(&back[skipped.saturating_sub(front.len())..]);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::TcpOptions;
    use proptest::prelude::*;

    fn tuple(port: u16) -> Tuple {
        Tuple::new("10.0.0.1:80".parse().unwrap(), ([10, 0, 0, 2], port).into())
    }

    fn segment(flags: u8, sequence: u32, acknowledgement: u32, payload: &[u8]) -> Segment<'_> {
        Segment {
            source: "10.0.0.1:80".parse().unwrap(),
            destination: "10.0.0.2:9".parse().unwrap(),
            sequence,
            acknowledgement,
            flags: TcpFlags(flags),
            window: 100,
            options: TcpOptions::default(),
            payload,
        }
    }

    fn copied(sent: &SentBytes, first: u32, length: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        sent.copy(tuple(9), first, length, &mut bytes)
            .then_some(bytes)
    }

    const ACK: u8 = 0x10;

    #[test]
    fn what_was_lost_or_is_older_is_not_made_up() {
        let mut sent = SentBytes::default();
        assert_eq!(copied(&sent, 7, 1), None);
        sent.output(tuple(9), &segment(ACK, 100, 0, b"abc"));
        assert_eq!(copied(&sent, 100, 3), Some(b"abc".to_vec()));
        assert_eq!(copied(&sent, 101, 2), Some(b"bc".to_vec()));
        assert_eq!(copied(&sent, 100, 2), None, "more was sent");
        assert_eq!(copied(&sent, 99, 4), None, "what was before is not known");
        sent.output(tuple(9), &segment(ACK, 105, 0, b"fg"));
        assert_eq!(copied(&sent, 100, 7), None, "two bytes were lost");
        assert_eq!(copied(&sent, 105, 2), Some(b"fg".to_vec()));
        assert_eq!(sent.kept_bytes, 2 + STREAM_BYTES);
    }

    #[test]
    fn a_new_connection_has_nothing_of_the_one_before() {
        let mut sent = SentBytes::default();
        sent.output(tuple(9), &segment(ACK, 100, 0, b"abc"));
        sent.output(tuple(9), &segment(0x12, 102, 0, b""));
        assert_eq!(copied(&sent, 102, 1), None);
        sent.output(tuple(9), &segment(ACK, 103, 0, b"x"));
        assert_eq!(copied(&sent, 103, 1), Some(b"x".to_vec()));
        sent.input(tuple(9), &segment(0x04, 0, 0, b""));
        assert_eq!(sent.kept_bytes, 0);
    }

    proptest! {
        /// Sent in pieces, some of them twice, acknowledged anywhere: what is given is what was
        /// said, around the end of the numbers too.
        #[test]
        fn a_stream_is_given_as_it_was_said(
            start in prop_oneof![Just(u32::MAX - 40), any::<u32>()],
            steps in proptest::collection::vec((0usize..20, 0usize..30, any::<bool>()), 1..60),
        ) {
            let said: Vec<u8> = (0..2000u32).map(|index| index as u8).collect();
            let mut sent = SentBytes::default();
            let (mut acknowledged, mut end) = (0usize, 0usize);
            for (length, back, acknowledges) in steps {
                if acknowledges {
                    acknowledged = (acknowledged + length).min(end);
                    let number = start.wrapping_add(acknowledged as u32);
                    sent.input(tuple(9), &segment(ACK, 0, number, b""));
                } else {
                    let from = end - back.min(end);
                    let to = from + length;
                    let number = start.wrapping_add(from as u32);
                    sent.output(tuple(9), &segment(ACK, number, 0, &said[from..to]));
                    end = end.max(to);
                }
                let first = start.wrapping_add(acknowledged as u32);
                let mut bytes = vec![99];
                if sent.copy(tuple(9), first, end - acknowledged, &mut bytes) {
                    prop_assert_eq!(&bytes, &said[acknowledged..end]);
                } else {
                    // Nothing is under way, or what was sent again after it was acknowledged is in
                    // the way.
                    prop_assert!(end == acknowledged || sent.kept_bytes > 0);
                    prop_assert_eq!(bytes, [99]);
                }
            }
        }
    }
}
