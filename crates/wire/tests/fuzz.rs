//! What the wire does with packets that are almost right.

use unbroken_core::give_up::{GiveUp, GiveUpLimits};
use unbroken_core::role::{Event, Role};
use unbroken_wire::Tuple;
use unbroken_wire::craft::{self, Direction, SegmentNumbers};
use unbroken_wire::flows::{FlowLimits, Flows, NamedConnection, TableChange};
use unbroken_wire::gate::{Gate, OutputKind};
use unbroken_wire::merge::{Run, merge};
use unbroken_wire::packet::{FRAME_BYTES_MAX, Packet, Timestamps};

fn tuple(text: &str) -> Tuple {
    let service = text.parse().expect("an address");
    let client = text.replace(":80", ":4000").parse().expect("an address");
    Tuple::new(service, client)
}

fn frames() -> Vec<Vec<u8>> {
    let numbers = SegmentNumbers {
        sequence: 1000,
        acknowledgement: 2000,
        window: 300,
        timestamps: Some(Timestamps { value: 4, echo: 5 }),
    };
    let mut frames = Vec::new();
    for ends in ["10.211.0.2:80", "[fd75::2]:80"].map(tuple) {
        for direction in [Direction::ToClient, Direction::ToService] {
            frames.push(craft::fin(ends, direction, numbers).frame().to_vec());
            frames.push(craft::ack(ends, direction, numbers).frame().to_vec());
        }
    }
    frames
}

#[test]
fn fuzz_packet() {
    unbroken_fuzz::bytes("packet", &frames(), |frame| {
        if let Packet::Tcp(segment) = Packet::parse(frame) {
            let _ = segment.sequence_end();
            assert!(segment.payload.len() <= frame.len());
        }
    });
}

/// A row of packets either way, with epochs between them: each is a byte that says what it is, two
/// for the length, and the frame.
#[test]
fn fuzz_merge() {
    let mut role = Role::primary(GiveUp::new(GiveUpLimits::default()));
    role.apply(Event::Launched, 0);
    let data = craft::data_segments(&craft::Resend {
        tuple: tuple("10.211.0.2:80"),
        numbers: SegmentNumbers {
            sequence: 1000,
            acknowledgement: 2000,
            window: 300,
            timestamps: Some(Timestamps { value: 4, echo: 5 }),
        },
        mss: 60,
        data: &[7; 200],
    });
    let segments: Vec<Vec<u8>> = data.map(|packet| packet.frame().to_vec()).collect();
    // Among segments that follow each other, and after itself.
    unbroken_fuzz::bytes("packet", &segments, |frame| {
        let mut gate = Gate::new(1 << 18, 1);
        let rows = segments.iter().map(Vec::as_slice).chain([frame, frame]);
        let mut count = 0;
        for row in rows.filter(|row| row.len() <= FRAME_BYTES_MAX) {
            assert!(gate.hold(OutputKind::Packet, 0, row));
            count += 1;
        }
        gate.pass(role.pass_permit().expect("unprotected"));
        let released = gate.released();
        let mut merged = 0;
        for run in merge(released.iter()) {
            match run {
                Run::Alone(_) => merged += 1,
                Run::Joined(joined) => {
                    let payloads: Vec<&[u8]> = joined.payloads().collect();
                    let whole = [joined.front(), payloads.concat()].concat();
                    assert!(matches!(Packet::parse(&whole), Packet::Tcp(_)));
                    merged += joined.frames().len();
                }
            }
        }
        assert_eq!(merged, count);
    });
}

#[test]
fn fuzz_flows() {
    let mut row = Vec::new();
    for (number, frame) in frames().into_iter().cycle().take(24).enumerate() {
        row.push(number as u8);
        row.extend((frame.len() as u16).to_le_bytes());
        row.extend(frame);
    }
    unbroken_fuzz::bytes("flows", &[row], |row| {
        let mut flows = [
            Flows::of_standby(FlowLimits::default()),
            Flows::of_primary(FlowLimits::default()),
        ];
        let (mut rest, mut position) = (row, 1);
        while let [what, low, high, after @ ..] = rest {
            let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
            let (frame, next) = after.split_at(length);
            rest = next;
            for flows in &mut flows {
                play(flows, *what, frame, position);
            }
            position += 1;
        }
        for flows in &mut flows {
            let kept: usize = flows
                .replay_after_takeover()
                .iter()
                .map(|(_, frame)| frame.len())
                .sum();
            assert!(kept <= row.len(), "{kept} bytes of {}", row.len());
            let _ = flows.retained();
            let _ = flows.known();
            let ends = [tuple("10.211.0.2:80")];
            flows.became_primary(&ends);
        }
    });
}

fn play(flows: &mut Flows, what: u8, frame: &[u8], position: u64) {
    let now_ns = position * 1_000_000;
    match what % 8 {
        0..4 => flows.input(position, frame, now_ns),
        4 | 5 => flows.output(frame, now_ns),
        6 => drop(flows.answer_for_closed(frame)),
        _ => {
            let named = NamedConnection {
                tuple: tuple("10.211.0.2:80"),
                client_sequence: 1001,
            };
            let mut accepted = Vec::new();
            flows.take_accepted(&mut accepted);
            let change = TableChange {
                gone: &[],
                stood: &[named],
                accepted: &accepted,
                input_position: position,
            };
            flows.commit(change, now_ns);
        }
    }
}
