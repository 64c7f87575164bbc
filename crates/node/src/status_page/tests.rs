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

fn create(directory: &RunDirectory) -> StatusPage {
    let identity = Identity {
        command: "/bin/server --flag",
        address: "10.211.0.2",
        published: "",
    };
    StatusPage::create(directory, &identity).expect("status page")
}

#[test]
fn another_mapping_reads_what_was_written() {
    let root = TestRoot::new();
    let directory = directory(&root);
    let page = create(&directory);
    page.set_state(ServiceState::Unprotected, "the standby died");
    page.set_term(3);
    page.set_primary_pid(11);
    page.set_service_pids(&[21, 22]);
    page.record_takeover(900, "killed by signal 9");
    page.record_pause(50_000);
    page.record_hold(70_000);
    page.record_step(EpochStep::Copy, 9_000);
    page.record_epoch(8, 10, 4_000, now_ns());
    let reader = StatusPage::open_to_read(&directory).expect("open");
    let seen = reader.snapshot(now_ns());
    assert_eq!(seen.name, "x-1");
    assert_eq!(seen.command, "/bin/server --flag");
    assert_eq!(seen.address, "10.211.0.2");
    assert_eq!(seen.state, ServiceState::Unprotected);
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
    page.set_exit(137);
    assert_eq!(reader.exit(), Some(137));
}

#[test]
fn unprotected_time_is_counted_once() {
    let root = TestRoot::new();
    let page = create(&directory(&root));
    page.set_state(ServiceState::Syncing, "");
    let since = page.get(Word::UnprotectedSinceNs);
    page.set_state(ServiceState::Unprotected, "no memory for a standby");
    assert_eq!(page.get(Word::UnprotectedSinceNs), since);
    let during = page.snapshot(since + 5 * SECOND_NS);
    assert_eq!(during.unprotected_total_ns, 5 * SECOND_NS);
    page.set_state(ServiceState::Protected, "");
    let total = page.snapshot(now_ns()).unprotected_total_ns;
    assert!(total > 0);
    page.set_state(ServiceState::Protected, "");
    let after = page.snapshot(now_ns() + SECOND_NS);
    assert_eq!(after.unprotected_total_ns, total);
    assert_eq!(after.unprotected_for_ns, None);
}

#[test]
fn rates_are_of_full_recent_seconds() {
    let root = TestRoot::new();
    let page = create(&directory(&root));
    let mut sequence = 0;
    for second in 100..130 {
        for part in 0..4 {
            sequence += 1;
            let now = second * SECOND_NS + part * SECOND_NS / 4;
            page.record_epoch(sequence, second, 1_000, now);
        }
    }
    let recent = page.snapshot(130 * SECOND_NS).recent;
    assert_eq!(recent.epochs_per_s, 4.0);
    assert_eq!(recent.dirty_pages_per_epoch, 124.5);
    assert_eq!(recent.bytes_per_epoch, 1_000.0);
    let idle = page.snapshot(500 * SECOND_NS).recent;
    assert_eq!(idle.epochs_per_s, 0.0);
    assert_eq!(idle.bytes_per_epoch, 1_000.0);
}

#[test]
fn long_texts_are_cut_between_characters() {
    let root = TestRoot::new();
    let page = create(&directory(&root));
    page.set_state(ServiceState::Failed, &"ä".repeat(200));
    assert_eq!(page.snapshot(0).reason, "ä".repeat(128));
    page.set_state(ServiceState::Failed, &format!("x{}", "ä".repeat(200)));
    assert_eq!(page.snapshot(0).reason, format!("x{}", "ä".repeat(127)));
    page.set_service_pids(&(1..=100).collect::<Vec<_>>());
    assert_eq!(page.service_pids().len(), SERVICE_PIDS_MAX);
}

#[test]
fn wrong_files_are_refused_with_the_reason() {
    let root = TestRoot::new();
    let directory = directory(&root);
    let refused = || {
        StatusPage::open(&directory)
            .expect_err("must be refused")
            .to_string()
    };
    assert!(refused().contains("cannot open"));
    fs::write(directory.status_page(), "short").expect("write");
    assert!(refused().contains("too short"));
    fs::write(directory.status_page(), [7; 4096]).expect("write");
    assert!(refused().contains("does not begin as a status page does"));
    drop(create(&directory));
    let whole = fs::read(directory.status_page()).expect("read");
    let mut other = whole.clone();
    other[8] = 99;
    fs::write(directory.status_page(), &other).expect("write");
    assert!(refused().contains("version 99"));
    fs::write(directory.status_page(), &whole[..whole.len() - 8]).expect("write");
    assert!(refused().contains("length"));
    fs::write(directory.status_page(), &whole).expect("write");
    assert!(StatusPage::open(&directory).is_ok());
}

#[test]
fn fuzz_status_page() {
    let root = TestRoot::new();
    let directory = directory(&root);
    let page = create(&directory);
    page.set_state(ServiceState::Unprotected, "the standby died");
    page.set_service_pids(&[21, 22]);
    page.record_pause(50_000);
    page.record_epoch(8, 10, 4_000, now_ns());
    let path = directory.status_page();
    let sample = fs::read(&path).expect("status page");
    unbroken_fuzz::bytes("status-page", &[sample], |bytes| {
        fs::write(&path, bytes).expect("status page");
        if let Ok(page) = StatusPage::open_to_read(&directory) {
            let _ = page.snapshot(now_ns());
        }
    });
}
