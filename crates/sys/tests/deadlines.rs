//! When waits would have ended, as the kernel tells it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use unbroken_sys::bpf::DeadlineProgram;
use unbroken_sys::clock::{monotonic_ns, tick_ns};
use unbroken_sys::{ptrace, wait};

const PATIENCE: Duration = Duration::from_secs(20);
const WAIT_NS: u64 = 100_000_000_000;

/// Says what time it is, and then waits in the way that it was told.
const WAITER: &str = "
import select, signal, socket, struct, sys, time
poller = select.epoll()
near, far = socket.socketpair()
near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack('ll', 100, 0))
print(time.monotonic_ns(), flush=True)
{
    'epoll': lambda: poller.poll(100),
    'poll': lambda: select.poll().poll(100_000),
    'select': lambda: select.select([], [], [], 100),
    'sleep': lambda: time.sleep(100),
    'signal': lambda: signal.sigtimedwait([signal.SIGHUP], 100),
    'receive': lambda: near.recv(1),
    'for ever': lambda: poller.poll(),
}[sys.argv[1]]()
";

struct Waiter {
    child: Child,
    tid: i32,
    /// When it had not begun to wait.
    before_ns: u64,
    /// When it waited.
    after_ns: u64,
}

impl Waiter {
    /// One that waits.
    fn in_a(way: &str) -> Waiter {
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", WAITER, way])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let tid = child.id().cast_signed();
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let started = Instant::now();
        // "running" as long as it does not sleep.
        while !fs::read_to_string(format!("/proc/{tid}/syscall"))
            .unwrap()
            .starts_with(|first: char| first.is_ascii_digit())
        {
            assert!(started.elapsed() < PATIENCE, "{way}: it never waited");
        }
        Waiter {
            child,
            tid,
            before_ns: line.trim().parse().unwrap(),
            after_ns: monotonic_ns(),
        }
    }

    /// Breaks its wait off; since when.
    fn interrupt(&self) -> u64 {
        ptrace::seize(self.tid, 0).unwrap();
        let since_ns = monotonic_ns();
        ptrace::interrupt(self.tid).unwrap();
        wait::wait(self.tid).unwrap();
        since_ns
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_wait_that_was_broken_off_would_have_ended_its_time_after_it_began() {
    let program = DeadlineProgram::load(std::process::id().cast_signed()).unwrap();
    for way in ["epoll", "poll", "select", "sleep", "signal"] {
        let waiter = Waiter::in_a(way);
        let since_ns = waiter.interrupt();
        let deadline_ns = program.broken_off(waiter.tid, since_ns).unwrap();
        let began_ns = deadline_ns.unwrap_or_else(|| panic!("{way} was not seen")) - WAIT_NS;
        let when = waiter.before_ns..=waiter.after_ns;
        assert!(
            when.contains(&began_ns),
            "{way}: {began_ns} not in {when:?}"
        );
        // Of a stop after this one it is not.
        let later = program.broken_off(waiter.tid, monotonic_ns()).unwrap();
        assert_eq!(later, None, "{way}: nothing was broken off since");
    }
}

/// A socket's call counts ticks, and so may end two of them later.
#[test]
fn waits_on_sockets_are_seen_when_asked_for() {
    let program = DeadlineProgram::load(std::process::id().cast_signed()).unwrap();
    let told = |waiter: &Waiter| program.broken_off(waiter.tid, waiter.interrupt()).unwrap();
    let early = Waiter::in_a("receive");
    assert_eq!(told(&early), None);
    let sockets = program.for_sockets().load().unwrap();
    let waiter = Waiter::in_a("receive");
    let began_ns = told(&waiter).unwrap() - WAIT_NS;
    let when = waiter.before_ns..=waiter.after_ns + 2 * u64::from(tick_ns().unsigned_abs());
    assert!(when.contains(&began_ns), "{began_ns} not in {when:?}");
    drop(sockets);
    let late = Waiter::in_a("receive");
    assert_eq!(told(&late), None);
}

#[test]
fn what_was_not_seen_to_begin_and_what_has_no_end_is_not_told() {
    let load = |tid| DeadlineProgram::load(tid).unwrap();
    let early = Waiter::in_a("epoll");
    let program = load(early.tid);
    let endless = Waiter::in_a("for ever");
    for waiter in [&early, &endless] {
        let since_ns = waiter.interrupt();
        let deadline_ns = program.broken_off(waiter.tid, since_ns).unwrap();
        assert_eq!(deadline_ns, None);
    }
}
