//! Packets of our own making, which a takeover sends: what the old primary sent and the client has
//! not acknowledged, the FIN that brings a restored socket to its state, the SYN that wakes a
//! listener's cookies, the answer to a late FIN.
//!
//! Each comes with a virtio network header that asks for nothing: checksums are complete and no
//! packet is longer than a segment.

use crate::Tuple;
use crate::packet::{TcpFlags, TcpOptions, Timestamps, VNET_HEADER_BYTES};
use std::net::{IpAddr, SocketAddr};

pub(crate) const IPV4_HEADER_BYTES: usize = 20;
pub(crate) const IPV6_HEADER_BYTES: usize = 40;
pub(crate) const TCP_HEADER_BYTES: usize = 20;
/// Two NOPs and the option, as Linux sends it.
pub(crate) const TIMESTAMPS_BYTES: usize = 12;
/// MSS, SACK-permitted, timestamps, window scale: the most that `syn` writes.
const OPTIONS_BYTES_MAX: usize = 24;
pub(crate) const PROTOCOL_TCP: u8 = 6;
const HOP_LIMIT: u8 = 64;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToClient,
    ToService,
}

/// The numbers of a segment, as they stand in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentNumbers {
    pub sequence: u32,
    pub acknowledgement: u32,
    /// As on the wire: already shifted by the sender's window scale.
    pub window: u16,
    /// Set when both ends agreed on timestamps.
    pub timestamps: Option<Timestamps>,
}

/// Data that the service had sent and its client has not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resend<'a> {
    pub tuple: Tuple,
    /// `sequence` is that of the first byte of `data`.
    pub numbers: SegmentNumbers,
    /// The most bytes of payload and TCP options in one segment (what the client announced).
    pub mss: u16,
    pub data: &'a [u8],
}

/// A packet of ours, virtio network header included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CraftedPacket(Vec<u8>);

impl CraftedPacket {
    /// The bytes for a TUN device.
    pub fn frame(&self) -> &[u8] {
        &self.0
    }
}

/// The packets that send `resend.data` again, PSH on the last; none when there is no data.
pub fn data_segments<'a>(resend: &Resend<'a>) -> impl Iterator<Item = CraftedPacket> + use<'a> {
    let resend = *resend;
    let options_bytes = resend.numbers.timestamps.map_or(0, |_| TIMESTAMPS_BYTES);
    // RFC 6691: options count against the MSS. The lower bound only keeps absurd input moving.
    let payload_bytes = usize::from(resend.mss).saturating_sub(options_bytes).max(1);
    let pieces = resend.data.len().div_ceil(payload_bytes);
    resend
        .data
        .chunks(payload_bytes)
        .enumerate()
        .map(move |(index, payload)| {
            let offset = (index * payload_bytes) as u32;
            let sequence = resend.numbers.sequence.wrapping_add(offset);
            let last = index + 1 == pieces;
            let flags = if last {
                TcpFlags::ACK.with(TcpFlags::PSH)
            } else {
                TcpFlags::ACK
            };
            Draft {
                tuple: resend.tuple,
                direction: Direction::ToClient,
                flags,
                numbers: SegmentNumbers {
                    sequence,
                    ..resend.numbers
                },
                options: TcpOptions {
                    timestamps: resend.numbers.timestamps,
                    ..TcpOptions::default()
                },
                payload,
            }
            .build()
        })
}

/// A FIN without data. To the service it brings a socket that was restored one byte early to
/// CLOSE_WAIT; to a client it says again that the service has closed.
pub fn fin(tuple: Tuple, direction: Direction, numbers: SegmentNumbers) -> CraftedPacket {
    bare(tuple, direction, TcpFlags::FIN.with(TcpFlags::ACK), numbers)
}

/// A reset from the client, with the number that the service expects next.
pub fn reset_by_client(tuple: Tuple, sequence: u32) -> CraftedPacket {
    let numbers = SegmentNumbers {
        sequence,
        acknowledgement: 0,
        window: 0,
        timestamps: None,
    };
    bare(tuple, Direction::ToService, TcpFlags::RST, numbers)
}

/// A pure acknowledgement.
pub fn ack(tuple: Tuple, direction: Direction, numbers: SegmentNumbers) -> CraftedPacket {
    bare(tuple, direction, TcpFlags::ACK, numbers)
}

/// A client's SYN. `tuple.remote` is an address and port that no one uses: the answer, which
/// proves that the listener has begun to hand out cookies, goes nowhere.
pub fn syn(tuple: Tuple, sequence: u32) -> CraftedPacket {
    let options = TcpOptions {
        mss: Some(1460),
        ..TcpOptions::default()
    };
    let numbers = SegmentNumbers {
        sequence,
        acknowledgement: 0,
        window: u16::MAX,
        timestamps: None,
    };
    let (direction, flags, payload) = (Direction::ToService, TcpFlags::SYN, &[][..]);
    Draft {
        tuple,
        direction,
        flags,
        numbers,
        options,
        payload,
    }
    .build()
}

/// Whether a packet is a TCP reset.
pub fn is_reset(frame: &[u8]) -> bool {
    matches!(crate::packet::Packet::parse(frame), crate::packet::Packet::Tcp(s) if s.is_reset())
}

fn bare(
    tuple: Tuple,
    direction: Direction,
    flags: TcpFlags,
    numbers: SegmentNumbers,
) -> CraftedPacket {
    let options = TcpOptions {
        timestamps: numbers.timestamps,
        ..TcpOptions::default()
    };
    Draft {
        tuple,
        direction,
        flags,
        numbers,
        options,
        payload: &[],
    }
    .build()
}

/// All that a packet is made of.
struct Draft<'a> {
    tuple: Tuple,
    direction: Direction,
    flags: TcpFlags,
    numbers: SegmentNumbers,
    options: TcpOptions,
    payload: &'a [u8],
}

impl Draft<'_> {
    fn build(&self) -> CraftedPacket {
        let (source, destination) = match self.direction {
            Direction::ToClient => (self.tuple.local(), self.tuple.remote()),
            Direction::ToService => (self.tuple.remote(), self.tuple.local()),
        };
        let mut segment = Vec::with_capacity(
            VNET_HEADER_BYTES
                + IPV6_HEADER_BYTES
                + TCP_HEADER_BYTES
                + OPTIONS_BYTES_MAX
                + self.payload.len(),
        );
        segment.resize(VNET_HEADER_BYTES, 0);
        let options = self.options();
        let tcp_bytes = TCP_HEADER_BYTES + options.len() + self.payload.len();
        let pseudo_header = push_internet_header(&mut segment, source, destination, tcp_bytes);
        let tcp_at = segment.len();
        self.push_tcp(&mut segment, source.port(), destination.port(), &options);
        let checksum = finish(pseudo_header + sum(&segment[tcp_at..]));
        segment[tcp_at + 16..tcp_at + 18].copy_from_slice(&checksum.to_be_bytes());
        CraftedPacket(segment)
    }

    fn push_tcp(&self, packet: &mut Vec<u8>, source: u16, destination: u16, options: &[u8]) {
        let header_words = (TCP_HEADER_BYTES + options.len()) / 4;
        packet.extend_from_slice(&source.to_be_bytes());
        packet.extend_from_slice(&destination.to_be_bytes());
        packet.extend_from_slice(&self.numbers.sequence.to_be_bytes());
        packet.extend_from_slice(&self.numbers.acknowledgement.to_be_bytes());
        packet.extend_from_slice(&[(header_words as u8) << 4, self.flags.0]);
        packet.extend_from_slice(&self.numbers.window.to_be_bytes());
        // Checksum, for now, and urgent pointer.
        packet.extend_from_slice(&[0; 4]);
        packet.extend_from_slice(options);
        packet.extend_from_slice(self.payload);
    }

    /// The option list, a multiple of four bytes.
    fn options(&self) -> Vec<u8> {
        let mut list = Vec::with_capacity(OPTIONS_BYTES_MAX);
        if let Some(mss) = self.options.mss {
            list.extend_from_slice(&[2, 4]);
            list.extend_from_slice(&mss.to_be_bytes());
        }
        if let Some(Timestamps { value, echo }) = self.options.timestamps {
            list.extend_from_slice(&[1, 1, 8, 10]);
            list.extend_from_slice(&value.to_be_bytes());
            list.extend_from_slice(&echo.to_be_bytes());
        }
        list
    }
}

/// Appends an IP header for `body_bytes` of TCP, and returns the sum of the pseudo header. Both
/// addresses are of one family: a [`Tuple`] of a connection has no other kind.
fn push_internet_header(
    packet: &mut Vec<u8>,
    source: SocketAddr,
    destination: SocketAddr,
    body_bytes: usize,
) -> u32 {
    let protocol_and_length = u32::from(PROTOCOL_TCP) + body_bytes as u32;
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let at = packet.len();
            let total_bytes = (IPV4_HEADER_BYTES + body_bytes) as u16;
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&total_bytes.to_be_bytes());
            // Identification 0 with "don't fragment" (RFC 6864).
            packet.extend_from_slice(&[0, 0, 0x40, 0, HOP_LIMIT, PROTOCOL_TCP, 0, 0]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
            let checksum = finish(sum(&packet[at..]));
            packet[at + 10..at + 12].copy_from_slice(&checksum.to_be_bytes());
            protocol_and_length + sum(&source.octets()) + sum(&destination.octets())
        }
        (source, destination) => {
            let (source, destination) = (v6_octets(source), v6_octets(destination));
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&(body_bytes as u16).to_be_bytes());
            packet.extend_from_slice(&[PROTOCOL_TCP, HOP_LIMIT]);
            packet.extend_from_slice(&source);
            packet.extend_from_slice(&destination);
            protocol_and_length + sum(&source) + sum(&destination)
        }
    }
}

fn v6_octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The sum of 16-bit words (RFC 1071), carries not yet folded; at most 64 KiB of bytes.
pub(crate) fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks_exact(2);
    let odd = words
        .remainder()
        .first()
        .map_or(0, |byte| u32::from(*byte) << 8);
    words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum::<u32>()
        + odd
}

/// Folds the carries and gives the checksum.
pub(crate) fn finish(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests;
