mod handover;
mod late;

use super::*;
use crate::craft::{
    CraftedPacket, Direction, Resend, SegmentNumbers, ack, data_segments, fin, syn,
};
use crate::packet::{Packet, TcpFlags, Timestamps};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SECOND_NS: u64 = 1_000_000_000;

fn tuple(port: u16) -> Tuple {
    let remote = format!("10.0.0.2:{port}").parse().unwrap();
    Tuple::new("10.0.0.1:80".parse().unwrap(), remote)
}

fn numbers(sequence: u32, acknowledgement: u32) -> SegmentNumbers {
    let timestamps = Some(Timestamps {
        value: sequence,
        echo: acknowledgement,
    });
    SegmentNumbers {
        sequence,
        acknowledgement,
        window: 1000,
        timestamps,
    }
}

/// A client whose packets the tests feed, and whose input they number.
struct Feed {
    flows: Flows,
    position: u64,
    now_ns: u64,
}

impl Feed {
    fn new(flows: Flows) -> Self {
        Self {
            flows,
            position: 0,
            now_ns: 0,
        }
    }

    fn input(&mut self, packet: &CraftedPacket) -> u64 {
        let position = self.position;
        self.flows.input(position, packet.frame(), self.now_ns);
        self.position += 1;
        position
    }

    fn opens(&mut self, port: u16, sequence: u32) -> u64 {
        self.input(&syn(tuple(port), sequence));
        self.says(port, sequence + 1, 500)
    }

    fn says(&mut self, port: u16, sequence: u32, acknowledgement: u32) -> u64 {
        let numbers = numbers(sequence, acknowledgement);
        self.input(&ack(tuple(port), Direction::ToService, numbers))
    }

    fn closes(&mut self, port: u16, sequence: u32, acknowledgement: u32) -> u64 {
        let numbers = numbers(sequence, acknowledgement);
        self.input(&fin(tuple(port), Direction::ToService, numbers))
    }

    fn commit(&mut self, gone: &[u16], stood: &[u16], accepted: &[u16]) {
        // The newest connection of each port.
        let named = |port: &u16| {
            let flow = self.flows.flows.get(&tuple(*port));
            let newest = flow.map(|flow| flow.next.as_deref().unwrap_or(&flow.current));
            let end = newest.and_then(|connection| connection.client.sequence_end);
            NamedConnection {
                tuple: tuple(*port),
                client_sequence: end.unwrap_or(0),
            }
        };
        let gone: Vec<_> = gone.iter().copied().map(tuple).collect();
        let stood: Vec<_> = stood.iter().map(named).collect();
        let accepted: Vec<_> = accepted.iter().map(named).collect();
        self.commit_named(&gone, &stood, &accepted);
    }

    fn commit_named(
        &mut self,
        gone: &[Tuple],
        stood: &[NamedConnection],
        accepted: &[NamedConnection],
    ) {
        let change = TableChange {
            gone,
            stood,
            accepted,
            input_position: self.position,
        };
        self.flows.commit(change, self.now_ns);
    }

    fn retained(&self) -> Vec<u64> {
        let retained = self.flows.retained();
        retained.iter().map(|(position, _)| *position).collect()
    }

    fn replayed(&self) -> Vec<u64> {
        self.flows
            .replay_after_takeover()
            .iter()
            .map(|(position, _)| *position)
            .collect()
    }
}

fn named(port: u16, client_sequence: u32) -> NamedConnection {
    NamedConnection {
        tuple: tuple(port),
        client_sequence,
    }
}

fn standby() -> Feed {
    Feed::new(Flows::of_standby(FlowLimits::default()))
}

fn primary() -> Feed {
    Feed::new(Flows::of_primary(FlowLimits::default()))
}

/// Data from the service to the client at `port`.
fn answer(port: u16, acknowledgement: u32) -> CraftedPacket {
    let resend = Resend {
        tuple: tuple(port),
        numbers: numbers(500, acknowledgement),
        mss: 1460,
        data: b"answer",
    };
    data_segments(&resend).next().unwrap()
}

#[test]
fn a_waiting_connection_is_replayed_from_its_handshake_and_a_standing_one_from_the_mark() {
    let mut feed = standby();
    let waiting = feed.opens(1, 100);
    feed.opens(2, 200);
    feed.commit(&[], &[2], &[]);
    let data = feed.says(1, 101, 500);
    let more = feed.says(2, 201, 500);
    assert_eq!(feed.replayed(), [waiting, data, more]);
    feed.commit(&[], &[], &[]);
    assert_eq!(feed.replayed(), [waiting, data]);
    feed.commit(&[], &[1], &[]);
    assert!(feed.replayed().is_empty() && feed.flows.kept_bytes() == 0);
}

#[test]
fn a_connection_that_came_and_went_between_two_epochs_is_not_replayed() {
    let mut feed = standby();
    feed.opens(1, 100);
    feed.commit(&[], &[], &[1]);
    assert!(feed.replayed().is_empty());
    // Its client opens another one from the same port.
    let second = feed.opens(1, 900);
    feed.commit(&[], &[], &[]);
    assert_eq!(feed.replayed(), [second]);
}

#[test]
fn a_port_used_again_before_the_epoch_keeps_only_the_new_connection() {
    let mut feed = standby();
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    feed.closes(1, 101, 500);
    let second = feed.opens(1, 1 << 30);
    feed.commit(&[1], &[], &[]);
    assert_eq!(feed.replayed(), [second]);
    feed.commit(&[], &[1], &[]);
    assert!(feed.replayed().is_empty());
    assert_eq!(
        feed.flows.client(tuple(1)).unwrap().sequence_end,
        Some((1 << 30) + 1)
    );
}

#[test]
fn of_three_connections_from_one_port_in_one_epoch_only_the_last_waits() {
    let mut feed = standby();
    let named = |client_sequence| NamedConnection {
        tuple: tuple(1),
        client_sequence,
    };
    feed.opens(1, 100);
    feed.opens(1, 200);
    let last = feed.opens(1, 300);
    feed.commit_named(&[], &[], &[named(101), named(201)]);
    assert_eq!(feed.replayed(), [last]);
}

#[test]
fn a_handshake_whose_syn_came_before_the_log_is_kept_too() {
    let mut feed = standby();
    let first = feed.says(1, 101, 500);
    feed.commit(&[], &[], &[]);
    assert_eq!(feed.replayed(), [first]);
}

#[test]
fn packets_that_are_not_tcp_are_recent_input_only() {
    let mut feed = standby();
    feed.flows.input(0, &[1, 2, 3], 0);
    assert_eq!(feed.replayed(), [0]);
    feed.position = 1;
    feed.commit(&[], &[], &[]);
    assert!(feed.replayed().is_empty());
}

#[test]
fn the_client_view_takes_the_latest_and_ignores_what_was_made_up() {
    let mut feed = standby();
    feed.opens(1, u32::MAX - 5);
    feed.says(1, 3, 700);
    feed.says(1, 2, 600);
    feed.says(1, 1 << 28, 800);
    feed.says(1, 3, 1 << 28);
    let view = feed.flows.client(tuple(1)).unwrap();
    assert_eq!((view.sequence_end, view.acknowledged), (Some(3), Some(700)));
    assert_eq!(
        view.timestamps,
        Some(Timestamps {
            value: 3,
            echo: 700
        })
    );
    assert!(!view.finished && !view.reset);
    feed.closes(1, 3, 700);
    assert!(feed.flows.client(tuple(1)).unwrap().finished);
}

#[test]
fn the_service_s_answer_tells_the_primary_that_a_connection_is_accepted() {
    let mut feed = primary();
    let waiting = feed.opens(1, 100);
    feed.opens(2, 200);
    let bare = ack(tuple(1), Direction::ToClient, numbers(500, 101));
    feed.flows.output(bare.frame(), 0);
    feed.flows.output(answer(2, 201).frame(), 0);
    let mut accepted = Vec::new();
    feed.flows.take_accepted(&mut accepted);
    assert_eq!(
        accepted,
        [NamedConnection {
            tuple: tuple(2),
            client_sequence: 201
        }]
    );
    assert_eq!(feed.retained(), [waiting - 1, waiting], "SYN and ACK");
    feed.flows.output(answer(2, 201).frame(), 0);
    feed.flows.take_accepted(&mut accepted);
    assert_eq!(accepted.len(), 1);
}

#[test]
fn an_unprotected_primary_forgets_connections_that_are_over() {
    let mut feed = primary();
    feed.opens(1, 100);
    feed.flows.output(answer(1, 101).frame(), 0);
    feed.closes(1, 101, 506);
    feed.flows.output(
        fin(tuple(1), Direction::ToClient, numbers(506, 102)).frame(),
        0,
    );
    assert_eq!(feed.flows.len(), 1);
    feed.now_ns = 66 * SECOND_NS;
    feed.says(2, 1, 1);
    assert!(feed.flows.client(tuple(1)).is_none());
}

/// Seed 1768 of the simulation.
#[test]
fn a_late_segment_of_a_forgotten_connection_is_not_of_the_one_that_opens() {
    let mut feed = standby();
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    feed.commit(&[1], &[], &[]);
    feed.input(&syn(tuple(1), 1000));
    feed.closes(1, 101, 507);
    assert!(!feed.flows.is_waiting(tuple(1)));
    feed.flows.output(answer(1, 102).frame(), 0);
    let position = feed.says(1, 1001, 700);
    feed.commit(&[], &[], &[]);
    assert!(feed.flows.is_waiting(tuple(1)));
    assert_eq!(feed.replayed(), [position]);
}

#[test]
fn a_connection_that_has_sent_gigabytes_is_still_itself() {
    let mut feed = standby();
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    for step in 1..5_000_u32 {
        let sequence = 101_u32.wrapping_add(step << 20);
        feed.says(1, sequence, 500);
        let client_sequence = feed.flows.client(tuple(1)).unwrap().sequence_end;
        assert_eq!(client_sequence, Some(sequence));
        let acknowledged = sequence.wrapping_sub(1 << 19);
        feed.commit_named(&[], &[named(1, acknowledged)], &[]);
        assert!(feed.flows.flows[&tuple(1)].next.is_none());
    }
}

/// The client was reset, the service has not closed the old descriptor, and the new connection
/// stands beside it. Only the new one can have told anything since.
#[test]
fn of_two_connections_in_the_table_the_client_s_view_is_of_the_newer() {
    let mut feed = standby();
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    feed.opens(1, 1000);
    feed.commit(&[], &[1], &[]);
    feed.commit_named(&[], &[named(1, 101)], &[]);
    feed.says(1, 1001, 900);
    let acknowledged = |feed: &Feed| feed.flows.client(tuple(1)).unwrap().acknowledged;
    assert_eq!(acknowledged(&feed), Some(900));
    feed.commit_named(&[tuple(1)], &[], &[]);
    assert_eq!(acknowledged(&feed), Some(900));
    assert!(!feed.flows.is_waiting(tuple(1)));
}

#[test]
fn a_reset_without_acknowledgement_is_of_the_connection_whose_segment_it_answers() {
    let mut feed = primary();
    feed.opens(1, 100);
    assert_eq!(feed.retained().len(), 2);
    let mut reset = ack(tuple(1), Direction::ToClient, numbers(500, 0))
        .frame()
        .to_vec();
    reset[crate::packet::VNET_HEADER_BYTES + 20 + 13] = TcpFlags::RST.0;
    feed.flows.output(&reset, 0);
    assert!(feed.retained().is_empty());
    let mut accepted = Vec::new();
    feed.flows.take_accepted(&mut accepted);
    assert_eq!(accepted, [named(1, 101)]);
}

#[test]
fn too_much_to_keep_gives_up_the_longest_waiting_and_says_so() {
    let limits = FlowLimits {
        kept_bytes: 600,
        recent_bytes: 1000,
        ..FlowLimits::default()
    };
    let mut feed = Feed::new(Flows::of_standby(limits));
    for port in 1..=20 {
        feed.opens(port, 100);
    }
    assert!(feed.flows.kept_bytes() <= 600);
    let losses = feed.flows.losses();
    assert!(losses.waiting_connections > 0 && losses.recent_packets > 0);
    assert!(!feed.flows.is_waiting(tuple(1)) && feed.flows.is_waiting(tuple(20)));
    feed.commit(&[], &[1], &[]);
}

#[test]
fn half_open_connections_fade() {
    let mut feed = standby();
    feed.input(&syn(tuple(1), 5));
    feed.now_ns = 66 * SECOND_NS;
    feed.input(&syn(tuple(2), 5));
    assert_eq!(feed.flows.len(), 1);
    feed.says(2, 6, 1);
    feed.now_ns = 200 * SECOND_NS;
    feed.input(&syn(tuple(3), 5));
    assert!(feed.flows.is_waiting(tuple(2)));
}

/// What the model knows of one client port: the true state of the service's side.
#[derive(Default)]
struct Truth {
    /// Positions of the packets of the connection that waits in the listener's queue.
    waiting: Vec<u64>,
    accepted: bool,
    sequence: u32,
}

proptest! {
    /// Clients open, talk, are accepted and closed and come back from the same port, in any order
    /// between epochs. A takeover after any epoch replays each waiting connection from its
    /// handshake, everything after the mark, and nothing else.
    #[test]
    fn a_takeover_replays_what_the_committed_state_lacks(
        steps in proptest::collection::vec((0..7u8, 0..4u16), 0..150),
        // How far a client's clock moves its first number from one connection to the next.
        stride in prop_oneof![Just(1000u32), Just(1 << 26)],
    ) {
        let (mut standby, mut primary) = (standby(), primary());
        let mut truth: BTreeMap<u16, Truth> = BTreeMap::new();
        let mut committed: Vec<Tuple> = Vec::new();
        let mut expected_waiting: Vec<u64> = Vec::new();
        let mut mark = 0;
        for (step, port) in steps {
            let port_truth = truth.entry(port).or_default();
            let open = !port_truth.waiting.is_empty() || port_truth.accepted;
            match step {
                0 if !open => {
                    port_truth.sequence = port_truth.sequence.wrapping_add(stride);
                    let at = standby.opens(port, port_truth.sequence);
                    primary.opens(port, port_truth.sequence);
                    port_truth.waiting.push(at);
                }
                1 | 2 if open => {
                    let at = standby.says(port, port_truth.sequence + 1, 500);
                    primary.says(port, port_truth.sequence + 1, 500);
                    if !port_truth.accepted {
                        port_truth.waiting.push(at);
                    }
                }
                3 | 4 if open && !port_truth.accepted => {
                    port_truth.accepted = true;
                    port_truth.waiting.clear();
                }
                5 if port_truth.accepted => {
                    // The service says something, if only FIN, and closes.
                    primary.flows.output(answer(port, port_truth.sequence + 1).frame(), 0);
                    port_truth.accepted = false;
                }
                6 => {
                    let named = |(port, t): (&u16, &Truth)| NamedConnection {
                        tuple: tuple(*port),
                        client_sequence: t.sequence + 1,
                    };
                    let standing: Vec<_> =
                        truth.iter().filter(|(_, t)| t.accepted).map(named).collect();
                    let mut accepted = Vec::new();
                    primary.flows.take_accepted(&mut accepted);
                    // A table names connections by object, so one that was replaced by another
                    // of the same ends is both gone and new.
                    standby.commit_named(&committed, &standing, &accepted);
                    primary.commit_named(&committed, &standing, &accepted);
                    let standing = standing.iter().map(|named| named.tuple).collect();
                    committed = standing;
                    mark = standby.position;
                    expected_waiting =
                        truth.values().flat_map(|t| t.waiting.iter().copied()).collect();
                    expected_waiting.sort_unstable();
                }
                _ => {}
            }
        }
        let mut expected = expected_waiting;
        expected.extend(mark..standby.position);
        prop_assert_eq!(standby.replayed(), expected);
    }
}
