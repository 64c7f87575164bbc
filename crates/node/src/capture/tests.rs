//! Captures of a real process, with its death in between. Needs the right to trace.

use super::*;
use crate::stage::address::Addresses;
use rustix::process::{Pid as RawPid, Signal, kill_process};
use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use unbroken_image::{Mapping, decode};
use unbroken_link::{JournalReader, LocalLink, ReferenceReader};
use unbroken_tracee::HostTid;
use unbroken_wire::flows::Connections;
use unbroken_wire::sent::SentBytes;

/// A process that does nothing; killed when dropped.
struct Service(Child);

impl Service {
    fn start() -> Service {
        // Whoever runs the tests may leave pipes open to them, which no replica can have.
        let program = "import os, signal; os.closerange(3, 4096)
signal.signal(signal.SIGUSR1, lambda *_: os.execv('/bin/sleep', ['sleep', '1000']))
signal.pause()";
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

    fn signal(&self, signal: Signal) {
        let pid = RawPid::from_raw(self.pid()).expect("a pid");
        kill_process(pid, signal).expect("signal the service");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The tracer may have reaped it already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a standby has of a link.
struct StandbyEnds {
    journal: JournalReader,
    references: ReferenceReader,
}

impl Deref for StandbyEnds {
    type Target = JournalReader;

    fn deref(&self) -> &JournalReader {
        &self.journal
    }
}

impl DerefMut for StandbyEnds {
    fn deref_mut(&mut self) -> &mut JournalReader {
        &mut self.journal
    }
}

/// A fill that has begun, and what a standby would read of it.
fn filling(tree: &mut Tree) -> (Capture, StandbyEnds) {
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
        bounds: crate::config::Bounds::SMALL,
    };
    let mut capture = Capture::new(
        Announcements::new(config.bounds.announcements),
        &[None, None],
        &config,
    )
    .unwrap();
    let journal = link.journal_writer(1).unwrap();
    let wire = silence(|| {});
    capture.begin_fill(tree, &wire, journal).unwrap();
    let ends = StandbyEnds {
        journal: link.journal_reader(1).unwrap(),
        references: link.reference_reader().unwrap(),
    };
    (capture, ends)
}

/// A filled link: the next capture completes the fill.
fn filled(tree: &mut Tree) -> (Capture, StandbyEnds) {
    let (mut capture, mut journal) = filling(tree);
    while !capture.fill_on(tree).unwrap() {
        last_published(&mut journal);
    }
    (capture, journal)
}

/// A wire on which nothing moves. It is told when the service stands.
struct Silence<F> {
    at_stop: F,
    sent: Mutex<SentBytes>,
}

fn silence<F: Fn()>(at_stop: F) -> Silence<F> {
    Silence {
        at_stop,
        sent: Mutex::default(),
    }
}

impl<F: Fn()> Wire for Silence<F> {
    fn stopped(&self) {
        (self.at_stop)();
    }

    fn wait_drained(&self, _: &mut Activity) -> u64 {
        1
    }

    fn sent(&self) -> MutexGuard<'_, SentBytes> {
        self.sent.lock().unwrap()
    }

    fn resumed(&self, _: Pause) {}

    fn take_connections(&self) -> Connections {
        Connections::default()
    }
}

fn epoch(
    capture: &mut Capture,
    tree: &mut Tree,
    at_stop: impl Fn(),
) -> Result<Captured, CaptureError> {
    capture.epoch(tree, &silence(at_stop), now_ns())
}

/// A call of the service that nobody announces.
fn call(service: &Service, tree: &mut Tree, number: i64, arguments: &[u64]) -> u64 {
    let mut stopped = tree.stop().unwrap();
    let mut calls = stopped.remote(HostTid(service.pid()));
    let slot = calls.call(number, arguments).unwrap();
    let value = calls.run().unwrap().get(slot).unwrap();
    stopped.resume().unwrap();
    value
}

/// The number of the last epoch that a standby would find.
fn last_published(journal: &mut JournalReader) -> u64 {
    while journal.peek().unwrap().is_some() {
        journal.consume().unwrap();
    }
    journal.consumed_sequence()
}

/// Before a record names a file the standby can refer to it, and a service that opens nothing costs
/// no message.
#[test]
fn references_come_ahead_of_what_names_them() {
    let service = Service::start();
    let mut tree = Tree::seize(&[service.pid()], true).unwrap();
    let (mut capture, mut standby) = filling(&mut tree);
    let mut held = HashSet::new();
    let mut named = HashSet::new();
    let mut is_complete = false;
    while !is_complete {
        is_complete = capture.fill_on(&tree).unwrap();
        if is_complete {
            let _ = epoch(&mut capture, &mut tree, || {}).unwrap();
        }
        while let Some(entry) = standby.journal.peek().unwrap() {
            let came = standby.references.receive(entry.messages).unwrap();
            held.extend(came.into_iter().map(|(file, _)| file));
            match decode("a record", entry.structure).unwrap() {
                Record::Memory { memory, .. } => {
                    let mappings = memory.mappings.unwrap_or_default();
                    named.extend(mappings.iter().filter_map(Mapping::file));
                }
                Record::Epoch {
                    epoch, released, ..
                } => {
                    assert_eq!(released, []);
                    let process = &epoch.processes[0];
                    named.extend(process.memory.layout.as_ref().map(|it| it.executable));
                    let state = process.state.as_ref().unwrap();
                    named.insert(state.root_directory.identity);
                    named.insert(state.working_directory.identity);
                }
                _ => {}
            }
            assert!(named.is_subset(&held), "{named:?} with {held:?}");
            standby.consume().unwrap();
        }
    }
    assert!(named.len() > 3, "{named:?}");
    let _ = epoch(&mut capture, &mut tree, || {}).unwrap();
    assert_eq!(standby.peek().unwrap().unwrap().messages, 0);
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

/// What comes first of a process is who it is: its memory needs a place in the replica.
#[test]
fn births_are_told_before_memory() {
    let service = Service::start();
    let mut tree = Tree::seize(&[service.pid()], true).unwrap();
    let expected = tree.processes()[0].birth().unwrap();
    let (mut capture, mut journal) = filling(&mut tree);
    let mut records = Vec::new();
    while !capture.fill_on(&tree).unwrap() {
        while let Some(entry) = journal.peek().unwrap() {
            records.push(decode("a record", entry.structure).unwrap());
            journal.consume().unwrap();
        }
    }
    let [Record::Birth(birth), memory @ ..] = &*records else {
        panic!("{records:?}");
    };
    assert_eq!(*birth, expected);
    let is_own = |it: &Record| matches!(it, Record::Memory { pid, .. } if *pid == birth.pid);
    assert!(
        !memory.is_empty() && memory.iter().all(is_own),
        "{memory:?}"
    );
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
    let result = epoch(&mut capture, &mut tree, || service.signal(Signal::KILL)).map(drop);
    assert!(matches!(result, Err(CaptureError::Killed)), "{result:?}");
    assert_eq!(last_published(&mut journal), 1);
}

/// What a stop finds behind an exec has new registers, and memory that nobody follows (I2).
#[test]
fn no_epoch_is_of_another_program() {
    let service = Service::start();
    let mut tree = Tree::seize(&[service.pid()], true).unwrap();
    let (mut capture, mut journal) = filled(&mut tree);
    // What calls change on the way there is not announced here.
    capture.verify = false;
    service.signal(Signal::USR1);
    let mut epochs = 0;
    let error = loop {
        match epoch(&mut capture, &mut tree, || {}) {
            Ok(_) => epochs += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, CaptureError::Executed), "{error:?}");
    assert_eq!(last_published(&mut journal), epochs);
}

/// A capture that failed has taken changes that no epoch has: the next would lack them (I2, I5).
#[test]
fn no_epoch_follows_a_capture_that_failed() {
    let service = Service::start();
    let mut tree = Tree::seize(&[service.pid()], true).unwrap();
    let (mut capture, mut journal) = filled(&mut tree);
    epoch(&mut capture, &mut tree, || {}).unwrap();
    let copy = call(&service, &mut tree, libc::SYS_dup, &[0]);
    let result = epoch(&mut capture, &mut tree, || {}).map(drop);
    assert!(matches!(result, Err(CaptureError::Mirror(_))), "{result:?}");
    call(&service, &mut tree, libc::SYS_close, &[copy]);
    let result = epoch(&mut capture, &mut tree, || {}).map(drop);
    assert!(matches!(result, Err(CaptureError::Waiting)), "{result:?}");
    assert_eq!(last_published(&mut journal), 1);
}

/// Nobody here announces what calls change, so the mirror cannot know of it (I7).
#[test]
fn a_change_that_nobody_announced_is_told() {
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let map = [0, PAGE_SIZE, libc::PROT_READ as u64, anonymous, u64::MAX, 0];
    let changes = [
        (libc::SYS_dup, &[0][..]),
        (libc::SYS_mmap, &map),
        (libc::SYS_umask, &[0o70]),
        (libc::SYS_alarm, &[1000]),
    ];
    for (number, arguments) in changes {
        let service = Service::start();
        let mut tree = Tree::seize(&[service.pid()], true).unwrap();
        let (mut capture, mut journal) = filled(&mut tree);
        epoch(&mut capture, &mut tree, || {}).unwrap();
        call(&service, &mut tree, number, arguments);
        let result = epoch(&mut capture, &mut tree, || {}).map(drop);
        assert!(matches!(result, Err(CaptureError::Mirror(_))), "{result:?}");
        assert_eq!(last_published(&mut journal), 1);
    }
}
