use super::*;
use crate::craft::{self, Direction as Towards, SegmentNumbers};
use crate::flows::{FlowLimits, NamedConnection};
use std::convert::Infallible;
use unbroken_core::epoch::EpochNumbers;
use unbroken_core::give_up::{GiveUp, GiveUpLimits};
use unbroken_core::role::{Event, Role};

/// A log with room for some frames.
#[derive(Debug)]
struct Log {
    positions: Vec<u64>,
    most: usize,
}

impl InputLog for Log {
    fn has_room(&self, _: usize) -> bool {
        self.positions.len() < self.most
    }

    fn append(&mut self, position: u64, _: &[u8]) -> bool {
        let fits = self.has_room(0);
        if fits {
            self.positions.push(position);
        }
        fits
    }
}

fn log(most: usize) -> Option<Log> {
    let positions = Vec::new();
    Some(Log { positions, most })
}

fn exchange() -> Exchange<Log> {
    let input = Input {
        flows: Flows::of_primary(FlowLimits::default()),
        position: 1,
    };
    Exchange::new(input, Arc::default(), 1 << 16, 1)
}

fn protected() -> Role {
    let mut role = Role::primary(GiveUp::new(GiveUpLimits::default()));
    let to_protected = [Event::Launched, Event::FillBegun, Event::FillMarked];
    for event in to_protected.into_iter().chain([Event::StandbyReady]) {
        role.apply(event, 0);
    }
    role
}

fn tuple() -> Tuple {
    let (local, remote) = ("10.0.0.1:80", "10.0.0.2:1000");
    Tuple::new(local.parse().unwrap(), remote.parse().unwrap())
}

fn numbers(sequence: u32, acknowledgement: u32) -> SegmentNumbers {
    SegmentNumbers {
        sequence,
        acknowledgement,
        window: 100,
        timestamps: None,
    }
}

/// A client acknowledges.
fn frame_to_service(sequence: u32) -> Vec<u8> {
    let acknowledges = craft::ack(tuple(), Towards::ToService, numbers(sequence, 7));
    acknowledges.frame().to_vec()
}

fn say(exchange: &mut Exchange<Log>, text: &[u8]) {
    let read = |room: &mut [u8]| -> Result<_, Infallible> {
        room[..text.len()].copy_from_slice(text);
        Ok(Some(text.len()))
    };
    let held = exchange.text(OutputKind::StandardOutput, 0, 100, read);
    assert_eq!(held, Ok(true));
}

fn heard(exchange: &mut Exchange<Log>) -> Vec<u8> {
    let mut all = Vec::new();
    let mut released = exchange.released();
    while let Some(frame) = released.peek() {
        all.extend(frame.bytes());
        released.pop(0);
    }
    all
}

fn give(exchange: &mut Exchange<Log>, frame: &[u8]) -> (Arrival, usize) {
    let mut given = 0;
    let count = |_: &[u8]| -> Result<(), Infallible> {
        given += 1;
        Ok(())
    };
    let Ok(arrival) = exchange.input(frame, 0, count);
    (arrival, given)
}

#[test]
fn each_of_several_epochs_under_way_lets_its_own_output_go() {
    let (role, mut epochs, mut exchange) = (protected(), EpochNumbers::of_term(1), exchange());
    let mut activity = Activity::default();
    say(&mut exchange, b"a");
    exchange.mark_fill(log(9), 1, &mut activity);
    let mut publications = vec![epochs.published()];
    for text in [b"b", b"c", b"d"] {
        say(&mut exchange, text);
        exchange.mark(&mut activity);
        publications.push(epochs.published());
    }
    for publication in &publications {
        exchange.published(publication.epoch(), ConnectionChange::default());
    }
    exchange.release(role.release_permit().unwrap()).unwrap();
    assert_eq!(heard(&mut exchange), b"");
    let mut commits = publications.into_iter();
    for (skipped, text) in [(0, &b"a"[..]), (1, b"bc"), (0, b"d")] {
        let publication = commits.nth(skipped).unwrap();
        exchange.commit(publication.into_committed(), 0);
        assert_eq!(heard(&mut exchange), b"", "it has no leave yet");
        exchange.release(role.release_permit().unwrap()).unwrap();
        assert_eq!(heard(&mut exchange), text);
    }
}

#[test]
fn an_epoch_that_was_not_made_leaves_all_to_the_next() {
    let (role, mut epochs, mut exchange) = (protected(), EpochNumbers::of_term(1), exchange());
    let mut activity = Activity::default();
    exchange.mark_fill(log(9), 1, &mut activity);
    let first = epochs.published();
    exchange.commit(first.into_committed(), 0);
    exchange.release(role.release_permit().unwrap()).unwrap();
    // A connection that the service closes has been accepted.
    assert_eq!(
        give(&mut exchange, &frame_to_service(50)),
        (Arrival::Given, 1)
    );
    say(&mut exchange, b"a");
    let answer = craft::fin(tuple(), Towards::ToClient, numbers(7, 50));
    let answer = answer.frame().to_vec();
    let read = |room: &mut [u8]| -> Result<_, Infallible> {
        room[..answer.len()].copy_from_slice(&answer);
        Ok(Some(answer.len()))
    };
    assert_eq!(exchange.output(0, answer.len(), read), Ok(true));
    let lost = exchange.mark(&mut activity);
    exchange.unmark();
    say(&mut exchange, b"b");
    let kept = exchange.mark(&mut activity);
    assert_eq!(lost.connections.accepted.len(), 1);
    assert_eq!(kept.connections, lost.connections);
    exchange.commit(epochs.published().into_committed(), 0);
    exchange.release(role.release_permit().unwrap()).unwrap();
    assert_eq!(heard(&mut exchange), [b"a", &answer[..], b"b"].concat());
}

#[test]
fn input_is_logged_from_the_mark_of_a_fill_on_or_does_not_arrive() {
    let mut exchange = exchange();
    let mut activity = Activity::default();
    let input = frame_to_service;
    assert_eq!(give(&mut exchange, &input(50)), (Arrival::Given, 1));
    // What the connection said before, which waits to be accepted, is logged, too.
    let mark = exchange.mark_fill(log(3), 1, &mut activity);
    assert_eq!((mark.input_position, mark.is_logged), (2, true));
    assert_eq!(give(&mut exchange, &input(51)), (Arrival::Given, 1));
    assert_eq!(give(&mut exchange, &input(52)), (Arrival::Given, 1));
    assert!(!exchange.takes_input(100));
    assert_eq!(give(&mut exchange, &input(53)), (Arrival::Unlogged, 0));
    assert_eq!(exchange.log.as_ref().unwrap().positions, [1, 2, 3]);
    exchange.end_log();
    assert_eq!(give(&mut exchange, &input(53)), (Arrival::Given, 1));
    let mark = exchange.mark_fill(None, 1, &mut activity);
    assert_eq!((mark.input_position, mark.is_logged), (5, false));
}

#[test]
fn a_mark_says_where_packets_went_since_the_last_one() {
    let (mut exchange, mut activity) = (exchange(), Activity::default());
    give(&mut exchange, &frame_to_service(50));
    exchange.was_read(true);
    exchange.mark(&mut activity);
    assert!(activity.connections.contains(&tuple()) && !activity.anywhere);
    exchange.was_read(false);
    exchange.mark(&mut activity);
    assert!(activity.connections.is_empty() && activity.anywhere);
    exchange.was_read(true);
    exchange.mark(&mut activity);
    assert!(activity.anywhere, "what was left unread may have been lost");
    exchange.mark(&mut activity);
    assert!(!activity.anywhere);
}

#[test]
fn an_epoch_tells_of_connections_when_it_is_committed() {
    let (mut epochs, mut exchange) = (EpochNumbers::of_term(1), exchange());
    let mut activity = Activity::default();
    let stood = vec![NamedConnection {
        tuple: tuple(),
        client_sequence: 50,
    }];
    exchange.mark_fill(log(9), 1, &mut activity);
    let publication = epochs.published();
    let gone = Vec::new();
    exchange.published(publication.epoch(), ConnectionChange { stood, gone });
    assert!(exchange.flows.known().is_empty());
    exchange.commit(publication.into_committed(), 0);
    assert_eq!(exchange.flows.known()[0].tuple, tuple());
}
