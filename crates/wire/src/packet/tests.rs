use super::*;
use crate::Tuple;
use crate::craft::{self, Direction, SegmentNumbers};
use proptest::prelude::*;

/// A frame with an empty virtio header.
fn frame(packet: &[u8]) -> Vec<u8> {
    [&[0; VNET_HEADER_BYTES], packet].concat()
}

/// An IPv4 packet around `body`.
fn v4(protocol: u8, fragment: u16, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&(20 + body.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(&fragment.to_be_bytes());
    packet.extend_from_slice(&[64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend_from_slice(body);
    packet
}

/// An IPv6 packet around `body`.
fn v6(next_header: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(body.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[next_header, 64]);
    packet.extend_from_slice(&Ipv6Addr::LOCALHOST.octets());
    packet.extend_from_slice(&Ipv6Addr::LOCALHOST.octets());
    packet.extend_from_slice(body);
    packet
}

/// A SYN with every option, and two bytes of payload.
const TCP: [u8; 42] = [
    0x00, 0x50, 0xc3, 0x50, 0, 0, 0, 5, 0, 0, 0, 9, 0xa0, 0x02, 0x01, 0x00, 0, 0, 0,
    0, // header
    2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 3, 3, 7, // options
    b'h', b'i',
];

fn expect_tcp(frame: &[u8]) {
    let Packet::Tcp(segment) = Packet::parse(frame) else {
        panic!("{:?}", Packet::parse(frame));
    };
    assert_eq!(
        (segment.source.port(), segment.destination.port()),
        (80, 50_000)
    );
    assert_eq!(
        (segment.sequence, segment.acknowledgement, segment.window),
        (5, 9, 256)
    );
    assert!(segment.is_opening() && !segment.is_reset());
    let timestamps = Some(Timestamps { value: 1, echo: 2 });
    let options = TcpOptions {
        mss: Some(1460),
        window_scale: Some(7),
        sack_permitted: true,
        timestamps,
    };
    assert_eq!(segment.options, options);
    assert_eq!((segment.payload, segment.sequence_end()), (&b"hi"[..], 8));
}

#[test]
fn tcp_over_ipv4_and_ipv6_with_and_without_extension_headers() {
    expect_tcp(&frame(&v4(PROTOCOL_TCP, 0x4000, &TCP)));
    expect_tcp(&frame(&v6(PROTOCOL_TCP, &TCP)));
    let hop_by_hop = [DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 0];
    let destination = [PROTOCOL_TCP, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    expect_tcp(&frame(&v6(
        HOP_BY_HOP,
        &[&hop_by_hop[..], &destination, &TCP].concat(),
    )));
    let atomic_fragment = [PROTOCOL_TCP, 0, 0, 0, 1, 2, 3, 4];
    expect_tcp(&frame(&v6(
        FRAGMENT,
        &[&atomic_fragment[..], &TCP].concat(),
    )));
}

#[test]
fn bytes_behind_the_packet_are_not_payload() {
    let padded = [v4(PROTOCOL_TCP, 0, &TCP), vec![0; 6]].concat();
    expect_tcp(&frame(&padded));
}

#[test]
fn a_packet_without_a_length_is_whole_only_when_offload_will_cut_it() {
    let mut packet = v4(PROTOCOL_TCP, 0, &TCP);
    packet[2..4].fill(0);
    let mut cut_later = frame(&packet);
    assert_eq!(Packet::parse(&cut_later), Packet::Other);
    cut_later[1] = 1;
    expect_tcp(&cut_later);
}

#[test]
fn other_protocols_are_told_apart() {
    let datagram = [0x00, 0x35, 0x10, 0x00, 0, 10, 0, 0, b'o', b'k'];
    let Packet::Udp(udp) = frame_parse(&v4(PROTOCOL_UDP, 0, &datagram)) else {
        panic!()
    };
    assert_eq!((udp.source.port(), udp.payload), (53, &b"ok"[..]));
    let icmp = frame_parse(&v4(1, 0, &[8, 0, 0, 0]));
    assert!(matches!(icmp, Packet::Internet { protocol: 1, .. }));
    for word in [0x2000, 0x0001] {
        let part = frame_parse(&v4(PROTOCOL_TCP, word, &TCP));
        assert!(matches!(
            part,
            Packet::Fragment {
                protocol: PROTOCOL_TCP,
                ..
            }
        ));
    }
    let part = [&[PROTOCOL_TCP, 0, 0, 1, 1, 2, 3, 4][..], &TCP].concat();
    assert!(matches!(
        frame_parse(&v6(FRAGMENT, &part)),
        Packet::Fragment { .. }
    ));
}

/// Parses a packet behind an empty virtio header; leaks, which a test may.
fn frame_parse(packet: &[u8]) -> Packet<'static> {
    Packet::parse(Vec::leak(frame(packet)))
}

#[test]
fn every_cut_of_a_packet_is_other_or_shorter_never_a_panic() {
    for packet in [v4(PROTOCOL_TCP, 0, &TCP), v6(PROTOCOL_TCP, &TCP)] {
        let whole = frame(&packet);
        for length in 0..whole.len() {
            assert_eq!(Packet::parse(&whole[..length]), Packet::Other);
        }
    }
}

#[test]
fn options_end_at_their_first_flaw() {
    let timestamps = [8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    let good = TcpOptions::parse(&timestamps);
    assert!(good.timestamps.is_some());
    for flaw in [&[5, 0][..], &[5, 1], &[5]] {
        let list = [flaw, &timestamps].concat();
        assert_eq!(
            TcpOptions::parse(&list[..flaw.len()]),
            TcpOptions::default()
        );
    }
    assert!(
        TcpOptions::parse(&[&[0][..], &timestamps].concat())
            .timestamps
            .is_none()
    );
    assert!(TcpOptions::parse(&[8, 10, 0]).timestamps.is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Packet::parse(&bytes);
    }

    /// Random bytes seldom come past the first header; damaged packets do.
    #[test]
    fn no_damage_panics(
        v6_packet: bool,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut: prop::sample::Index,
    ) {
        let addresses = if v6_packet { "[fd75::1]:80" } else { "10.0.0.1:80" };
        let tuple = Tuple::new(addresses.parse().unwrap(), addresses.parse().unwrap());
        let numbers = SegmentNumbers {
            sequence: 1,
            acknowledgement: 2,
            window: 3,
            timestamps: Some(Timestamps { value: 4, echo: 5 }),
        };
        let mut bytes = craft::fin(tuple, Direction::ToClient, numbers).frame().to_vec();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(cut.index(bytes.len() * 4).max(1));
        if let Packet::Tcp(segment) = Packet::parse(&bytes) {
            let _ = segment.sequence_end();
        }
    }
}
