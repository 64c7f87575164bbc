//! Signals and group stops on their way through a tracer, and the calls that they meet.

mod common;

use common::{python, wait_for_line};
use std::io::Write;
use std::time::Duration;
use unbroken_tracee::{Death, Event, HostTid, Tree};

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

/// Calls epoll_wait past Python's own retries and says what it returned.
const EPOLL_GUEST: &str = "import ctypes,select,signal,sys,time\n\
     libc = ctypes.CDLL(None, use_errno=True)\n\
     signal.signal(signal.SIGUSR1, lambda *_: None)\n\
     poll = select.epoll()\n\
     events = ctypes.create_string_buffer(64)\n\
     print('ready')\n\
     while sys.stdin.readline():\n\
     \x20 start = time.monotonic()\n\
     \x20 result = libc.epoll_wait(poll.fileno(), events, 1, 200)\n\
     \x20 elapsed = time.monotonic() - start\n\
     \x20 print('returned', result, ctypes.get_errno() if result < 0 else 0, elapsed >= 0.2)\n";

/// Stops the guest until it is inside of epoll_wait; returns with it still stopped.
fn stop_in_epoll_wait<'t>(tree: &'t mut Tree, tid: HostTid) -> unbroken_tracee::Stopped<'t> {
    loop {
        let is_there = {
            let path = format!("/proc/{tid}/syscall");
            std::fs::read_to_string(path)
                .unwrap()
                .starts_with(&libc::SYS_epoll_wait.to_string())
        };
        if is_there {
            return tree.stop().unwrap();
        }
        while tree.poll().unwrap().is_some() {}
        std::thread::yield_now();
    }
}

#[test]
fn a_call_made_again_ends_when_a_handler_runs_and_only_then() {
    let mut guest = python(EPOLL_GUEST);
    let pid = guest.pid();
    let tid = HostTid(pid);
    let mut tree = Tree::seize(&[pid], true).unwrap();
    let cases = [
        (None, "returned 0 0 True"),
        (Some(libc::SIGUSR1), "returned -1 4 False"),
        (Some(libc::SIGWINCH), "returned 0 0 True"),
    ];
    for (signal, expected) in cases {
        guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let stopped = stop_in_epoll_wait(&mut tree, tid);
        // The stop has seen to it that the call is made again.
        let registers = stopped.registers(tid).unwrap();
        assert_eq!(registers.rax as i64, libc::SYS_epoll_wait);
        assert_eq!(registers.orig_rax, u64::MAX);
        if let Some(signal) = signal {
            unbroken_sys::signal::to_process(pid, signal).unwrap();
        }
        stopped.resume().unwrap();
        let line = wait_for_line(&mut tree, &mut guest, "returned");
        assert_eq!(line.trim(), expected, "with {signal:?}");
    }
}

#[test]
fn an_ignored_signal_does_not_end_a_call() {
    let mut guest = python(EPOLL_GUEST);
    let pid = guest.pid();
    let tid = HostTid(pid);
    let mut tree = Tree::seize(&[pid], true).unwrap();
    guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    // The guest runs: nobody looks at its registers but for the signal.
    while !std::fs::read_to_string(format!("/proc/{pid}/syscall"))
        .unwrap()
        .starts_with(&libc::SYS_epoll_wait.to_string())
    {
        while tree.poll().unwrap().is_some() {}
    }
    unbroken_sys::signal::to_thread(pid, tid.0, libc::SIGWINCH).unwrap();
    let line = wait_for_line(&mut tree, &mut guest, "returned");
    assert_eq!(line.trim(), "returned 0 0 True");
}
