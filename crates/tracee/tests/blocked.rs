//! Calls that wait, in a service that is stopped all the time and in one that moves.

mod common;

use common::{Guest, let_go, python};
use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;
use unbroken_image::{BlockedCall, Registers};
use unbroken_sys::bpf::DeadlineProgram;
use unbroken_sys::clock::monotonic_ns;
use unbroken_tracee::{HostTid, ProcessReading, Stopped, Tree};

const TIMEOUT_MS: u64 = 150;
const EINTR: i64 = libc::EINTR as i64;
const EAGAIN: i64 = libc::EAGAIN as i64;
const ETIMEDOUT: i64 = libc::ETIMEDOUT as i64;

/// Makes the call that `KIND` names, once for each line that it reads, with a timeout of so many
/// milliseconds as the line says. All calls go straight to the kernel.
const GUEST: &str = r#"
import ctypes,mmap,select,signal,socket,sys,time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGUSR2, lambda *_: None)
signal.siginterrupt(signal.SIGUSR2, False)
poller = select.epoll()
epoll = poller.fileno()
room = ctypes.create_string_buffer(1 << 20)
word = ctypes.c_int(0)
pair = ctypes.c_long * 2
left = pair(0, 0)
signals = ctypes.c_ulong(1 << (signal.SIGHUP - 1))
listener = socket.create_server(('127.0.0.1', 0))
near = socket.create_connection(listener.getsockname())
far, _ = listener.accept()
full, unread = socket.socketpair()
def machine_code(code):
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    return page, function(ctypes.addressof(ctypes.c_char.from_buffer(page)))
# mov r10, rcx; mov eax, SYS_epoll_wait; syscall; mov rax, r10 (or rcx); ret
prologue = b'\x49\x89\xca\xb8\xe8\0\0\0\x0f\x05'
r10_page, r10_after = machine_code(prologue + b'\x4c\x89\xd0\xc3')
rcx_page, rcx_after = machine_code(prologue + b'\x48\x89\xc8\xc3')
rcx_expected = ctypes.addressof(ctypes.c_char.from_buffer(rcx_page)) + len(prologue)
def timeouts(ms):
    value = ms // 1000, ms % 1000 * 1000
    for one in (near, listener, full):
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            one.setsockopt(socket.SOL_SOCKET, option, bytes(pair(*value)))
def fill():
    full.setblocking(False)
    try:
        while True: full.send(bytes(1 << 16))
    except BlockingIOError: pass
    full.setblocking(True)
def absolute(ns):
    at = time.monotonic_ns() + ns
    return pair(at // 10**9, at % 10**9)
call = libc.syscall
calls = {
    'epoll_wait': lambda ms, ts: call(232, epoll, room, 1, ms),
    'epoll_pwait': lambda ms, ts: call(281, epoll, room, 1, ms, None, 8),
    'epoll_pwait2': lambda ms, ts: call(441, epoll, room, 1, ts, None, 8),
    'r10 after': lambda ms, ts: r10_after(epoll, ctypes.addressof(room), 1, ms) - ms,
    'rcx after': lambda ms, ts: rcx_after(epoll, ctypes.addressof(room), 1, ms) - rcx_expected,
    'rt_sigtimedwait': lambda ms, ts: call(128, ctypes.byref(signals), None, ts, 8),
    'poll': lambda ms, ts: call(7, None, 0, ms),
    'ppoll': lambda ms, ts: call(271, None, 0, ts, None, 8),
    'select': lambda ms, ts: call(23, 0, None, None, None, pair(ts[0], ts[1] // 1000)),
    'pselect6': lambda ms, ts: call(270, 0, None, None, None, ts, None),
    'nanosleep': lambda ms, ts: call(35, ts, None),
    'nanosleep with rest': lambda ms, ts: call(35, ts, left),
    'nanosleep in place': lambda ms, ts: call(35, ts, ts),
    'clock_nanosleep': lambda ms, ts: call(230, 1, 0, ts, None),
    'clock_nanosleep until': lambda ms, ts: call(230, 1, 1, absolute(ms * 10**6), None),
    'futex': lambda ms, ts: call(202, ctypes.byref(word), 128, 0, ts),
    'futex until': lambda ms, ts: call(202, ctypes.byref(word), 137, 0, absolute(ms * 10**6), None, -1),
    'recv': lambda ms, ts: call(45, near.fileno(), room, 1, 0, None, None),
    'read': lambda ms, ts: call(0, near.fileno(), room, 1),
    'accept': lambda ms, ts: call(43, listener.fileno(), None, None),
    'send': lambda ms, ts: call(44, full.fileno(), room, 1, 0, None, 0),
}
sticky = 'KIND'.startswith('sticky ')
if sticky: call(135, 0x4000000)
make = calls['KIND'.removeprefix('sticky ')]
if 'KIND' == 'send': fill()
print('ready')
for line in sys.stdin:
    ms = int(line)
    timeouts(ms)
    ts = pair(ms // 1000, ms % 1000 * 10**6)
    ctypes.set_errno(0)
    start = time.monotonic()
    result = make(ms, ts)
    elapsed = time.monotonic() - start
    print('returned', result, ctypes.get_errno() if result < 0 else 0, elapsed * 1000)
"#;

/// Every kind of call, its number, and what it returns when its time is over (an errno when it is
/// not 0).
const KINDS: &[(&str, i64, i64)] = &[
    ("epoll_wait", libc::SYS_epoll_wait, 0),
    ("epoll_pwait", libc::SYS_epoll_pwait, 0),
    ("epoll_pwait2", libc::SYS_epoll_pwait2, 0),
    ("r10 after", libc::SYS_epoll_wait, 0),
    ("rcx after", libc::SYS_epoll_wait, 0),
    ("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, EAGAIN),
    ("poll", libc::SYS_poll, 0),
    ("ppoll", libc::SYS_ppoll, 0),
    ("select", libc::SYS_select, 0),
    ("pselect6", libc::SYS_pselect6, 0),
    ("sticky ppoll", libc::SYS_ppoll, 0),
    ("sticky select", libc::SYS_select, 0),
    ("sticky pselect6", libc::SYS_pselect6, 0),
    ("nanosleep", libc::SYS_nanosleep, 0),
    ("nanosleep with rest", libc::SYS_nanosleep, 0),
    ("nanosleep in place", libc::SYS_nanosleep, 0),
    ("clock_nanosleep", libc::SYS_clock_nanosleep, 0),
    ("clock_nanosleep until", libc::SYS_clock_nanosleep, 0),
    ("futex", libc::SYS_futex, ETIMEDOUT),
    ("futex until", libc::SYS_futex, ETIMEDOUT),
    ("recv", libc::SYS_recvfrom, EAGAIN),
    ("read", libc::SYS_read, EAGAIN),
    ("accept", libc::SYS_accept, EAGAIN),
    ("send", libc::SYS_sendto, EAGAIN),
];

/// The kinds, or those that the environment variable `KIND` names.
fn kinds() -> impl Iterator<Item = (&'static str, i64, i64)> {
    let only = std::env::var("KIND").ok();
    let is_wanted = move |kind: &str| {
        only.as_ref()
            .is_none_or(|only| kind.contains(only.as_str()))
    };
    KINDS
        .iter()
        .copied()
        .filter(move |(kind, ..)| is_wanted(kind))
}

/// What a call of the guest came to.
#[derive(Debug)]
struct Returned {
    errno: i64,
    result: i64,
    elapsed_ms: f64,
}

struct Waiter {
    guest: Guest,
    tree: Tree,
    tid: HostTid,
    number: i64,
    random: u64,
}

impl Waiter {
    fn start(kind: &str, number: i64) -> Waiter {
        let guest = python(&GUEST.replace("KIND", kind));
        let tid = HostTid(guest.pid());
        let tree = seize(tid);
        Waiter {
            guest,
            tree,
            tid,
            number,
            random: 0x9e37_79b9_7f4a_7c15 ^ tid.0 as u64,
        }
    }

    /// A pause of up to six milliseconds.
    fn pause(&mut self) {
        self.random = self
            .random
            .rotate_left(13)
            .wrapping_mul(0x2545_f491_4f6c_dd1d)
            ^ 1;
        std::thread::sleep(Duration::from_micros(self.random % 6000));
    }

    /// Has the guest make its call; `disturb` is called again and again meanwhile, with how often
    /// it was called before.
    fn call(&mut self, timeout_ms: u64, mut disturb: impl FnMut(&mut Waiter, u64)) -> Returned {
        let stdin = self.guest.stdin.as_mut().unwrap();
        writeln!(stdin, "{timeout_ms}").unwrap();
        // The reader lends the guest's output for as long as the call lasts.
        let nothing = std::io::BufReader::new(self.guest.child.stdout.take().unwrap_or_else(spare));
        let mut output = std::mem::replace(&mut self.guest.stdout, nothing);
        let (sender, receiver) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            std::io::BufRead::read_line(&mut output, &mut line).unwrap();
            sender.send(line).unwrap();
            output
        });
        let arrived = || match receiver.try_recv() {
            Ok(line) => Some(line),
            Err(mpsc::TryRecvError::Empty) => None,
            Err(error) => panic!("{error}"),
        };
        while !self.is_in_call() {
            while self.tree.poll().unwrap().is_some() {}
            if let Some(line) = arrived() {
                panic!("it never waited: {line}");
            }
        }
        let mut round = 0;
        let line = loop {
            if let Some(line) = arrived() {
                break line;
            }
            disturb(self, round);
            while self.tree.poll().unwrap().is_some() {}
            self.pause();
            round += 1;
        };
        self.guest.stdout = reader.join().unwrap();
        let fields: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(fields[0], "returned", "{line}");
        Returned {
            result: fields[1].parse().unwrap(),
            errno: fields[2].parse().unwrap(),
            elapsed_ms: fields[3].parse().unwrap(),
        }
    }

    fn is_in_call(&self) -> bool {
        let text = std::fs::read_to_string(format!("/proc/{}/syscall", self.tid)).unwrap();
        text.split_whitespace().next() == Some(&self.number.to_string())
    }

    fn stop_and_go(&mut self) {
        self.tree.stop().unwrap().resume().unwrap();
    }

    /// When a replica would be told that the call ends, if it has not.
    fn deadline_ns(&mut self) -> Option<u64> {
        let stopped = self.tree.stop().unwrap();
        let (_, call) = image_registers(&stopped, self.tid);
        stopped.resume().unwrap();
        call?.deadline_ns
    }

    /// Ends the call as a takeover does, and makes it as a replica does.
    fn move_on(&mut self) {
        let mut stopped = self.tree.stop().unwrap();
        let (registers, call) = image_registers(&stopped, self.tid);
        // Whatever the kernel noted of the call, the replica does not have it.
        let none = Registers {
            orig_rax: u64::MAX,
            ..registers
        };
        stopped.set_registers(self.tid, &none).unwrap();
        stopped
            .set_image_registers(self.tid, &registers, call)
            .unwrap();
        stopped.resume().unwrap();
    }
}

fn image_registers(stopped: &Stopped<'_>, tid: HostTid) -> (Registers, Option<BlockedCall>) {
    let mut reading = ProcessReading::default();
    let (process, _) = stopped.thread(tid).unwrap();
    stopped.read_process(process.pid, &mut reading).unwrap();
    let mut threads = reading.threads.iter();
    let thread = threads.find(|thread| thread.host_tid == tid).unwrap();
    thread.image_registers(false)
}

fn seize(tid: HostTid) -> Tree {
    let mut tree = Tree::seize(&[tid.0], true).unwrap();
    tree.stop().unwrap().install_blob(tid).unwrap();
    tree
}

/// A pipe's end that nobody writes to.
fn spare() -> std::process::ChildStdout {
    let mut child = std::process::Command::new("true")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.stdout.take().unwrap();
    child.wait().unwrap();
    output
}

/// That a call waited as long as it was told and returned what it does when its time is over.
fn assert_timed_out(kind: &str, expected: i64, returned: &Returned) {
    assert_ended(kind, expected, returned, 1.5);
}

fn assert_ended(kind: &str, expected: i64, returned: &Returned, times_over: f64) {
    assert_eq!(returned.errno, expected, "{kind}: {returned:?}");
    if expected == 0 {
        assert_eq!(returned.result, 0, "{kind}: {returned:?}");
    }
    let timeout_ms = TIMEOUT_MS as f64;
    assert!(returned.elapsed_ms >= timeout_ms, "{kind}: {returned:?}");
    // A busy machine is slow; a timeout that began anew at each stop would never end.
    let longest_ms = times_over * timeout_ms + 2000.0;
    assert!(returned.elapsed_ms <= longest_ms, "{kind}: {returned:?}");
}

#[test]
fn no_call_notices_that_it_is_stopped() {
    for (kind, number, expected) in kinds() {
        let mut waiter = Waiter::start(kind, number);
        for _ in 0..3 {
            let mut stops = 0;
            let returned = waiter.call(TIMEOUT_MS, |waiter, _| {
                waiter.stop_and_go();
                stops += 1;
            });
            assert!(stops > 5, "{kind}: {stops} stops");
            assert_timed_out(kind, expected, &returned);
        }
    }
}

#[test]
fn no_call_notices_that_it_moves() {
    for (kind, number, expected) in kinds() {
        let mut waiter = Waiter::start(kind, number);
        for moves_at in [0, 3, 9] {
            let returned = waiter.call(TIMEOUT_MS, |waiter, round| {
                if round == moves_at {
                    waiter.move_on();
                } else {
                    waiter.stop_and_go();
                }
            });
            assert_timed_out(kind, expected, &returned);
        }
    }
}

/// When a call began to wait is not known before its first stop, but when it ends.
#[test]
fn a_wait_that_nobody_saw_begin_ends_when_it_should() {
    const LONGER_MS: u64 = 4 * TIMEOUT_MS;
    let is_of_socket = |expected, number| expected == EAGAIN && number != libc::SYS_rt_sigtimedwait;
    for (kind, number, expected) in kinds() {
        if kind.ends_with("until") || is_of_socket(expected, number) {
            continue;
        }
        let mut waiter = Waiter::start(kind, number);
        let program = DeadlineProgram::load(waiter.tid.0).unwrap();
        waiter.tree.see_deadlines(program);
        // On a busy machine a call may be over before it is stopped.
        let deadline = (0..20).find_map(|_| {
            let (before_ns, mut found) = (monotonic_ns(), None);
            waiter.call(LONGER_MS, |waiter, round| {
                if round == 0 {
                    let after_ns = monotonic_ns();
                    waiter.pause();
                    found = waiter.deadline_ns().map(|deadline| (after_ns, deadline));
                }
            });
            found.map(|(after_ns, deadline_ns)| (before_ns..=after_ns, deadline_ns))
        });
        let (when, deadline_ns) = deadline.unwrap_or_else(|| panic!("{kind}: never stopped"));
        let began_ns = deadline_ns - LONGER_MS * 1_000_000;
        assert!(
            when.contains(&began_ns),
            "{kind}: {began_ns} not in {when:?}"
        );
    }
}

/// With a handler every one of these calls is interrupted, whatever SA_RESTART says (signal(7)).
#[test]
fn a_handler_interrupts_every_call() {
    for (kind, number, _) in kinds() {
        if kind.ends_with("after") {
            continue;
        }
        let mut waiter = Waiter::start(kind, number);
        for signal in [libc::SIGUSR1, libc::SIGUSR2] {
            for (comes_at, while_stopped) in [(0, true), (4, true), (4, false)] {
                let returned = waiter.call(20_000, |waiter, round| {
                    let pid = waiter.tid.0;
                    let send = || unbroken_sys::signal::to_process(pid, signal).unwrap();
                    let stopped = waiter.tree.stop().unwrap();
                    if round == comes_at && while_stopped {
                        send();
                    }
                    stopped.resume().unwrap();
                    if round == comes_at && !while_stopped {
                        send();
                    }
                });
                assert_eq!(returned.errno, EINTR, "{kind}, {signal}: {returned:?}");
                assert!(returned.elapsed_ms < 10_000.0, "{kind}: {returned:?}");
            }
        }
    }
}

/// Signals that the program ignores, or that do nothing, are nothing to its calls.
#[test]
fn an_ignored_signal_interrupts_no_call() {
    for (kind, number, expected) in kinds() {
        let mut waiter = Waiter::start(kind, number);
        let returned = waiter.call(TIMEOUT_MS, |waiter, round| {
            unbroken_sys::signal::to_process(waiter.tid.0, libc::SIGWINCH).unwrap();
            if round % 3 == 1 {
                waiter.stop_and_go();
            }
        });
        assert_timed_out(kind, expected, &returned);
    }
}

/// A tracer leaves calls in slots behind, where the next one finds them. It does not know their
/// deadlines; each may get its time once more.
#[test]
fn no_call_notices_another_tracer() {
    for (kind, number, expected) in kinds() {
        let mut waiter = Waiter::start(kind, number);
        for changes_at in [1, 6] {
            let returned = waiter.call(TIMEOUT_MS, |waiter, round| {
                if round == changes_at {
                    let_go(waiter.tree.stop().unwrap());
                    waiter.tree = seize(waiter.tid);
                } else {
                    waiter.stop_and_go();
                }
            });
            assert_ended(kind, expected, &returned, 2.5);
        }
    }
}
