use super::*;

#[test]
fn a_late_fin_on_an_inherited_connection_is_acknowledged_and_nothing_else() {
    let mut feed = standby();
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    feed.closes(1, 101, 507);
    feed.commit(&[1], &[], &[]);
    let late = fin(tuple(1), Direction::ToService, numbers(101, 507));
    assert_eq!(
        feed.flows.answer_for_closed(late.frame()),
        LatePacket::ForTheKernel
    );
    feed.flows.became_primary(&[]);
    let LatePacket::Answer(answer) = feed.flows.answer_for_closed(late.frame()) else {
        panic!()
    };
    let Packet::Tcp(segment) = Packet::parse(answer.frame()) else {
        panic!()
    };
    assert_eq!((segment.sequence, segment.acknowledgement), (507, 102));
    assert_eq!(
        segment.options.timestamps,
        Some(Timestamps {
            value: 507,
            echo: 101
        })
    );
    assert_eq!(segment.flags, TcpFlags::ACK);

    let bare = ack(tuple(1), Direction::ToService, numbers(102, 507));
    assert_eq!(
        feed.flows.answer_for_closed(bare.frame()),
        LatePacket::Swallow
    );
    let beyond = ack(tuple(1), Direction::ToService, numbers(110, 507));
    assert_eq!(
        feed.flows.answer_for_closed(beyond.frame()),
        LatePacket::ForTheKernel
    );
    feed.now_ns = 66 * SECOND_NS;
    feed.says(2, 1, 1);
    assert_eq!(
        feed.flows.answer_for_closed(late.frame()),
        LatePacket::ForTheKernel
    );
}

/// Seed 111 of the simulation.
#[test]
fn a_late_fin_is_acknowledged_where_the_client_was_never_heard_before() {
    let mut feed = standby();
    let client_sequence = 102;
    let standing = named(1, client_sequence);
    feed.flows.commit_survey(&[standing], &[], 0, 0);
    feed.commit_named(&[tuple(1)], &[], &[]);
    feed.flows.became_primary(&[]);
    let late = fin(tuple(1), Direction::ToService, numbers(101, 507));
    let LatePacket::Answer(answer) = feed.flows.answer_for_closed(late.frame()) else {
        panic!()
    };
    let Packet::Tcp(segment) = Packet::parse(answer.frame()) else {
        panic!()
    };
    assert_eq!((segment.sequence, segment.acknowledgement), (507, 102));
}

#[test]
fn a_restored_orphan_answers_for_itself() {
    let mut feed = standby();
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    feed.commit(&[1], &[], &[]);
    feed.flows.became_primary(&[tuple(1)]);
    let late = fin(tuple(1), Direction::ToService, numbers(101, 500));
    assert_eq!(
        feed.flows.answer_for_closed(late.frame()),
        LatePacket::ForTheKernel
    );
}

/// A client that comes back is met by what the kernel has left of its last connection, until that is
/// reset; nothing else is.
#[test]
fn only_a_newer_opening_makes_way_for_itself() {
    let mut feed = standby();
    let reset = |feed: &Feed, sequence| {
        let opening = syn(tuple(1), sequence);
        feed.flows.before_opening(opening.frame())
    };
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    assert_eq!(reset(&feed, 5000), None, "it still stands");
    feed.commit(&[1], &[], &[]);
    assert_eq!(reset(&feed, 5000), None, "its client has not finished");
    feed.closes(1, 101, 507);
    assert_eq!(reset(&feed, 102), None, "an old one that comes late");
    let late = fin(tuple(1), Direction::ToService, numbers(101, 507));
    assert_eq!(feed.flows.before_opening(late.frame()), None);
    let packet = reset(&feed, 5000).unwrap();
    let Packet::Tcp(segment) = Packet::parse(packet.frame()) else {
        panic!()
    };
    assert!(segment.is_reset());
    assert_eq!((segment.sequence, segment.source), (102, tuple(1).remote()));
    feed.opens(1, 5000);
    assert_eq!(reset(&feed, 5000), None, "its own SYN again");
}
