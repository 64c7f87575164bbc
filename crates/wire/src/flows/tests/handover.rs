use super::*;

#[test]
fn a_survey_closes_whatever_it_does_not_list() {
    let mut feed = primary();
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    feed.opens(2, 200);
    let waiting = feed.opens(3, 300);
    let standing = NamedConnection {
        tuple: tuple(2),
        client_sequence: 201,
    };
    feed.flows.commit_survey(&[standing], &[], feed.position, 0);
    assert!(!feed.flows.is_waiting(tuple(2)) && feed.flows.is_waiting(tuple(3)));
    assert_eq!(feed.retained(), [waiting - 1, waiting], "SYN and ACK");
    feed.flows.became_primary(&[]);
    let late = fin(tuple(1), Direction::ToService, numbers(101, 500));
    assert!(matches!(
        feed.flows.answer_for_closed(late.frame()),
        LatePacket::Answer(_)
    ));
}

/// Seed 109 of the simulation.
#[test]
fn a_new_standby_that_hears_the_next_connection_first_keeps_it_apart_from_the_standing_one() {
    let mut feed = standby();
    // The mark is here; the standby hears what follows before it has the epoch.
    feed.input(&syn(tuple(1), 1000));
    feed.flows.commit_survey(&[named(1, 102)], &[], 0, 0);
    feed.commit_named(&[tuple(1)], &[], &[]);
    let position = feed.says(1, 1001, 500);
    feed.commit(&[], &[], &[]);
    assert!(feed.flows.is_waiting(tuple(1)));
    assert_eq!(feed.replayed(), [position]);
}

#[test]
fn a_new_standby_knows_a_connection_that_was_half_open_at_the_mark() {
    let mut primary = primary();
    primary.opens(1, 100);
    primary.commit(&[], &[1], &[]);
    primary.input(&syn(tuple(1), 1000));
    let mut feed = standby();
    for (position, frame) in primary.flows.retained() {
        feed.flows.input(position, frame, 0);
    }
    feed.position = primary.position;
    let position = feed.says(1, 1001, 500);
    feed.flows.commit_survey(&[named(1, 102)], &[], position, 0);
    feed.commit_named(&[tuple(1)], &[], &[]);
    assert!(feed.flows.is_waiting(tuple(1)));
    assert_eq!(feed.replayed(), [position]);
}
