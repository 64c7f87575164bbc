use super::*;
use crate::directory::ServiceName;
use crate::steps::EpochStep;
use crate::test_root::TestRoot;

const SECOND_NS: u64 = 1_000_000_000;

fn directory(root: &TestRoot) -> RunDirectory {
    let name = ServiceName::new("x-1").expect("name");
    let directory = RunDirectory::within(root.path(), name);
    fs::create_dir(directory.path()).expect("directory");
    directory
}

fn create(directory: &RunDirectory) -> Board {
    let identity = Identity {
        command: "/bin/server --flag",
        address: "10.211.0.2",
        published: "",
    };
    Board::create(directory, &identity).expect("board")
}

#[test]
fn another_mapping_reads_what_was_written() {
    let root = TestRoot::new();
    let directory = directory(&root);
    let board = create(&directory);
    board.set_state(State::Unprotected, "the standby died");
    board.set_term(3);
    board.set_primary_pid(11);
    board.set_service_pids(&[21, 22]);
    board.record_takeover(900, "killed by signal 9");
    board.record_pause(50_000);
    board.record_hold(70_000);
    board.record_step(EpochStep::Copy, 9_000);
    board.record_epoch(8, 10, 4_000, now_ns());
    let reader = Board::open_to_read(&directory).expect("open");
    let seen = reader.snapshot(now_ns());
    assert_eq!(seen.name, "x-1");
    assert_eq!(seen.command, "/bin/server --flag");
    assert_eq!(seen.address, "10.211.0.2");
    assert_eq!(seen.state, State::Unprotected);
    assert_eq!(seen.reason, "the standby died");
    assert_eq!((seen.term, seen.epoch), (3, 8));
    assert_eq!((seen.primary_pid, seen.standby_pid), (Some(11), None));
    assert_eq!(seen.service_pids, [21, 22]);
    assert_eq!((seen.takeovers, seen.last_takeover_us), (1, Some(900)));
    assert_eq!(
        seen.last_takeover_cause.as_deref(),
        Some("killed by signal 9")
    );
    assert_eq!(seen.pause.max_ns, 50_000);
    assert_eq!(seen.hold.p50_ns, 70_000);
    assert_eq!(seen.steps[EpochStep::Copy as usize].max_ns, 9_000);
    assert_eq!(seen.steps[EpochStep::Resume as usize].samples, 0);
    assert_eq!(seen.recent.dirty_pages_per_epoch, 10.0);
    assert!(seen.unprotected_for_ns.is_some());
    assert_eq!(seen.exit, None);
    board.set_exit(137);
    assert_eq!(reader.exit(), Some(137));
}

#[test]
fn unprotected_time_is_counted_once() {
    let root = TestRoot::new();
    let board = create(&directory(&root));
    board.set_state(State::Syncing, "");
    let since = board.get(Word::UnprotectedSinceNs);
    board.set_state(State::Unprotected, "no memory for a standby");
    assert_eq!(board.get(Word::UnprotectedSinceNs), since);
    let during = board.snapshot(since + 5 * SECOND_NS);
    assert_eq!(during.unprotected_total_ns, 5 * SECOND_NS);
    board.set_state(State::Protected, "");
    let total = board.snapshot(now_ns()).unprotected_total_ns;
    assert!(total > 0);
    board.set_state(State::Protected, "");
    let after = board.snapshot(now_ns() + SECOND_NS);
    assert_eq!(after.unprotected_total_ns, total);
    assert_eq!(after.unprotected_for_ns, None);
}

#[test]
fn rates_are_of_full_recent_seconds() {
    let root = TestRoot::new();
    let board = create(&directory(&root));
    let mut sequence = 0;
    for second in 100..130 {
        for part in 0..4 {
            sequence += 1;
            let now = second * SECOND_NS + part * SECOND_NS / 4;
            board.record_epoch(sequence, second, 1_000, now);
        }
    }
    let recent = board.snapshot(130 * SECOND_NS).recent;
    assert_eq!(recent.epochs_per_s, 4.0);
    assert_eq!(recent.dirty_pages_per_epoch, 124.5);
    assert_eq!(recent.bytes_per_epoch, 1_000.0);
    let idle = board.snapshot(500 * SECOND_NS).recent;
    assert_eq!(idle.epochs_per_s, 0.0);
    assert_eq!(idle.bytes_per_epoch, 1_000.0);
}

#[test]
fn long_texts_are_cut_between_characters() {
    let root = TestRoot::new();
    let board = create(&directory(&root));
    board.set_state(State::Failed, &"ä".repeat(200));
    assert_eq!(board.snapshot(0).reason, "ä".repeat(128));
    board.set_state(State::Failed, &format!("x{}", "ä".repeat(200)));
    assert_eq!(board.snapshot(0).reason, format!("x{}", "ä".repeat(127)));
    board.set_service_pids(&(1..=100).collect::<Vec<_>>());
    assert_eq!(board.service_pids().len(), SERVICE_PIDS_MAX);
}

#[test]
fn wrong_files_are_refused_with_the_reason() {
    let root = TestRoot::new();
    let directory = directory(&root);
    let refused = || {
        Board::open(&directory)
            .expect_err("must be refused")
            .to_string()
    };
    assert!(refused().contains("cannot open"));
    fs::write(directory.board(), "short").expect("write");
    assert!(refused().contains("too short"));
    fs::write(directory.board(), [7; 4096]).expect("write");
    assert!(refused().contains("does not begin as a board does"));
    drop(create(&directory));
    let whole = fs::read(directory.board()).expect("read");
    let mut other = whole.clone();
    other[8] = 99;
    fs::write(directory.board(), &other).expect("write");
    assert!(refused().contains("version 99"));
    fs::write(directory.board(), &whole[..whole.len() - 8]).expect("write");
    assert!(refused().contains("length"));
    fs::write(directory.board(), &whole).expect("write");
    assert!(Board::open(&directory).is_ok());
}

#[test]
fn fuzz_board() {
    let root = TestRoot::new();
    let directory = directory(&root);
    let board = create(&directory);
    board.set_state(State::Unprotected, "the standby died");
    board.set_service_pids(&[21, 22]);
    board.record_pause(50_000);
    board.record_epoch(8, 10, 4_000, now_ns());
    let path = directory.board();
    let sample = fs::read(&path).expect("board");
    unbroken_fuzz::bytes("board", &[sample], |bytes| {
        fs::write(&path, bytes).expect("board");
        if let Ok(board) = Board::open_to_read(&directory) {
            let _ = board.snapshot(now_ns());
        }
    });
}
