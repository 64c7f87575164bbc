//! Packets made by hand, as the node's wire makes them: just enough TCP for the tests.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use unbroken_objects::tcp::{Inject, Resend};
use unbroken_sys::socket;

const FIN: u8 = 1;
const PUSH: u8 = 8;
const ACK: u8 = 16;

struct Header {
    source: SocketAddr,
    destination: SocketAddr,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    window: u16,
    timestamps: Option<(u32, u32)>,
}

/// Sends what `inject` describes; call it where the client lives.
pub fn inject(inject: &Inject) {
    let header = Header {
        source: inject.source,
        destination: inject.destination,
        sequence: inject.sequence,
        acknowledgement: inject.acknowledgement,
        flags: if inject.fin { ACK | FIN } else { ACK },
        window: inject.window,
        timestamps: inject.timestamps,
    };
    send(&header, &[]);
}

/// Sends what `resend` describes; call it where the replica lives.
pub fn resend(resend: &Resend, bytes: &[u8]) {
    let mut header = Header {
        source: resend.local,
        destination: resend.remote,
        sequence: resend.sequence,
        acknowledgement: resend.acknowledgement,
        flags: ACK,
        window: resend.window,
        timestamps: resend.timestamps,
    };
    // Raw sockets do not cut packets to the device's 1500 bytes.
    let most = (resend.segment_bytes as usize).min(1400);
    for segment in bytes.chunks(most) {
        header.flags = ACK | PUSH;
        send(&header, segment);
        header.sequence = header.sequence.wrapping_add(segment.len() as u32);
    }
    if resend.fin || bytes.is_empty() {
        header.flags = if resend.fin { ACK | FIN } else { ACK };
        send(&header, &[]);
    }
}

fn send(header: &Header, payload: &[u8]) {
    let packet = match (header.source.ip(), header.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let tcp = tcp(header, payload, &source.octets(), &destination.octets());
            let mut packet = vec![0x45, 0];
            packet.extend(((20 + tcp.len()) as u16).to_be_bytes());
            packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(tcp);
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let tcp = tcp(header, payload, &source.octets(), &destination.octets());
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend((tcp.len() as u16).to_be_bytes());
            packet.extend([6, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet.extend(tcp);
            packet
        }
        mixed => panic!("addresses of two families: {mixed:?}"),
    };
    let family = if header.source.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let raw = socket::open(family, libc::SOCK_RAW, libc::IPPROTO_RAW).unwrap();
    socket::connect(raw.as_fd(), &SocketAddr::new(header.destination.ip(), 0)).unwrap();
    assert_eq!(socket::send(raw.as_fd(), &packet, 0).unwrap(), packet.len());
}

fn tcp(header: &Header, payload: &[u8], source: &[u8], destination: &[u8]) -> Vec<u8> {
    let words = if header.timestamps.is_some() { 8 } else { 5 };
    let mut tcp = Vec::new();
    tcp.extend(header.source.port().to_be_bytes());
    tcp.extend(header.destination.port().to_be_bytes());
    tcp.extend(header.sequence.to_be_bytes());
    tcp.extend(header.acknowledgement.to_be_bytes());
    tcp.extend([words << 4, header.flags]);
    tcp.extend(header.window.to_be_bytes());
    tcp.extend([0; 4]);
    if let Some((value, echo)) = header.timestamps {
        tcp.extend([1, 1, 8, 10]);
        tcp.extend(value.to_be_bytes());
        tcp.extend(echo.to_be_bytes());
    }
    tcp.extend(payload);
    let mut pseudo = [source, destination].concat();
    pseudo.extend((tcp.len() as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, 6]);
    pseudo.extend(&tcp);
    let sum = checksum(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    tcp
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
