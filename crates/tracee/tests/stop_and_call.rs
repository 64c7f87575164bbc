//! Stops, registers and remote calls on live multi-threaded processes.

mod common;

use common::Guest;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use unbroken_tracee::{Death, Event, HostTid, TraceError, Tree};

/// What the guests run.
#[test]
fn guest() {
    match common::role().as_deref() {
        Some("self-checking") => self_checking_guest(),
        Some("tracer") => tracer_guest(),
        Some("exits") => {
            println!("ready");
            let _ = std::io::stdin().read(&mut [0]);
            std::process::exit(7);
        }
        Some("threads") => {
            println!("ready");
            loop {
                std::thread::spawn(std::thread::yield_now)
                    .join()
                    .unwrap();
            }
        }
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

fn state_letter(tid: HostTid) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap();
    stat[stat.rfind(')').unwrap() + 2..].chars().next().unwrap()
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
            stopped.signal_mask(thread.host_tid).unwrap();
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
    let mut buffer = Vec::new();
    for _ in 0..50 {
        let stopped = tree.stop().unwrap();
        let tids: Vec<_> = stopped
            .processes()
            .flat_map(|p| p.threads())
            .map(|t| t.host_tid)
            .collect();
        for tid in tids {
            stopped.extended_state(tid, &mut buffer).unwrap();
            assert!(buffer.len() >= 576);
            stopped.set_extended_state(tid, &buffer).unwrap();
            let registers = stopped.registers(tid).unwrap();
            stopped.set_registers(tid, &registers).unwrap();
            // glibc registers one for every thread.
            assert!(stopped.restartable_sequence(tid).unwrap().is_some());
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
    let bytes: Vec<u8> = (0..unbroken_tracee::Batch::SCRATCH_BYTES)
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

/// The tracer is killed again and again, at any moment; the service must not notice.
#[test]
fn a_tracer_may_die_at_any_moment() {
    let mut guest = Guest::start("self-checking");
    let pid = guest.pid();
    std::thread::scope(|scope| {
        // A tracer of its own thread, so that this one can install the blob and let go.
        scope.spawn(|| {
            let mut tree = Tree::seize(&[pid], false).unwrap();
            let mut stopped = tree.stop().unwrap();
            stopped.install_blob(HostTid(pid)).unwrap();
            stopped.detach().unwrap();
        });
    });
    for kill in 0..120_u64 {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "guest", "--nocapture", "--test-threads=1"]);
        command
            .env("GUEST_ROLE", "tracer")
            .env("GUEST_TARGET", pid.to_string());
        let mut tracer = Guest::spawn(command);
        std::thread::sleep(Duration::from_micros(500 + kill * 7919 % 3000));
        tracer.child.kill().unwrap();
        tracer.child.wait().unwrap();
        assert_eq!(
            guest.child.try_wait().unwrap(),
            None,
            "guest died after kill {kill}"
        );
    }
    guest.stdin.as_mut().unwrap().write_all(b"xyz").unwrap();
    guest.stdin = None;
    assert!(guest.expect_line("rounds").contains("bytes Ok(3)"));
    assert!(guest.child.wait().unwrap().success());
}

#[test]
fn a_process_that_exits_is_noticed_before_and_after() {
    let mut guest = Guest::start("exits");
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    tree.stop().unwrap().resume().unwrap();
    assert_eq!(tree.poll().unwrap(), None);
    tree.bell().ring();
    assert_eq!(tree.poll().unwrap(), Some(Event::Bell));
    guest.stdin = None;
    let death = Death::Exited(7);
    let pid = tree.processes()[0].pid;
    assert_eq!(tree.wait().unwrap(), Event::Exiting { pid, death });
    // Its memory is still there.
    assert_ne!(
        std::fs::read_to_string(format!("/proc/{}/maps", guest.pid())).unwrap(),
        ""
    );
    assert_eq!(tree.wait().unwrap(), Event::Exited { pid, death });
    assert_eq!(tree.wait().unwrap(), Event::Empty);
    assert!(matches!(tree.stop(), Err(TraceError::Ended)));
}

#[test]
fn a_killed_process_ends_a_stop() {
    for _ in 0..20 {
        let mut guest = Guest::start("self-checking");
        let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
        tree.stop().unwrap().resume().unwrap();
        guest.child.kill().unwrap();
        loop {
            match tree.stop() {
                Ok(stopped) => stopped.resume().unwrap(),
                Err(error) => {
                    assert!(error.is_death());
                    break;
                }
            }
        }
        let event = tree.wait().unwrap();
        let Event::Exiting { pid, death: Death::Killed(libc::SIGKILL) } = event else {
            panic!("{event:?}");
        };
        assert_eq!(
            tree.wait().unwrap(),
            Event::Exited {
                pid,
                death: Death::Killed(9)
            }
        );
    }
}

#[test]
fn threads_that_come_and_go_are_followed() {
    let guest = Guest::start("threads");
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    let bell = tree.bell();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_micros(700));
                bell.ring();
            }
        });
        for round in 0..200 {
            assert_eq!(tree.wait().unwrap(), Event::Bell);
            let mut stopped = tree.stop().unwrap();
            let tids: Vec<_> = stopped
                .processes()
                .flat_map(|p| p.threads())
                .map(|t| t.host_tid)
                .collect();
            let mut real: Vec<_> = std::fs::read_dir(format!("/proc/{}/task", guest.pid()))
                .unwrap()
                .map(|entry| {
                    HostTid(
                        entry
                            .unwrap()
                            .file_name()
                            .to_str()
                            .unwrap()
                            .parse()
                            .unwrap(),
                    )
                })
                .collect();
            let mut known = tids.clone();
            known.sort();
            real.sort();
            assert_eq!(known, real, "round {round}");
            for tid in tids {
                stopped.install_blob(tid).unwrap();
                let mut batch = stopped.remote(tid);
                let own = batch.call(libc::SYS_gettid, &[]).unwrap();
                assert_eq!(batch.run().unwrap().get(own).unwrap(), tid.0 as u64);
            }
            stopped.resume().unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
}

fn python(program: &str) -> Guest {
    let mut command = std::process::Command::new("python3");
    command.args(["-u", "-c", program]);
    Guest::spawn(command)
}

#[test]
fn forks_vforks_and_programs_are_followed() {
    // subprocess uses vfork, os.fork forks.
    let mut guest = python(
        "import os,sys,subprocess\n\
         print('ready')\n\
         sys.stdin.read(1)\n\
         for n in range(10):\n\
         \x20 pid = os.fork()\n\
         \x20 if pid == 0: os._exit(n)\n\
         \x20 assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == n\n\
         \x20 assert subprocess.run(['true']).returncode == 0\n\
         print('done')\n",
    );
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    let own = tree.processes()[0].pid;
    {
        let mut stopped = tree.stop().unwrap();
        stopped.install_blob(HostTid(guest.pid())).unwrap();
    }
    guest.stdin = None;
    let (mut forks, mut vforks, mut programs) = (0, 0, 0);
    loop {
        match tree.wait().unwrap() {
            Event::Forked {
                parent,
                child,
                shares_memory,
            } => {
                assert_eq!(parent, own);
                *if shares_memory {
                    &mut vforks
                } else {
                    &mut forks
                } += 1;
                let mut stopped = tree.stop().unwrap();
                let leader = stopped.process(child).unwrap().leader();
                if !shares_memory {
                    // It inherited the blob.
                    let mut batch = stopped.remote(leader);
                    let slot = batch.call(libc::SYS_getpid, &[]).unwrap();
                    assert_eq!(batch.run().unwrap().get(slot).unwrap(), child.0 as u64);
                }
                stopped.resume().unwrap();
            }
            Event::Executed { pid } => {
                programs += 1;
                let mut stopped = tree.stop().unwrap();
                let leader = stopped.process(pid).unwrap().leader();
                assert!(!stopped.has_blob(leader));
                stopped.install_blob(leader).unwrap();
                let mut batch = stopped.remote(leader);
                let slot = batch.call(libc::SYS_getpid, &[]).unwrap();
                assert_eq!(batch.run().unwrap().get(slot).unwrap(), pid.0 as u64);
                stopped.resume().unwrap();
            }
            Event::Exited { pid, .. } if pid == own => break,
            _ => {}
        }
    }
    guest.expect_line("done");
    assert_eq!((forks, vforks, programs), (10, 10, 10));
}

#[test]
fn a_tree_that_forks_all_the_time_can_be_stopped() {
    let guest = python(
        "import os,sys,subprocess\n\
         print('ready')\n\
         while True:\n\
         \x20 pid = os.fork()\n\
         \x20 if pid == 0: os._exit(0)\n\
         \x20 os.waitpid(pid, 0)\n\
         \x20 subprocess.run(['true'])\n",
    );
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    for _ in 0..300 {
        let stopped = tree.stop().unwrap();
        for thread in stopped.processes().flat_map(|p| p.threads()) {
            assert_eq!(state_letter(thread.host_tid), 't');
        }
        stopped.resume().unwrap();
        for _ in 0..3 {
            tree.wait().unwrap();
        }
    }
}

#[test]
fn signals_reach_their_handlers_across_stops() {
    let mut guest = python(
        "import signal,sys,os\n\
         got = 0\n\
         def handler(*_):\n\
         \x20 global got\n\
         \x20 got += 1\n\
         signal.signal(signal.SIGUSR1, handler)\n\
         signal.signal(signal.SIGWINCH, handler)\n\
         print('ready')\n\
         while True:\n\
         \x20 line = sys.stdin.readline()\n\
         \x20 if line == '': break\n\
         \x20 print('got', got)\n",
    );
    let pid = guest.pid();
    let mut tree = Tree::seize(&[pid], true).unwrap();
    let bell = tree.bell();
    tree.stop().unwrap().install_blob(HostTid(pid)).unwrap();
    for round in 0..200 {
        unbroken_sys::signal::to_process(pid, libc::SIGUSR1).unwrap();
        let mut stopped = tree.stop().unwrap();
        if round % 2 == 0 {
            let mut batch = stopped.remote(HostTid(pid));
            batch.call(libc::SYS_getpid, &[]).unwrap();
            batch.run().unwrap();
        }
        stopped.resume().unwrap();
        // Each is to be handled before the next is sent: they do not queue.
        guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        std::thread::scope(|scope| {
            let bell = bell.clone();
            let guest = &mut guest;
            scope.spawn(move || {
                assert_eq!(
                    guest.expect_line("got").trim(),
                    format!("got {}", round + 1)
                );
                bell.ring();
            });
            assert_eq!(tree.wait().unwrap(), Event::Bell);
        });
    }
}

#[test]
fn a_group_stop_lasts_through_our_stops() {
    let mut guest = python("import sys\nprint('ready')\nsys.stdin.readline()\nprint('on')\n");
    let pid = guest.pid();
    let mut tree = Tree::seize(&[pid], true).unwrap();
    tree.stop().unwrap().install_blob(HostTid(pid)).unwrap();
    unbroken_sys::signal::to_process(pid, libc::SIGSTOP).unwrap();
    for _ in 0..20 {
        let mut stopped = tree.stop().unwrap();
        let mut batch = stopped.remote(HostTid(pid));
        let slot = batch.call(libc::SYS_getpid, &[]).unwrap();
        assert_eq!(batch.run().unwrap().get(slot).unwrap(), pid as u64);
        stopped.resume().unwrap();
    }
    guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    let bell = tree.bell();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            bell.ring();
        });
        // Had it gone on, it would end now.
        assert_eq!(tree.wait().unwrap(), Event::Bell);
    });
    unbroken_sys::signal::to_process(pid, libc::SIGCONT).unwrap();
    while !matches!(
        tree.wait().unwrap(),
        Event::Exited {
            death: Death::Exited(0),
            ..
        }
    ) {}
    guest.expect_line("on");
}
