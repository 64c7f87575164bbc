//! Packets that come when their connection is closed: late ones of it, where the kernel that closed
//! it is gone (KERNEL.md, Connections without a descriptor), and the first of the next one.

use super::Flows;
use super::connection::{Connection, Phase, is_near};
use crate::Tuple;
use crate::craft::{self, CraftedPacket, Direction, SegmentNumbers};
use crate::packet::{Packet, Segment, TcpFlags, Timestamps};
use crate::serial::{is_after, later};

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
    /// Give the service's kernel this reset, and then the packet.
    Reopens(CraftedPacket),
}

impl Flows {
    /// What is to be done with a client's packet whose connection may be closed: what the TIME_WAIT
    /// of the kernel before the takeover would have done, which this one has not, or what the
    /// TIME_WAIT of this one would do and must not.
    pub fn answer_for_closed(&self, frame: &[u8]) -> LatePacket {
        let Packet::Tcp(segment) = Packet::parse(frame) else {
            return LatePacket::ForTheKernel;
        };
        let tuple = Tuple::new(segment.destination, segment.source);
        let Some(flow) = self.flows.get(&tuple) else {
            return LatePacket::ForTheKernel;
        };
        if segment.is_opening() {
            let last = flow.next.as_deref().unwrap_or(&flow.current);
            return reopening(last, tuple, &segment);
        }
        let Connection { phase, client, .. } = &flow.current;
        let inherited = matches!(
            phase,
            Phase::Closed {
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
}

/// What to do with a SYN between the ends of `last`, which may stand in TIME_WAIT.
///
/// A SYN that meets a TIME_WAIT gets its number from there and no cookie, whatever tcp_syncookies
/// says (net/ipv4/tcp_input.c, `tcp_conn_request`), and what its client says next would be reset by
/// the listener of a replica. So a reset ends the TIME_WAIT first, under the kernel's own conditions
/// for a new connection in its place (net/ipv4/tcp_minisocks.c, `tcp_timewait_state_process`). A
/// connection that has anything left to say, or to be acknowledged, is not touched: anybody can make
/// a SYN up (RFC 5961, 4).
fn reopening(last: &Connection, tuple: Tuple, opening: &Segment<'_>) -> LatePacket {
    let Connection {
        client,
        service_end,
        ..
    } = last;
    let all_is_heard = service_end.is_some_and(|end| client.acknowledged == Some(end));
    let waits_out = client.finished && all_is_heard;
    let Some(client_end) = last.client_end().filter(|_| waits_out) else {
        return LatePacket::ForTheKernel;
    };
    let is_newer = is_after(opening.sequence, client_end)
        || matches!((opening.options.timestamps, client.timestamps),
            (Some(new), Some(known)) if is_after(new.value, known.value));
    match is_newer {
        true => LatePacket::Reopens(craft::reset_by_client(tuple, client_end)),
        false => LatePacket::ForTheKernel,
    }
}
