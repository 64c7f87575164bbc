use super::*;
use crate::give_up::GiveUpLimits;
use proptest::prelude::*;

const SECOND_NS: u64 = 1_000_000_000;

fn primary() -> Role {
    Role::primary(GiveUp::new(GiveUpLimits::default()))
}

fn standby() -> Role {
    Role::standby(1, GiveUp::new(GiveUpLimits::default()))
}

fn after(mut role: Role, events: &[Event]) -> Role {
    for event in events {
        role.apply(*event, 0);
    }
    role
}

const TO_PROTECTED: [Event; 4] = [
    Event::Launched,
    Event::FillBegun,
    Event::FillMarked,
    Event::StandbyReady,
];

#[test]
fn output_passes_until_the_fill_is_marked_and_then_waits_for_commits() {
    let mut role = primary();
    assert!(role.pass_permit().is_none());
    let permits: Vec<(bool, bool)> = TO_PROTECTED
        .iter()
        .map(|event| {
            role.apply(*event, 0);
            (
                role.pass_permit().is_some(),
                role.release_permit().is_some(),
            )
        })
        .collect();
    assert_eq!(
        permits,
        [(true, false), (true, false), (false, false), (false, true)]
    );
}

#[test]
fn a_dead_standby_is_replaced_and_output_passes() {
    let mut role = after(primary(), &TO_PROTECTED);
    assert_eq!(role.apply(Event::StandbyDied, 0), [Action::AskLeave]);
    assert!(role.pass_permit().is_none() && role.release_permit().is_none());
    let actions = role.apply(Event::LeaveGranted, 0);
    assert_eq!(actions, [Action::StartStandby, Action::PassOutput]);
    assert_eq!(role.state(), RoleState::Unprotected(Reason::StandbyDied));
}

/// It may have spoken already, or be about to.
#[test]
fn a_standby_that_may_be_complete_is_not_left_behind_without_leave() {
    for events in [&TO_PROTECTED[..3], &TO_PROTECTED] {
        for event in [Event::StandbyDied, Event::Forked, Event::Unfit] {
            let mut role = after(primary(), events);
            assert_eq!(role.apply(event, 0), [Action::AskLeave]);
        }
    }
    let mut role = after(primary(), &TO_PROTECTED[..2]);
    let actions = role.apply(Event::StandbyDied, 0);
    assert_eq!(actions, [Action::StartStandby, Action::PassOutput]);
}

#[test]
fn what_hinders_protection_meanwhile_is_the_reason_when_leave_comes() {
    let mut role = after(primary(), &TO_PROTECTED);
    for event in [Event::StandbyDied, Event::Forked, Event::Unfit] {
        role.apply(event, 0);
    }
    role.apply(Event::LeaveGranted, 0);
    assert_eq!(role.state(), RoleState::Unprotected(Reason::Forked));
}

#[test]
fn whoever_is_refused_leave_says_nothing_more() {
    let refused = Event::LeaveRefused { term: 5 };
    for (role, cause) in [
        (after(primary(), &TO_PROTECTED), Event::StandbyDied),
        (
            after(standby(), &[Event::StandbyReady]),
            Event::PrimaryDied {
                service_alive: true,
            },
        ),
    ] {
        let mut role = after(role, &[cause]);
        assert_eq!(role.apply(refused, 0), [Action::Retire]);
        assert_eq!((role.state(), role.term()), (RoleState::Retired, 5));
        assert_eq!(role.apply(Event::LeaveGranted, 0), []);
        assert!(role.pass_permit().is_none() && role.release_permit().is_none());
    }
}

#[test]
fn a_fork_stops_protection_until_the_tree_can_be_replicated_again() {
    let mut role = after(primary(), &TO_PROTECTED);
    role.apply(Event::Forked, 0);
    assert_eq!(
        role.apply(Event::LeaveGranted, 0),
        [Action::StartStandby, Action::PassOutput]
    );
    // One is there even now, but only to hold on to the service should this node die.
    assert_eq!(role.apply(Event::StandbyDied, 0), [Action::StartStandby]);
    assert_eq!(role.apply(Event::FillBegun, 0), []);
    assert_eq!(role.state(), RoleState::Unprotected(Reason::Forked));
    assert!(
        role.apply(Event::SingleAgain, 0)
            .contains(&Action::StartStandby)
    );
}

#[test]
fn a_protected_death_retires_the_primary_and_the_warm_standby_goes_live_in_the_next_term() {
    let mut old = after(primary(), &TO_PROTECTED);
    let actions = old.apply(Event::ServiceDied(Fault::Own), 0);
    assert_eq!(actions, [Action::HandOver]);

    let mut new = after(standby(), &[Event::StandbyReady]);
    assert_eq!(
        new.apply(Event::TakeoverOrdered(Some(Fault::Own)), 0),
        [Action::AskLeave]
    );
    assert_eq!((new.state(), new.term()), (RoleState::AskingToTakeOver, 1));
    assert_eq!(new.apply(Event::LeaveGranted, 0), []);
    assert_eq!((new.state(), new.term()), (RoleState::TakingOver, 2));
    assert!(new.pass_permit().is_none());
    let actions = new.apply(Event::TakeoverDone, 0);
    assert_eq!(actions, [Action::StartStandby, Action::PassOutput]);
    assert_eq!((new.term(), new.give_up().early_deaths()), (2, 1));
}

#[test]
fn a_standby_without_a_whole_state_adopts_what_lives_and_fails_otherwise() {
    let mut role = standby();
    let actions = role.apply(
        Event::PrimaryDied {
            service_alive: true,
        },
        0,
    );
    assert_eq!(actions, [Action::StartStandby, Action::PassOutput]);
    assert_eq!(role.state(), RoleState::Unprotected(Reason::Adopted));
    assert_eq!(role.term(), 2);
    let mut role = standby();
    role.apply(
        Event::PrimaryDied {
            service_alive: false,
        },
        0,
    );
    assert_eq!(role.state(), RoleState::Failed(Failure::DiedUnprotected));
}

#[test]
fn the_third_crash_in_a_row_is_the_last() {
    let give_up = GiveUp::continued(GiveUpLimits::default(), 2, 100 * SECOND_NS);
    let mut role = Role::standby(3, give_up);
    role.apply(Event::StandbyReady, 0);
    role.apply(Event::TakeoverOrdered(Some(Fault::Own)), 101 * SECOND_NS);
    assert_eq!(role.state(), RoleState::Failed(Failure::GaveUp));
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Launched),
        Just(Event::FillBegun),
        Just(Event::FillMarked),
        Just(Event::StandbyReady),
        Just(Event::StandbyDied),
        Just(Event::ServiceDied(Fault::External)),
        Just(Event::ServiceDied(Fault::Own)),
        Just(Event::ServiceEnded),
        any::<bool>().prop_map(|service_alive| Event::PrimaryDied { service_alive }),
        Just(Event::TakeoverOrdered(None)),
        Just(Event::TakeoverDone),
        Just(Event::Forked),
        Just(Event::SingleAgain),
        Just(Event::Unfit),
        Just(Event::LeaveGranted),
        (0u64..6).prop_map(|term| Event::LeaveRefused { term }),
    ]
}

proptest! {
    #[test]
    fn terms_never_fall_and_permits_follow_the_state(
        starts_as_primary: bool,
        events in proptest::collection::vec(any_event(), 0..60),
    ) {
        let mut role = if starts_as_primary { primary() } else { standby() };
        for event in events {
            let (state, term) = (role.state(), role.term());
            let actions = role.apply(event, 0);
            prop_assert!(role.term() >= term);
            let passes = role.pass_permit().is_some();
            let releases = role.release_permit().is_some();
            prop_assert!(!(passes && releases));
            prop_assert_eq!(releases, role.state() == RoleState::Protected);
            // Whoever may newly pass while it goes on is told so.
            let over = |state| matches!(state, RoleState::Ended | RoleState::Failed(_));
            let passed = over(state) || matches!(state, RoleState::Unprotected(_) | RoleState::Syncing);
            if passes && !passed && !over(role.state()) {
                prop_assert!(actions.contains(&Action::PassOutput));
            }
            // A node that is done stays done.
            if matches!(state, RoleState::Ended | RoleState::Failed(_) | RoleState::Retired) {
                prop_assert_eq!(role.state(), state);
                prop_assert!(actions.is_empty());
            }
            // Output that waited for a standby passes only with leave, or when the service is over.
            let shared = |state| {
                matches!(
                    state,
                    RoleState::Sealing | RoleState::Protected | RoleState::AskingToGoAlone(_)
                )
            };
            if shared(state) && passes {
                prop_assert!(event == Event::LeaveGranted || actions.contains(&Action::StopStandby));
            }
            if state == RoleState::Warm && !over(role.state()) {
                prop_assert!(matches!(
                    role.state(),
                    RoleState::Warm | RoleState::AskingToTakeOver
                ));
            }
        }
    }
}
