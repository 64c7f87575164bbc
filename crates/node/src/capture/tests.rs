//! Captures of a real process, with its death in between. Needs the right to trace.

use super::*;
use crate::handshake::Step;
use crate::stage::address::Addresses;
use rustix::process::{Pid as RawPid, Signal, kill_process};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use unbroken_link::{JournalReader, LocalLink};
use unbroken_wire::flows::Connections;

/// A process that does nothing; killed when dropped.
struct Service(Child);

impl Service {
    fn start() -> Service {
        // Whoever runs the tests may leave pipes open to them, which no replica can have.
        let program = "import os, signal; os.closerange(3, 4096); signal.pause()";
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", program]);
        for set in [Command::stdin, Command::stdout, Command::stderr] {
            set(&mut command, Stdio::null());
        }
        let service = Service(command.spawn().expect("start python3"));
        // Until it waits it changes descriptors and memory, and nobody announces that here.
        let call = format!("/proc/{}/syscall", service.pid());
        let pause = format!("{} ", libc::SYS_pause);
        while !std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&pause)) {
            std::thread::yield_now();
        }
        service
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    fn kill(&self) {
        let pid = RawPid::from_raw(self.pid()).expect("a pid");
        kill_process(pid, Signal::KILL).expect("kill the service");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The tracer may have reaped it already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A fill that has begun, and what a standby would read of it.
fn filling(tree: &mut Tree) -> (Capture, JournalReader) {
    let link = LocalLink::with_capacity(64 << 20, 1 << 16).unwrap();
    let config = Config {
        name: "capture".to_owned(),
        command: Vec::new(),
        user: None,
        inherited: crate::inherited::Inherited::default(),
        addresses: Addresses {
            host_v4: Ipv4Addr::UNSPECIFIED,
            service_v4: Ipv4Addr::UNSPECIFIED,
            v6: None,
        },
        mtu_bytes: 1500,
        service_core: 0,
        spare_core: 0,
        verify: true,
    };
    let mut capture = Capture::new(Announcements::default(), &[None, None], &config).unwrap();
    let journal = link.journal_writer(1).unwrap();
    let line = Line::new().unwrap();
    capture.begin_fill(tree, &line, journal).unwrap();
    (capture, link.journal_reader(1).unwrap())
}

/// A filled link: the next capture completes the fill.
fn filled(tree: &mut Tree) -> (Capture, JournalReader) {
    let (mut capture, mut journal) = filling(tree);
    while !capture.fill_on(tree).unwrap() {
        last_published(&mut journal);
    }
    (capture, journal)
}

/// Captures an epoch. Plays the main thread meanwhile, which calls `at_stop` when the service
/// stands.
fn epoch(
    capture: &mut Capture,
    tree: &mut Tree,
    at_stop: impl Fn() + Sync,
) -> Result<(), CaptureError> {
    let line = Line::new().unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                if line.handshake.step() == Step::Stopped {
                    at_stop();
                    line.leave_connections(Connections::default());
                    line.handshake.drained(1);
                }
                std::thread::yield_now();
            }
        });
        let result = capture.epoch(tree, &line);
        over.store(true, Ordering::SeqCst);
        result
    })
}

/// The number of the last epoch that a standby would find.
fn last_published(journal: &mut JournalReader) -> u64 {
    while journal.peek().unwrap().is_some() {
        journal.consume().unwrap();
    }
    journal.consumed_sequence()
}

/// From its completion on output waits for the standby, so there must be little left to take.
#[test]
fn a_fill_is_not_complete_before_all_of_it_was_taken() {
    let service = Service::start();
    let mut tree = Tree::seize(&[service.pid()], true).unwrap();
    let (mut capture, mut journal) = filling(&mut tree);
    for _ in 0..100 {
        assert!(!capture.fill_on(&tree).unwrap());
    }
    let mut pieces = 0;
    while !capture.fill_on(&tree).unwrap() {
        pieces += usize::from(journal.is_ready());
        last_published(&mut journal);
    }
    assert!(pieces > 0);
}

/// One that is killed under our eyes goes on to its end while it is read, so what was read is of
/// nobody (I5).
#[test]
fn a_service_killed_while_it_is_read_makes_no_epoch() {
    let service = Service::start();
    let mut tree = Tree::seize(&[service.pid()], true).unwrap();
    let (mut capture, mut journal) = filled(&mut tree);
    epoch(&mut capture, &mut tree, || {}).unwrap();
    assert_eq!(last_published(&mut journal), 1);
    let result = epoch(&mut capture, &mut tree, || service.kill());
    assert!(matches!(result, Err(CaptureError::Killed)), "{result:?}");
    assert_eq!(last_published(&mut journal), 1);
}

/// A capture that failed has taken changes that no epoch has: the next would lack them (I2, I5).
#[test]
fn no_epoch_follows_a_capture_that_failed() {
    let service = Service::start();
    let mut tree = Tree::seize(&[service.pid()], true).unwrap();
    let (mut capture, mut journal) = filled(&mut tree);
    epoch(&mut capture, &mut tree, || {}).unwrap();
    let followed = capture.followed.take();
    epoch(&mut capture, &mut tree, || {}).unwrap_err();
    capture.followed = followed;
    let result = epoch(&mut capture, &mut tree, || {});
    assert!(matches!(result, Err(CaptureError::Waiting)), "{result:?}");
    assert_eq!(last_published(&mut journal), 1);
}

/// Nobody here announces what calls change, so the mirror cannot know of it (I7).
#[test]
fn a_change_that_nobody_announced_is_told() {
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let map = [0, PAGE_SIZE, libc::PROT_READ as u64, anonymous, u64::MAX, 0];
    for (number, arguments) in [(libc::SYS_dup, &[0][..]), (libc::SYS_mmap, &map)] {
        let service = Service::start();
        let mut tree = Tree::seize(&[service.pid()], true).unwrap();
        let (mut capture, mut journal) = filled(&mut tree);
        epoch(&mut capture, &mut tree, || {}).unwrap();
        let mut stopped = tree.stop().unwrap();
        let mut calls = stopped.remote(HostTid(service.pid()));
        calls.call(number, arguments).unwrap();
        calls.run().unwrap();
        stopped.resume().unwrap();
        let result = epoch(&mut capture, &mut tree, || {});
        assert!(matches!(result, Err(CaptureError::Mirror(_))), "{result:?}");
        assert_eq!(last_published(&mut journal), 1);
    }
}
