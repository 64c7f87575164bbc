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

/// A client that comes back is met by the TIME_WAIT of its last connection, until that is reset;
/// nothing else is.
#[test]
fn only_a_newer_opening_ends_a_time_wait() {
    let mut feed = standby();
    let meets = |feed: &Feed, sequence| {
        let opening = syn(tuple(1), sequence);
        feed.flows.answer_for_closed(opening.frame())
    };
    feed.opens(1, 100);
    feed.commit(&[], &[1], &[]);
    let kernels = LatePacket::ForTheKernel;
    assert_eq!(meets(&feed, 5000), kernels, "it still stands");
    let service_fin = fin(tuple(1), Direction::ToClient, numbers(506, 101));
    feed.flows.output(service_fin.frame(), 0);
    feed.commit(&[1], &[], &[]);
    assert_eq!(meets(&feed, 5000), kernels, "its client has not finished");
    feed.closes(1, 101, 506);
    assert_eq!(
        meets(&feed, 5000),
        kernels,
        "the service's FIN is on its way"
    );
    feed.says(1, 102, 507);
    assert_eq!(meets(&feed, 102), kernels, "an old one that comes late");
    let LatePacket::Reopens(packet) = meets(&feed, 5000) else {
        panic!()
    };
    let Packet::Tcp(segment) = Packet::parse(packet.frame()) else {
        panic!()
    };
    assert!(segment.is_reset());
    assert_eq!((segment.sequence, segment.source), (102, tuple(1).remote()));
    feed.opens(1, 5000);
    assert_eq!(meets(&feed, 5000), kernels, "its own SYN again");
}
