//! Reading packets as a TUN device gives them: a bare IP packet behind a virtio network header.
//!
//! Nothing here trusts a length: whatever is cut off, contradicts itself or is unknown comes out as
//! [`Packet::Other`]. Checksums are not looked at; with offload most of them are not there yet.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of the virtio network header in front of each packet (`struct virtio_net_hdr`,
/// `include/uapi/linux/virtio_net.h`; `IFF_VNET_HDR` with the default `TUNSETVNETHDRSZ`).
pub const VNET_HEADER_BYTES: usize = 10;

/// The longest frame that a TUN device gives or takes: a header and 64 KiB less one.
pub const FRAME_BYTES_MAX: usize = VNET_HEADER_BYTES + 65_535;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

// IPv6 next-header values that are headers on the way to the real one (RFC 8200, section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// `struct virtio_net_hdr`, little-endian as TUN gives it on x86-64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// Bit 0, `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum is still to be completed.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`; 0 is a packet that is not to be cut.
    pub gso_type: u8,
    pub header_length: u16,
    pub gso_size: u16,
    pub checksum_start: u16,
    pub checksum_offset: u16,
}

impl VnetHeader {
    /// Splits a frame; `None` when it is shorter than the header.
    pub fn split(frame: &[u8]) -> Option<(Self, &[u8])> {
        let (header, packet) = frame.split_first_chunk::<VNET_HEADER_BYTES>()?;
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let header = Self {
            flags: header[0],
            gso_type: header[1],
            header_length: word(2),
            gso_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        };
        Some((header, packet))
    }
}

/// The flag byte of a TCP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    pub const FIN: Self = Self(0x01);
    pub const SYN: Self = Self(0x02);
    pub const RST: Self = Self(0x04);
    pub const PSH: Self = Self(0x08);
    pub const ACK: Self = Self(0x10);

    pub fn has(self, flag: Self) -> bool {
        self.0 & flag.0 == flag.0
    }

    pub fn with(self, flag: Self) -> Self {
        Self(self.0 | flag.0)
    }
}

/// The timestamps option (RFC 7323).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamps {
    pub value: u32,
    pub echo: u32,
}

/// The options of one segment that matter to us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    pub mss: Option<u16>,
    pub window_scale: Option<u8>,
    pub sack_permitted: bool,
    pub timestamps: Option<Timestamps>,
}

/// A TCP segment, possibly one that offload has not cut yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub sequence: u32,
    /// Means nothing without [`TcpFlags::ACK`].
    pub acknowledgement: u32,
    pub flags: TcpFlags,
    /// Not scaled.
    pub window: u16,
    pub options: TcpOptions,
    pub payload: &'a [u8],
}

impl Segment<'_> {
    /// The sequence number after this segment: SYN and FIN take one each.
    pub fn sequence_end(&self) -> u32 {
        let syn = u32::from(self.flags.has(TcpFlags::SYN));
        let fin = u32::from(self.flags.has(TcpFlags::FIN));
        self.sequence
            .wrapping_add(self.payload.len() as u32)
            .wrapping_add(syn + fin)
    }

    /// Whether this ends the connection at once.
    pub fn is_reset(&self) -> bool {
        self.flags.has(TcpFlags::RST)
    }

    /// Whether this is a client's first segment: SYN without ACK.
    pub fn is_opening(&self) -> bool {
        self.flags.has(TcpFlags::SYN) && !self.flags.has(TcpFlags::ACK)
    }
}

/// A UDP datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub payload: &'a [u8],
}

/// One packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    Tcp(Segment<'a>),
    Udp(Datagram<'a>),
    /// Part of a packet: its ports, if it has any, are not looked at.
    Fragment {
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
    },
    /// Another protocol over IP, ICMP for one.
    Internet {
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
    },
    /// Malformed, cut off, or not IP.
    Other,
}

impl<'a> Packet<'a> {
    /// Reads a frame: virtio network header and IP packet.
    pub fn parse(frame: &'a [u8]) -> Self {
        let Some((header, packet)) = VnetHeader::split(frame) else {
            return Packet::Other;
        };
        let oversized = header.gso_type != 0;
        Internet::parse(packet, oversized)
            .and_then(Internet::transport)
            .unwrap_or(Packet::Other)
    }
}

/// An IP packet, its headers read up to the transport's.
struct Internet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    fragment: bool,
    body: &'a [u8],
}

impl<'a> Internet<'a> {
    fn parse(packet: &'a [u8], oversized: bool) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::parse_v4(packet, oversized),
            6 => Self::parse_v6(packet, oversized),
            _ => None,
        }
    }

    fn parse_v4(packet: &'a [u8], oversized: bool) -> Option<Self> {
        let header = packet.first_chunk::<20>()?;
        let header_bytes = usize::from(header[0] & 0x0f) * 4;
        let total_bytes = match usize::from(u16::from_be_bytes([header[2], header[3]])) {
            // A packet beyond 64 KiB that offload will cut has no length (BIG TCP).
            0 if oversized => packet.len(),
            total_bytes => total_bytes,
        };
        if header_bytes < header.len() {
            return None;
        }
        // More fragments, or not the first one (RFC 791, 3.1).
        let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
        Some(Self {
            source: Ipv4Addr::from(*header[12..].first_chunk()?).into(),
            destination: Ipv4Addr::from(*header[16..].first_chunk()?).into(),
            protocol: header[9],
            fragment,
            body: packet.get(header_bytes..total_bytes)?,
        })
    }

    fn parse_v6(packet: &'a [u8], oversized: bool) -> Option<Self> {
        let (header, rest) = packet.split_first_chunk::<40>()?;
        let payload_bytes = match usize::from(u16::from_be_bytes([header[4], header[5]])) {
            0 if oversized => rest.len(),
            payload_bytes => payload_bytes,
        };
        let mut packet = Self {
            source: Ipv6Addr::from(*header[8..].first_chunk()?).into(),
            destination: Ipv6Addr::from(*header[24..].first_chunk()?).into(),
            protocol: header[6],
            fragment: false,
            body: rest.get(..payload_bytes)?,
        };
        while !packet.fragment && packet.skip_extension()? {}
        Some(packet)
    }

    /// Steps over one extension header; false when there is none. Ends, for each takes 8 bytes.
    fn skip_extension(&mut self) -> Option<bool> {
        let length_bytes = match self.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(*self.body.get(1)?) + 1) * 8,
            AUTHENTICATION => (usize::from(*self.body.get(1)?) + 2) * 4,
            FRAGMENT => {
                let word = u16::from_be_bytes([*self.body.get(2)?, *self.body.get(3)?]);
                // Offset in the upper 13 bits, "more" in the lowest (RFC 8200, 4.5).
                self.fragment = word & 0xfff9 != 0;
                8
            }
            _ => return Some(false),
        };
        self.protocol = *self.body.first()?;
        self.body = self.body.get(length_bytes..)?;
        Some(true)
    }

    fn transport(self) -> Option<Packet<'a>> {
        let Self {
            source,
            destination,
            protocol,
            ..
        } = self;
        if self.fragment {
            return Some(Packet::Fragment {
                source,
                destination,
                protocol,
            });
        }
        match protocol {
            PROTOCOL_TCP => self.tcp().map(Packet::Tcp),
            PROTOCOL_UDP => self.udp().map(Packet::Udp),
            _ => Some(Packet::Internet {
                source,
                destination,
                protocol,
            }),
        }
    }

    fn tcp(&self) -> Option<Segment<'a>> {
        let header = self.body.first_chunk::<20>()?;
        let header_bytes = usize::from(header[12] >> 4) * 4;
        let options = self.body.get(header.len()..header_bytes)?;
        let (source, destination) = self.ports()?;
        Some(Segment {
            source,
            destination,
            sequence: u32::from_be_bytes(*header[4..].first_chunk()?),
            acknowledgement: u32::from_be_bytes(*header[8..].first_chunk()?),
            flags: TcpFlags(header[13]),
            window: u16::from_be_bytes([header[14], header[15]]),
            options: TcpOptions::parse(options),
            payload: self.body.get(header_bytes..)?,
        })
    }

    fn udp(&self) -> Option<Datagram<'a>> {
        let header = self.body.first_chunk::<8>()?;
        let length_bytes = match usize::from(u16::from_be_bytes([header[4], header[5]])) {
            // A jumbogram, or one that offload will cut.
            0 => self.body.len(),
            length_bytes => length_bytes,
        };
        let (source, destination) = self.ports()?;
        let payload = self.body.get(header.len()..length_bytes)?;
        Some(Datagram {
            source,
            destination,
            payload,
        })
    }

    fn ports(&self) -> Option<(SocketAddr, SocketAddr)> {
        let ports = self.body.first_chunk::<4>()?;
        let source = u16::from_be_bytes([ports[0], ports[1]]);
        let destination = u16::from_be_bytes([ports[2], ports[3]]);
        Some((
            SocketAddr::new(self.source, source),
            SocketAddr::new(self.destination, destination),
        ))
    }
}

impl TcpOptions {
    /// Reads an option list up to its end or its first flaw, as the kernel does
    /// (`tcp_parse_options`, `net/ipv4/tcp_input.c`).
    fn parse(mut list: &[u8]) -> Self {
        let mut options = Self::default();
        while let Some((kind, rest)) = list.split_first() {
            match kind {
                0 => break,
                1 => list = rest,
                _ => {
                    let length = usize::from(rest.first().copied().unwrap_or(0));
                    let (Some(content), true) = (list.get(2..length), length >= 2) else {
                        break;
                    };
                    options.take(*kind, content);
                    list = &list[length..];
                }
            }
        }
        options
    }

    fn take(&mut self, kind: u8, content: &[u8]) {
        match (kind, content) {
            (2, [high, low]) => self.mss = Some(u16::from_be_bytes([*high, *low])),
            (3, [scale]) => self.window_scale = Some(*scale),
            (4, []) => self.sack_permitted = true,
            (8, [v0, v1, v2, v3, e0, e1, e2, e3]) => {
                self.timestamps = Some(Timestamps {
                    value: u32::from_be_bytes([*v0, *v1, *v2, *v3]),
                    echo: u32::from_be_bytes([*e0, *e1, *e2, *e3]),
                });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
