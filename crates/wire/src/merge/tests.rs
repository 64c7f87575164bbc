use super::*;
use crate::Tuple;
use crate::craft::{self, Direction, Resend, SegmentNumbers};
use crate::gate::Gate;
use crate::packet::{Packet, Timestamps};
use proptest::prelude::*;
use unbroken_core::give_up::{GiveUp, GiveUpLimits};
use unbroken_core::role::{Event, Role};

const TUPLES: [(&str, &str); 3] = [
    ("10.211.0.2:80", "10.211.0.1:50000"),
    ("10.211.0.2:80", "10.211.0.1:50001"),
    ("[fd75::2]:80", "[fd75::1]:50000"),
];

fn tuple(index: usize) -> Tuple {
    let (local, remote) = TUPLES[index];
    Tuple::new(local.parse().unwrap(), remote.parse().unwrap())
}

/// A gate that lets all of `frames` go.
fn gate(frames: &[(OutputKind, Vec<u8>)]) -> Gate {
    let mut role = Role::primary(GiveUp::new(GiveUpLimits::default()));
    role.apply(Event::Launched, 0);
    let mut gate = Gate::new(16 << 20, 1);
    for (kind, bytes) in frames {
        assert!(gate.hold(*kind, 0, bytes));
    }
    gate.pass(role.pass_permit().unwrap());
    gate
}

/// The frames that a device would be given.
fn written(frames: &[(OutputKind, Vec<u8>)]) -> Vec<(OutputKind, Vec<u8>)> {
    let mut gate = gate(frames);
    let released = gate.released();
    let mut count = 0;
    let written = merge(released.iter())
        .into_iter()
        .map(|run| match run {
            Run::Alone(frame) => {
                count += 1;
                (frame.kind(), frame.bytes().to_vec())
            }
            Run::Joined(joined) => {
                count += joined.frames().len();
                let bytes = match joined.frames() {
                    [frame] => frame.bytes().to_vec(),
                    _ => [
                        joined.front(),
                        joined.payloads().collect::<Vec<_>>().concat(),
                    ]
                    .concat(),
                };
                (OutputKind::Packet, bytes)
            }
        })
        .collect();
    assert_eq!(count, frames.len());
    written
}

/// What a client hears, joined wherever it can be.
#[derive(Clone, Debug, PartialEq)]
enum Heard {
    Data {
        sequence: u32,
        bytes: Vec<u8>,
        newest: (u32, u16, Option<Timestamps>),
        pushes: bool,
    },
    Other(Vec<u8>),
}

fn heard_by(tuple: Tuple, frames: &[(OutputKind, Vec<u8>)]) -> Vec<Heard> {
    let mut heard: Vec<Heard> = Vec::new();
    for (kind, frame) in frames {
        let segment = match (kind, Packet::parse(frame)) {
            (OutputKind::Packet, Packet::Tcp(segment)) => segment,
            (OutputKind::Packet, _) => {
                heard.push(Heard::Other(frame.clone()));
                continue;
            }
            _ => continue,
        };
        if Tuple::new(segment.source, segment.destination) != tuple {
            continue;
        }
        let is_data = !segment.payload.is_empty() && !segment.flags.has(TcpFlags::FIN);
        if !is_data {
            heard.push(Heard::Other(frame.clone()));
            continue;
        }
        let numbers = (
            segment.acknowledgement,
            segment.window,
            segment.options.timestamps,
        );
        let push = segment.flags.has(TcpFlags::PSH);
        match heard.last_mut() {
            Some(Heard::Data {
                sequence,
                bytes,
                newest,
                pushes,
            }) if sequence.wrapping_add(bytes.len() as u32) == segment.sequence => {
                bytes.extend_from_slice(segment.payload);
                *newest = numbers;
                *pushes |= push;
            }
            _ => heard.push(Heard::Data {
                sequence: segment.sequence,
                bytes: segment.payload.to_vec(),
                newest: numbers,
                pushes: push,
            }),
        }
    }
    heard
}

/// Completes the checksum of a frame that asks for it, as the kernel does, and says whether both
/// are right.
fn checksums_hold(frame: &[u8]) -> bool {
    let (offload, packet) = VnetHeader::split(frame).unwrap();
    let mut packet = packet.to_vec();
    let start = if packet[0] >> 4 == 4 { 20 } else { 40 };
    if offload.flags & NEEDS_CHECKSUM != 0 {
        assert_eq!(usize::from(offload.checksum_start), start);
        let at = start + usize::from(offload.checksum_offset);
        let checksum = finish(sum(&packet[start..]));
        packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    let addresses = if start == 20 { 12..20 } else { 8..40 };
    let pseudo_header = sum(&packet[addresses]) + 6 + (packet.len() - start) as u32;
    let internet_holds = start == 40 || finish(sum(&packet[..20])) == 0;
    internet_holds && finish(pseudo_header + sum(&packet[start..])) == 0
}

/// The frames of a service: each step is of one connection, of a kind, and says so much.
fn frames(steps: &[(usize, u8, usize)], timestamps: bool) -> Vec<(OutputKind, Vec<u8>)> {
    let mut next = [u32::MAX - 3000, 5, 900];
    let mut frames = Vec::new();
    for (time, &(connection, kind, length)) in (1..).zip(steps) {
        let numbers = |sequence| SegmentNumbers {
            sequence,
            acknowledgement: time,
            window: 100 + time as u16,
            timestamps: timestamps.then_some(Timestamps {
                value: time,
                echo: 1,
            }),
        };
        let tuple = tuple(connection);
        let sequence = &mut next[connection];
        let bytes = match kind {
            0 => craft::ack(tuple, Direction::ToClient, numbers(*sequence))
                .frame()
                .to_vec(),
            1 => craft::fin(tuple, Direction::ToClient, numbers(*sequence))
                .frame()
                .to_vec(),
            2 => vec![0x99; length],
            3 => {
                frames.push((OutputKind::StandardOutput, vec![b'x'; length]));
                continue;
            }
            _ => {
                if kind == 4 {
                    // Something was lost, or is said again.
                    *sequence = sequence.wrapping_sub(50);
                }
                let data: Vec<u8> = (0..length).map(|n| (n as u8) ^ time as u8).collect();
                let resend = Resend {
                    tuple,
                    numbers: numbers(*sequence),
                    mss: 60_000,
                    data: &data,
                };
                *sequence = sequence.wrapping_add(length as u32);
                let packet = craft::data_segments(&resend).next().unwrap();
                packet.frame().to_vec()
            }
        };
        frames.push((OutputKind::Packet, bytes));
    }
    frames
}

proptest! {
    #[test]
    fn every_client_hears_what_it_would_have_heard(
        steps in proptest::collection::vec((0usize..3, 0u8..40, 1usize..3000), 0..120),
        timestamps: bool,
    ) {
        let frames = frames(&steps, timestamps);
        let written = written(&frames);
        for index in 0..TUPLES.len() {
            prop_assert_eq!(heard_by(tuple(index), &written), heard_by(tuple(index), &frames));
        }
        for (kind, frame) in &written {
            if *kind == OutputKind::Packet && matches!(Packet::parse(frame), Packet::Tcp(_)) {
                prop_assert!(checksums_hold(frame));
                prop_assert!(frame.len() <= crate::packet::FRAME_BYTES_MAX);
            }
        }
        let text = |frames: &[(OutputKind, Vec<u8>)]| -> Vec<Vec<u8>> {
            let text = frames.iter().filter(|(kind, _)| *kind == OutputKind::StandardOutput);
            text.map(|(_, bytes)| bytes.clone()).collect()
        };
        prop_assert_eq!(text(&written), text(&frames));
    }

    #[test]
    fn no_bytes_panic(frame in proptest::collection::vec(any::<u8>(), 0..120), version: bool) {
        let mut frame = frame;
        if let Some(first) = frame.get_mut(VNET_HEADER_BYTES) {
            *first = if version { 0x45 } else { 0x60 };
        }
        let frames = vec![(OutputKind::Packet, frame); 2];
        prop_assert_eq!(written(&frames).len(), 2);
    }
}

#[test]
fn a_round_of_a_chat_is_a_packet_for_each_listener() {
    let steps: Vec<_> = (0..60).map(|step| (step % 3, 9, 80 + step)).collect();
    let written = written(&frames(&steps, true));
    assert_eq!(written.len(), 3);
    let (offload, packet) = VnetHeader::split(&written[2].1).unwrap();
    let sizes = (offload.gso_type, offload.gso_size, offload.header_length);
    assert_eq!(sizes, (GSO_TCP_V6, 80 + 59, 40 + 32));
    assert_eq!(
        packet.len(),
        40 + 32 + (80..140).skip(2).step_by(3).sum::<usize>()
    );
}
