use super::*;
use proptest::prelude::*;
use unbroken_core::epoch::EpochNumbers;
use unbroken_core::give_up::{GiveUp, GiveUpLimits};
use unbroken_core::role::{Event, Role};

/// A role in the protected state, or in the unprotected one.
fn role(protected: bool) -> Role {
    let mut role = Role::primary(GiveUp::new(GiveUpLimits::default()));
    role.apply(Event::Launched, 0);
    if protected {
        for event in [Event::FillBegun, Event::FillMarked, Event::StandbyReady] {
            role.apply(event, 0);
        }
    }
    role
}

fn commit(numbers: &mut EpochNumbers) -> Committed {
    numbers.published().into_committed()
}

fn drain(gate: &mut Gate) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let mut released = gate.released();
    while let Some(frame) = released.peek() {
        out.push(frame.bytes().to_vec());
        released.pop(0);
    }
    out
}

fn hold(gate: &mut Gate, bytes: &[u8]) {
    assert!(gate.hold(OutputKind::Packet, 0, bytes));
}

#[test]
fn output_leaves_with_the_commit_of_its_epoch_and_not_before() {
    let (role, mut numbers, mut gate) =
        (role(true), EpochNumbers::of_term(1), Gate::new(1 << 16, 1));
    hold(&mut gate, b"a");
    assert!(gate.open_epoch_has_output());
    gate.close_epoch();
    assert!(!gate.open_epoch_has_output());
    hold(&mut gate, b"b");
    assert!(drain(&mut gate).is_empty());
    gate.release(commit(&mut numbers), role.release_permit().unwrap())
        .unwrap();
    assert_eq!(drain(&mut gate), [b"a"]);
    gate.close_epoch();
    gate.release(commit(&mut numbers), role.release_permit().unwrap())
        .unwrap();
    assert_eq!(drain(&mut gate), [b"b"]);
}

#[test]
fn a_commit_releases_the_epochs_before_it_too() {
    let (role, mut numbers, mut gate) =
        (role(true), EpochNumbers::of_term(1), Gate::new(1 << 16, 1));
    hold(&mut gate, b"a");
    gate.close_epoch();
    hold(&mut gate, b"b");
    gate.close_epoch();
    hold(&mut gate, b"c");
    drop(commit(&mut numbers));
    gate.release(commit(&mut numbers), role.release_permit().unwrap())
        .unwrap();
    assert_eq!(drain(&mut gate), [b"a", b"b"]);
}

#[test]
fn the_output_of_an_abandoned_epoch_belongs_to_the_next() {
    let (role, mut numbers, mut gate) =
        (role(true), EpochNumbers::of_term(1), Gate::new(1 << 16, 1));
    hold(&mut gate, b"a");
    let closed = gate.close_epoch();
    hold(&mut gate, b"b");
    assert_eq!(gate.reopen_epoch(), closed);
    assert_eq!(gate.close_epoch(), closed);
    gate.release(commit(&mut numbers), role.release_permit().unwrap())
        .unwrap();
    assert_eq!(drain(&mut gate), [b"a", b"b"]);
}

#[test]
fn commits_of_another_term_or_of_no_closed_epoch_are_refused() {
    let (role, mut gate) = (role(true), Gate::new(1 << 16, 1));
    hold(&mut gate, b"a");
    let refused = gate.release(
        commit(&mut EpochNumbers::of_term(1)),
        role.release_permit().unwrap(),
    );
    assert!(matches!(
        refused,
        Err(ReleaseError::NeverClosed { sequence: 1, .. })
    ));
    gate.close_epoch();
    let refused = gate.release(
        commit(&mut EpochNumbers::of_term(2)),
        role.release_permit().unwrap(),
    );
    assert!(matches!(
        refused,
        Err(ReleaseError::OtherTerm { term: 2, .. })
    ));
    assert!(drain(&mut gate).is_empty());
}

#[test]
fn an_unprotected_service_passes_everything_and_a_new_standby_starts_afresh() {
    let (alone, mut gate) = (role(false), Gate::new(1 << 16, 1));
    hold(&mut gate, b"a");
    gate.close_epoch();
    hold(&mut gate, b"b");
    gate.pass(alone.pass_permit().unwrap());
    assert_eq!(drain(&mut gate), [b"a", b"b"]);
    gate.restart(1);
    hold(&mut gate, b"c");
    assert_eq!(gate.close_epoch().sequence, 1);
    let protected = role(true);
    gate.release(
        commit(&mut EpochNumbers::of_term(1)),
        protected.release_permit().unwrap(),
    )
    .unwrap();
    assert_eq!(drain(&mut gate), [b"c"]);
}

#[test]
fn what_leaves_says_what_it_is_and_how_long_it_was_held() {
    let (alone, mut gate) = (role(false), Gate::new(1 << 16, 1));
    assert!(gate.hold(OutputKind::StandardError, 5, b"hello"));
    gate.pass(alone.pass_permit().unwrap());
    hold(&mut gate, b"held");
    let mut released = gate.released();
    let frame = released.peek().unwrap();
    assert_eq!(
        (frame.kind(), frame.bytes()),
        (OutputKind::StandardError, &b"hello"[..])
    );
    assert_eq!(released.pop(15), Some(10));
    assert!(released.peek().is_none() && released.pop(15).is_none());
}

#[test]
fn a_full_gate_takes_nothing_more() {
    let mut gate = Gate::new(100, 1);
    assert!(gate.has_room(80) && !gate.has_room(90));
    assert!(gate.hold(OutputKind::Packet, 0, &[0; 60]));
    assert!(!gate.hold(OutputKind::Packet, 0, &[0; 60]));
}

proptest! {
    /// Whatever the order of events, a frame goes out exactly once, in order, and never before
    /// the commit of an epoch that was closed after it was held.
    #[test]
    fn nothing_leaves_before_its_epoch_is_committed(
        steps in proptest::collection::vec(0..5u8, 0..200),
    ) {
        let (role, mut numbers, mut gate) =
        (role(true), EpochNumbers::of_term(1), Gate::new(1 << 16, 1));
        let (mut held, mut closed_ends, mut committed, mut gone) = (0u32, Vec::new(), 0, 0u32);
        for step in steps {
            match step {
                0 | 1 => {
                    hold(&mut gate, &held.to_le_bytes());
                    held += 1;
                }
                2 => {
                    gate.close_epoch();
                    closed_ends.push(held);
                }
                3 if committed < closed_ends.len() => {
                    committed += 1;
                    let permit = role.release_permit().unwrap();
                    gate.release(commit(&mut numbers), permit).unwrap();
                }
                _ => {
                    for bytes in drain(&mut gate) {
                        prop_assert_eq!(bytes, gone.to_le_bytes());
                        gone += 1;
                    }
                    let may_go = committed.checked_sub(1).map_or(0, |last| closed_ends[last]);
                    prop_assert_eq!(gone, may_go);
                }
            }
        }
    }
}
