//! Released segments of one connection that follow each other leave as one packet, as a network card
//! joins what it receives (GRO): an epoch holds many, and each that is written by itself runs through
//! the whole network stack and wakes its client.
//!
//! The joined packet says what the segments said: their bytes, the acknowledgement, window, and
//! timestamps of the last. The kernel cuts it again, into pieces no longer than the longest of them,
//! where it leaves on a real link.

use crate::craft::{
    IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, PROTOCOL_TCP, TCP_HEADER_BYTES, TIMESTAMPS_BYTES, finish,
    sum,
};
use crate::gate::{OutputKind, ReleasedFrame};
use crate::packet::{TcpFlags, VNET_HEADER_BYTES, VnetHeader};
use std::collections::HashMap;

/// Two NOPs and the option, as Linux sends it on every segment.
const TIMESTAMPS_START: [u8; 4] = [1, 1, 8, 10];
const FRONT_BYTES_MAX: usize =
    VNET_HEADER_BYTES + IPV6_HEADER_BYTES + TCP_HEADER_BYTES + TIMESTAMPS_BYTES;
/// The longest IP packet.
const PACKET_BYTES_MAX: usize = 65_535;
/// Below what one `writev` takes (`IOV_MAX`).
const SEGMENTS_MAX: usize = 512;

// include/uapi/linux/virtio_net.h
const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP_V4: u8 = 1;
const GSO_TCP_V6: u8 = 4;
const TCP_CHECKSUM_OFFSET: usize = 16;

/// One or more released frames that are written by one call.
#[derive(Debug)]
pub enum Run<'a> {
    Alone(ReleasedFrame<'a>),
    Joined(Joined<'a>),
}

/// Segments of one connection in a row.
#[derive(Debug)]
pub struct Joined<'a> {
    frames: Vec<ReleasedFrame<'a>>,
    first: Piece<'a>,
    last: Piece<'a>,
    payload_bytes: usize,
    /// Into which the packet is to be cut, if it is.
    piece_bytes: u16,
    pushes: bool,
}

/// Puts frames that may go together. The order within a connection stays; so does that of all else.
pub fn merge<'a>(frames: impl Iterator<Item = ReleasedFrame<'a>>) -> Vec<Run<'a>> {
    let mut runs: Vec<Run<'a>> = Vec::with_capacity(frames.size_hint().0);
    // The run of each connection that another segment may join.
    let mut open: HashMap<Connection<'a>, usize> = HashMap::new();
    for frame in frames {
        let segment = match frame.kind() {
            OutputKind::Packet => Segment::of(frame.bytes()),
            OutputKind::StandardOutput | OutputKind::StandardError => {
                runs.push(Run::Alone(frame));
                continue;
            }
        };
        let Some(segment) = segment else {
            // It may belong to any connection: it overtakes none, nor is it overtaken.
            open.clear();
            runs.push(Run::Alone(frame));
            continue;
        };
        let Some(piece) = segment.piece() else {
            open.remove(&segment.connection);
            runs.push(Run::Alone(frame));
            continue;
        };
        if let Some(at) = open.get(&segment.connection)
            && let Some(Run::Joined(joined)) = runs.get_mut(*at)
            && joined.takes(&piece)
        {
            joined.add(frame, piece);
            continue;
        }
        open.insert(segment.connection, runs.len());
        runs.push(Run::Joined(Joined::new(frame, piece)));
    }
    runs
}

/// Addresses and ports, as they stand in the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Connection<'a> {
    addresses: &'a [u8],
    ports: &'a [u8],
}

/// A TCP segment in an IP packet without options.
#[derive(Clone, Copy, Debug)]
struct Segment<'a> {
    connection: Connection<'a>,
    offload: VnetHeader,
    internet: &'a [u8],
    tcp: &'a [u8],
}

impl<'a> Segment<'a> {
    fn of(frame: &'a [u8]) -> Option<Segment<'a>> {
        let (offload, packet) = VnetHeader::split(frame)?;
        let internet_bytes = match packet.first()? {
            0x45 => IPV4_HEADER_BYTES,
            first if first >> 4 == 6 => IPV6_HEADER_BYTES,
            _ => return None,
        };
        let (internet, tcp) = packet.split_at_checked(internet_bytes)?;
        let word = |at: usize| usize::from(u16::from_be_bytes([internet[at], internet[at + 1]]));
        let (protocol, is_whole, addresses) = if internet_bytes == IPV4_HEADER_BYTES {
            // Neither cut off nor a fragment.
            let is_whole = word(2) == packet.len() && word(6) & 0x3fff == 0;
            (internet[9], is_whole, &internet[12..])
        } else {
            (internet[6], word(4) == tcp.len(), &internet[8..])
        };
        (protocol == PROTOCOL_TCP && is_whole && tcp.len() >= TCP_HEADER_BYTES).then(|| Segment {
            connection: Connection {
                addresses,
                ports: &tcp[..4],
            },
            offload,
            internet,
            tcp,
        })
    }

    /// The segment, if it says nothing but data and an acknowledgement.
    fn piece(&self) -> Option<Piece<'a>> {
        let tcp = self.tcp;
        let header_bytes = usize::from(tcp[12] >> 4) * 4;
        let options = tcp.get(TCP_HEADER_BYTES..header_bytes)?;
        let says_only_time = options.is_empty()
            || (options.len() == TIMESTAMPS_BYTES && options.starts_with(&TIMESTAMPS_START));
        let flags = TcpFlags(tcp[13]);
        let is_plain = tcp[12] & 0x0f == 0 && TcpFlags(flags.0 & !TcpFlags::PSH.0) == TcpFlags::ACK;
        let (header, payload) = tcp.split_at_checked(header_bytes)?;
        if !says_only_time || !is_plain || payload.is_empty() {
            return None;
        }
        let piece_bytes = match self.offload.gso_type {
            GSO_NONE => u16::try_from(payload.len()).ok()?,
            GSO_TCP_V4 | GSO_TCP_V6 => self.offload.gso_size,
            _ => return None,
        };
        Some(Piece {
            internet: self.internet,
            header,
            payload,
            piece_bytes,
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Piece<'a> {
    internet: &'a [u8],
    header: &'a [u8],
    payload: &'a [u8],
    /// Into which it is to be cut.
    piece_bytes: u16,
}

impl Piece<'_> {
    fn sequence(&self) -> u32 {
        u32::from_be_bytes([
            self.header[4],
            self.header[5],
            self.header[6],
            self.header[7],
        ])
    }

    fn pushes(&self) -> bool {
        TcpFlags(self.header[13]).has(TcpFlags::PSH)
    }

    /// What routers see of it besides addresses: class and flow, how far it may go.
    fn service(&self) -> (&[u8], &[u8]) {
        match self.internet.len() {
            IPV4_HEADER_BYTES => (&self.internet[..2], &self.internet[6..9]),
            _ => (&self.internet[..4], &self.internet[7..8]),
        }
    }
}

impl<'a> Joined<'a> {
    fn new(frame: ReleasedFrame<'a>, piece: Piece<'a>) -> Joined<'a> {
        Joined {
            frames: vec![frame],
            first: piece,
            last: piece,
            payload_bytes: piece.payload.len(),
            piece_bytes: piece.piece_bytes,
            pushes: piece.pushes(),
        }
    }

    fn takes(&self, piece: &Piece<'_>) -> bool {
        let end = self
            .first
            .sequence()
            .wrapping_add(self.payload_bytes as u32);
        let headers_bytes = self.first.internet.len() + self.first.header.len();
        piece.sequence() == end
            && piece.service() == self.first.service()
            && piece.header.len() == self.first.header.len()
            && headers_bytes + self.payload_bytes + piece.payload.len() <= PACKET_BYTES_MAX
            && self.frames.len() < SEGMENTS_MAX
    }

    fn add(&mut self, frame: ReleasedFrame<'a>, piece: Piece<'a>) {
        self.frames.push(frame);
        self.last = piece;
        self.payload_bytes += piece.payload.len();
        self.piece_bytes = self.piece_bytes.max(piece.piece_bytes);
        self.pushes |= piece.pushes();
    }

    /// The segments, as they were.
    pub fn frames(&self) -> &[ReleasedFrame<'a>] {
        &self.frames
    }

    /// What stands in front of the payloads in the joined packet.
    pub fn front(&self) -> Vec<u8> {
        let mut front = Vec::with_capacity(FRONT_BYTES_MAX);
        self.write_front(&mut front);
        front
    }

    pub fn payloads(&self) -> impl Iterator<Item = &'a [u8]> + '_ {
        // The headers of all are as long as those of the first.
        let headers_bytes = self.first.internet.len() + self.first.header.len();
        let frames = self.frames.iter();
        frames.map(move |frame| &frame.bytes()[VNET_HEADER_BYTES + headers_bytes..])
    }

    fn write_front(&self, front: &mut Vec<u8>) {
        let internet_bytes = self.first.internet.len();
        let headers_bytes = internet_bytes + self.first.header.len();
        let is_v4 = internet_bytes == IPV4_HEADER_BYTES;
        let gso_type = if is_v4 { GSO_TCP_V4 } else { GSO_TCP_V6 };
        front.extend_from_slice(&[NEEDS_CHECKSUM, gso_type]);
        for word in [
            headers_bytes as u16,
            self.piece_bytes,
            internet_bytes as u16,
            TCP_CHECKSUM_OFFSET as u16,
        ] {
            front.extend_from_slice(&word.to_le_bytes());
        }
        front.extend_from_slice(self.first.internet);
        // The newest acknowledgement, window, and time.
        front.extend_from_slice(self.last.header);
        let (internet, tcp) = front[VNET_HEADER_BYTES..].split_at_mut(internet_bytes);
        let tcp_bytes = tcp.len() + self.payload_bytes;
        tcp[4..8].copy_from_slice(&self.first.header[4..8]);
        if self.pushes {
            tcp[13] |= TcpFlags::PSH.0;
        }
        if is_v4 {
            let total_bytes = (internet_bytes + tcp_bytes) as u16;
            internet[2..4].copy_from_slice(&total_bytes.to_be_bytes());
            internet[10..12].fill(0);
            let checksum = finish(sum(internet));
            internet[10..12].copy_from_slice(&checksum.to_be_bytes());
        } else {
            internet[4..6].copy_from_slice(&(tcp_bytes as u16).to_be_bytes());
        }
        // Of the pseudo header alone, and not inverted: the rest is left to whoever needs it.
        let addresses = if is_v4 {
            &internet[12..]
        } else {
            &internet[8..]
        };
        let pseudo_header = u32::from(PROTOCOL_TCP) + tcp_bytes as u32 + sum(addresses);
        let checksum = !finish(pseudo_header);
        tcp[TCP_CHECKSUM_OFFSET..TCP_CHECKSUM_OFFSET + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests;
