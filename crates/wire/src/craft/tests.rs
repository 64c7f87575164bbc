use super::*;
use crate::packet::{Packet, Segment};
use proptest::prelude::*;

fn tuple(v6: bool) -> Tuple {
    let [local, remote] = if v6 {
        ["[fd75::1]:80", "[fd75::2]:50000"]
    } else {
        ["10.211.0.1:80", "10.211.0.2:50000"]
    };
    Tuple::new(local.parse().unwrap(), remote.parse().unwrap())
}

fn numbers(sequence: u32, timestamps: bool) -> SegmentNumbers {
    let timestamps = timestamps.then_some(Timestamps {
        value: 77,
        echo: 88,
    });
    SegmentNumbers {
        sequence,
        acknowledgement: 1234,
        window: 500,
        timestamps,
    }
}

/// Both checksums of a packet come to zero when summed with what they cover.
fn checksums_hold(frame: &[u8]) -> bool {
    let packet = &frame[VNET_HEADER_BYTES..];
    if packet[0] >> 4 == 4 {
        let pseudo = sum(&packet[12..20]) + 6 + (packet.len() - 20) as u32;
        finish(sum(&packet[..20])) == 0 && finish(pseudo + sum(&packet[20..])) == 0
    } else {
        let pseudo = sum(&packet[8..40]) + 6 + (packet.len() - 40) as u32;
        finish(pseudo + sum(&packet[40..])) == 0
    }
}

fn segment(packet: &CraftedPacket) -> Segment<'_> {
    match Packet::parse(packet.frame()) {
        Packet::Tcp(segment) => segment,
        other => panic!("not a segment: {other:?}"),
    }
}

proptest! {
    #[test]
    fn data_is_cut_into_segments_that_say_what_was_asked(
        v6: bool,
        timestamps: bool,
        sequence: u32,
        mss in 100u16..3000,
        data in proptest::collection::vec(any::<u8>(), 0..9000),
    ) {
        let numbers = numbers(sequence, timestamps);
        let resend = Resend { tuple: tuple(v6), numbers, mss, data: &data };
        let packets: Vec<_> = data_segments(&resend).collect();
        let mut seen = Vec::new();
        for (index, packet) in packets.iter().enumerate() {
            prop_assert!(checksums_hold(packet.frame()));
            let segment = segment(packet);
            prop_assert_eq!(Tuple::new(segment.source, segment.destination), tuple(v6));
            prop_assert_eq!(segment.sequence, sequence.wrapping_add(seen.len() as u32));
            prop_assert_eq!(segment.acknowledgement, 1234);
            prop_assert_eq!(segment.window, 500);
            prop_assert_eq!(segment.options.timestamps, numbers.timestamps);
            let last = index + 1 == packets.len();
            prop_assert_eq!(segment.flags.has(TcpFlags::PSH), last);
            let options_bytes = if timestamps { TIMESTAMPS_BYTES } else { 0 };
            prop_assert!(segment.payload.len() + options_bytes <= usize::from(mss));
            seen.extend_from_slice(segment.payload);
        }
        prop_assert_eq!(seen, data);
    }
}

#[test]
fn bare_segments_go_the_way_that_was_asked() {
    for v6 in [false, true] {
        let packet = fin(tuple(v6), Direction::ToService, numbers(9, true));
        assert!(checksums_hold(packet.frame()));
        let closing = segment(&packet);
        assert_eq!(closing.source, tuple(v6).remote());
        assert_eq!(closing.flags, TcpFlags::FIN.with(TcpFlags::ACK));
        assert_eq!(closing.sequence_end(), 10);

        let packet = ack(tuple(v6), Direction::ToClient, numbers(9, false));
        assert!(checksums_hold(packet.frame()));
        assert_eq!(segment(&packet).flags, TcpFlags::ACK);
        assert!(!is_reset(packet.frame()));

        let packet = syn(tuple(v6), 5);
        assert!(checksums_hold(packet.frame()));
        assert!(segment(&packet).is_opening());
        assert_eq!(segment(&packet).options.mss, Some(1460));
    }
}
