//! Stops, registers and remote calls on live multi-threaded processes.

mod common;

use common::{Guest, let_go, state_letter};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use unbroken_tracee::dirty::DirtyTracker;
use unbroken_tracee::{Death, Event, HostTid, ProcessReading, TraceError, Tree};

/// What the guests run.
#[test]
fn guest() {
    match common::role().as_deref() {
        Some("self-checking") => self_checking_guest(),
        Some("tracer") => tracer_guest(),
        Some("following tracer") => following_tracer_guest(),
        _ => {}
    }
}

/// A long dependent computation in general and floating-point registers.
fn computation() -> (u64, f64) {
    let (mut whole, mut real) = (0x1234_5678_9abc_def0_u64, 1.0_f64);
    for step in 0..20_000_u64 {
        whole = whole.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ step;
        real = (real * 1.000_001 + (whole & 0xff) as f64).sqrt() + 0.5;
    }
    (whole, real)
}

fn blocked_signals() -> String {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    status
        .lines()
        .find(|line| line.starts_with("SigBlk"))
        .unwrap()
        .to_owned()
}

/// Checks for ever that nobody changed what only this program may change; says how often when its
/// standard input is closed.
fn self_checking_guest() {
    let rounds: &'static AtomicU64 = Box::leak(Box::default());
    let expected = computation();
    for _ in 0..2 {
        std::thread::spawn(move || {
            let mask = blocked_signals();
            loop {
                if computation() != expected || blocked_signals() != mask {
                    println!("damaged registers or mask");
                    std::process::exit(3);
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    std::thread::spawn(|| {
        loop {
            let start = Instant::now();
            std::thread::sleep(Duration::from_millis(3));
            if start.elapsed() < Duration::from_millis(3) {
                println!("damaged sleep");
                std::process::exit(3);
            }
        }
    });
    std::thread::spawn(|| {
        loop {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    });
    println!("ready");
    let mut rest = Vec::new();
    let read = std::io::stdin().read_to_end(&mut rest);
    println!("\nrounds {} bytes {read:?}", rounds.load(Ordering::Relaxed));
    std::process::exit(0);
}

fn thread_ids(tree: &Tree) -> Vec<HostTid> {
    tree.processes()
        .iter()
        .flat_map(|p| p.threads())
        .map(|t| t.host_tid)
        .collect()
}

#[test]
fn every_thread_stops_and_goes_on() {
    let mut guest = Guest::start("self-checking");
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    for _ in 0..300 {
        let stopped = tree.stop().unwrap();
        let process = stopped.processes().next().unwrap();
        assert!(process.threads().len() >= 5);
        assert_eq!(process.threads().next().unwrap().host_tid.0, guest.pid());
        for thread in process.threads() {
            assert_eq!(state_letter(thread.host_tid), 't');
            let registers = stopped.registers(thread.host_tid).unwrap();
            assert_ne!(registers.rsp, 0);
        }
        stopped.resume().unwrap();
    }
    // Dropping without resume lets it run, too.
    drop(tree.stop().unwrap());
    guest.stdin = None;
    while !matches!(
        tree.wait().unwrap(),
        Event::Exited {
            death: Death::Exited(0),
            ..
        }
    ) {}
    assert!(guest.expect_line("rounds").contains("bytes Ok(0)"));
}

#[test]
fn extended_state_and_rseq_can_be_read_and_written_back() {
    let mut guest = Guest::start("self-checking");
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    let mut reading = ProcessReading::default();
    for _ in 0..50 {
        let stopped = tree.stop().unwrap();
        let process = stopped.processes().next().unwrap();
        stopped.read_process(process.pid, &mut reading).unwrap();
        assert_eq!(reading.threads.len(), process.threads().len());
        for thread in &reading.threads {
            let (tid, state) = (thread.host_tid, &thread.extended_state);
            assert!(state.len() >= 576);
            assert_eq!(state.len(), reading.threads[0].extended_state.len());
            stopped.set_extended_state(tid, state).unwrap();
            let registers = stopped.registers(tid).unwrap();
            stopped.set_registers(tid, &registers).unwrap();
            // glibc registers one for every thread, if not before it has run.
            if tid.0 == guest.pid() {
                assert!(stopped.restartable_sequence(tid).unwrap().is_some());
            }
        }
        stopped.resume().unwrap();
    }
    guest.stdin = None;
    while !matches!(
        tree.wait().unwrap(),
        Event::Exited {
            death: Death::Exited(0),
            ..
        }
    ) {}
    guest.expect_line("rounds");
}

#[test]
fn batches_run_in_every_thread_and_leave_nothing_behind() {
    let mut guest = Guest::start("self-checking");
    let pid = guest.pid();
    let mut tree = Tree::seize(&[pid], true).unwrap();
    {
        let mut stopped = tree.stop().unwrap();
        assert!(matches!(
            stopped.remote(HostTid(pid)).run().err(),
            Some(TraceError::NoBlob { .. })
        ));
        stopped.install_blob(HostTid(pid)).unwrap();
        stopped.install_blob(HostTid(pid)).unwrap();
    }
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(maps.contains("5ead00000000-5ead00001000 r-xp"), "{maps}");
    assert!(maps.contains("5ead00001000-5ead00004000 rw-p"), "{maps}");
    for round in 0..200_u64 {
        let tids = thread_ids(&tree);
        let mut stopped = tree.stop().unwrap();
        for tid in tids {
            let mut batch = stopped.remote(tid);
            let own_pid = batch.call(libc::SYS_getpid, &[]).unwrap();
            let own_tid = batch.call(libc::SYS_gettid, &[]).unwrap();
            let bad = batch.call(libc::SYS_close, &[9999]).unwrap();
            let text = batch.scratch(&round.to_le_bytes()).unwrap();
            let name = batch.reserve(390).unwrap();
            let uname = batch.call(libc::SYS_uname, &[name.0]).unwrap();
            let results = batch.run().unwrap();
            assert_eq!(results.get(own_pid).unwrap(), pid as u64);
            assert_eq!(results.get(own_tid).unwrap(), tid.0 as u64);
            assert_eq!(
                results.get(bad).unwrap_err().raw_os_error(),
                Some(libc::EBADF)
            );
            assert!(results.get(uname).is_ok());
            assert_eq!(results.word(text), round);
            assert_eq!(results.bytes(name, 5), b"Linux");
        }
        stopped.resume().unwrap();
    }
    guest.stdin.as_mut().unwrap().write_all(b"xyz").unwrap();
    guest.stdin = None;
    while !matches!(
        tree.wait().unwrap(),
        Event::Exited {
            death: Death::Exited(0),
            ..
        }
    ) {}
    assert!(guest.expect_line("rounds").contains("bytes Ok(3)"));
}

#[test]
fn a_full_batch_says_so_and_a_large_one_runs() {
    let guest = Guest::start("self-checking");
    let tid = HostTid(guest.pid());
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    let mut stopped = tree.stop().unwrap();
    stopped.install_blob(tid).unwrap();
    let mut batch = stopped.remote(tid);
    let bytes: Vec<u8> = (0..unbroken_sys::remote_code::SCRATCH_BYTES)
        .map(|n| n as u8)
        .collect();
    let address = batch.scratch(&bytes).unwrap();
    assert!(matches!(
        batch.scratch(b"x"),
        Err(TraceError::BatchFull { .. })
    ));
    let mut slots = Vec::new();
    while batch.calls_left() > 0 {
        slots.push(batch.call(libc::SYS_gettid, &[]).unwrap());
    }
    assert!(matches!(
        batch.call(0, &[]),
        Err(TraceError::BatchFull { .. })
    ));
    let results = batch.run().unwrap();
    assert!(
        slots
            .iter()
            .all(|&slot| results.get(slot).unwrap() == tid.0 as u64)
    );
    assert_eq!(results.bytes(address, bytes.len()), bytes);
}

/// A tracer that does nothing but stop and call, until it is killed.
fn tracer_guest() {
    let pid = std::env::var("GUEST_TARGET").unwrap().parse().unwrap();
    let mut tree = Tree::seize(&[pid], false).unwrap();
    // Installing is not what must survive (see blob.rs); it was done before.
    println!("ready");
    let mut round = 0;
    loop {
        let tids = thread_ids(&tree);
        let tid = tids[round % tids.len()];
        let mut stopped = tree.stop().unwrap();
        stopped.install_blob(tid).unwrap();
        for _ in 0..20 {
            let mut batch = stopped.remote(tid);
            for _ in 0..8 {
                batch.call(libc::SYS_gettid, &[]).unwrap();
            }
            batch.run().unwrap();
        }
        stopped.resume().unwrap();
        round += 1;
    }
}

/// A tracer that does nothing but begin to follow what is written, until it is killed.
fn following_tracer_guest() {
    let pid = std::env::var("GUEST_TARGET").unwrap().parse().unwrap();
    let mut tree = Tree::seize(&[pid], false).unwrap();
    println!("ready");
    loop {
        let mut stopped = tree.stop().unwrap();
        stopped.install_blob(HostTid(pid)).unwrap();
        drop(DirtyTracker::install(&mut stopped, HostTid(pid)).unwrap());
        stopped.resume().unwrap();
    }
}

/// Takes the blob of process `pid` over or installs it, and lets go.
fn take_over(pid: i32) {
    // A tracer of its own thread, so that this one stays none.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut tree = Tree::seize(&[pid], false).unwrap();
            let mut stopped = tree.stop().unwrap();
            stopped.install_blob(HostTid(pid)).unwrap();
            // Not only by its end, which the scope does not wait for.
            let_go(stopped);
        });
    });
}

/// Kills a tracer of `guest` again and again, at any moment, and does `after` each time.
fn kill_tracers(role: &str, guest: &mut Guest, mut after: impl FnMut()) {
    take_over(guest.pid());
    for kill in 0..120_u64 {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "guest", "--nocapture", "--test-threads=1"]);
        command
            .env("GUEST_ROLE", role)
            .env("GUEST_TARGET", guest.pid().to_string());
        let mut tracer = Guest::spawn(command);
        std::thread::sleep(Duration::from_micros(500 + kill * 7919 % 3000));
        tracer.child.kill().unwrap();
        tracer.child.wait().unwrap();
        assert_eq!(
            guest.child.try_wait().unwrap(),
            None,
            "guest died after kill {kill}"
        );
        after();
    }
}

/// Found by `cargo xtask torture --seed 9000`, fault 1576: a service was never protected again
/// after its primary had died as it made a userfaultfd there, which counted as the service's own.
#[test]
fn what_a_dead_tracer_left_open_is_closed_by_the_next() {
    let mut guest = Guest::start("self-checking");
    let pid = guest.pid();
    let is_open = || {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        // The guest opens and closes, too.
        open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .any(|name| name.to_string_lossy().contains("userfaultfd"))
    };
    let mut left_open = 0;
    kill_tracers("following tracer", &mut guest, || {
        left_open += usize::from(is_open());
        take_over(pid);
        assert!(!is_open(), "still there after {left_open} were closed");
    });
    assert!(left_open > 0, "no tracer died at that moment");
}

/// The tracer is killed again and again, at any moment; the service must not notice.
#[test]
fn a_tracer_may_die_at_any_moment() {
    let mut guest = Guest::start("self-checking");
    kill_tracers("tracer", &mut guest, || {});
    guest.stdin.as_mut().unwrap().write_all(b"xyz").unwrap();
    guest.stdin = None;
    assert!(guest.expect_line("rounds").contains("bytes Ok(3)"));
    assert!(guest.child.wait().unwrap().success());
}
