//! A service that waits in every way there is, stopped for every answer that it gives and killed
//! again and again: no wait may show it.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use unbroken_harness::{KillPlan, Launch, PATIENCE, Service, Target};
use unbroken_scenarios::{PORT, host};

/// The one in PATH may be a script that starts others.
const PYTHON: &str = "/usr/bin/python3";
const TIMEOUT_MS: u32 = 300;
/// What a busy machine and a takeover may add. A timeout that began anew at each stop would not end
/// while answers are asked for.
const SLACK_MS: f64 = 2500.0;

/// A thread for each kind of call makes it again and again, straight into the kernel, and keeps
/// count of what came of it. A line from a client is answered with all counts.
const PROGRAM: &str = r#"
import ctypes,json,select,signal,socket,sys,threading,time
libc = ctypes.CDLL(None, use_errno=True)
call = libc.syscall
call.restype = ctypes.c_long
pair = ctypes.c_long * 2
MS = int(sys.argv[2])
EAGAIN, ETIMEDOUT = 11, 110
room = ctypes.create_string_buffer(4096)
def time_left():
    return pair(MS // 1000, MS % 1000 * 10**6)
def microseconds_left():
    return pair(MS // 1000, MS % 1000 * 1000)
def until():
    at = time.monotonic_ns() + MS * 10**6
    return pair(at // 10**9, at % 10**9)
def limited(one):
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        one.setsockopt(socket.SOL_SOCKET, option, bytes(microseconds_left()))
    return one
pollers = [select.epoll() for _ in range(3)]
fds = [poller.fileno() for poller in pollers]
words = [ctypes.c_int(0) for _ in range(2)]
hangup = ctypes.c_ulong(1)
listener = limited(socket.create_server(('127.0.0.1', 0)))
near = socket.create_connection(listener.getsockname())
far, _ = listener.accept()
limited(near)
full, unread = socket.socketpair()
full.setblocking(False)
try:
    while True: full.send(bytes(1 << 16))
except BlockingIOError: pass
full.setblocking(True)
limited(full)
kinds = {
    'epoll_wait': (0, lambda: call(232, fds[0], room, 1, MS)),
    'epoll_pwait': (0, lambda: call(281, fds[1], room, 1, MS, None, 8)),
    'epoll_pwait2': (0, lambda: call(441, fds[2], room, 1, time_left(), None, 8)),
    'rt_sigtimedwait': (EAGAIN, lambda: call(128, ctypes.byref(hangup), None, time_left(), 8)),
    'poll': (0, lambda: call(7, None, 0, MS)),
    'ppoll': (0, lambda: call(271, None, 0, time_left(), None, 8)),
    'select': (0, lambda: call(23, 0, None, None, None, microseconds_left())),
    'pselect6': (0, lambda: call(270, 0, None, None, None, time_left(), None)),
    'nanosleep': (0, lambda: call(35, time_left(), None)),
    'nanosleep with rest': (0, lambda: call(35, time_left(), pair())),
    'clock_nanosleep': (0, lambda: call(230, 1, 0, time_left(), None)),
    'clock_nanosleep until': (0, lambda: call(230, 1, 1, until(), None)),
    'futex': (ETIMEDOUT, lambda: call(202, ctypes.byref(words[0]), 128, 0, time_left())),
    'futex until': (ETIMEDOUT, lambda: call(202, ctypes.byref(words[1]), 137, 0, until(), None, -1)),
    'recv': (EAGAIN, lambda: call(45, near.fileno(), room, 1, 0, None, None)),
    'accept': (EAGAIN, lambda: call(43, listener.fileno(), None, None)),
    'send': (EAGAIN, lambda: call(44, full.fileno(), room, 1, 0, None, 0)),
}
record = {}
def wait_for_ever(kind, expected, make):
    mine = record[kind] = {'waits': 0, 'least_ms': 1e9, 'most_ms': 0, 'wrong': []}
    while True:
        ctypes.set_errno(0)
        start = time.monotonic()
        result = make()
        elapsed = (time.monotonic() - start) * 1000
        errno = ctypes.get_errno() if result < 0 else 0
        if errno != expected or result > 0: mine['wrong'].append([result, errno, elapsed])
        mine['least_ms'] = min(mine['least_ms'], elapsed)
        mine['most_ms'] = max(mine['most_ms'], elapsed)
        mine['waits'] += 1
for kind, (expected, make) in kinds.items():
    threading.Thread(target=wait_for_ever, args=(kind, expected, make), daemon=True).start()
server = socket.create_server(('0.0.0.0', int(sys.argv[1])))
while True:
    client, _ = server.accept()
    with client, client.makefile('rw') as lines:
        for line in lines:
            lines.write(json.dumps(record) + '\n')
            lines.flush()
"#;

struct Counts(TcpStream, BufReader<TcpStream>);

impl Counts {
    fn of(address: SocketAddr) -> Result<Counts> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let reader = BufReader::new(stream.try_clone()?);
        Ok(Counts(stream, reader))
    }

    fn ask(&mut self) -> Result<Value> {
        self.0.write_all(b"?\n")?;
        let mut line = String::new();
        self.1.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("the answer {line:?}"))
    }
}

fn start(timeout_ms: u32) -> Result<Service> {
    let (port, timeout_ms) = (PORT.to_string(), timeout_ms.to_string());
    let command = [PYTHON, "-u", "-c", PROGRAM, &port, &timeout_ms].map(String::from);
    Service::start(&Launch::new("blocked", command.to_vec()))
}

/// Waits that are first stopped when most of their time is over, and then move.
#[test]
fn a_long_wait_that_was_hardly_disturbed_ends_in_time() -> Result<()> {
    const LONG_MS: u32 = 4000;
    /// Where a wait that begins anew when it is stopped would last 1.75 times as long.
    const TIMES: f64 = 1.4;
    let mut random = host()?;
    let service = start(LONG_MS)?;
    let mut counts = Counts::of(service.listening(PORT)?)?;
    let long_ms = f64::from(LONG_MS);
    for kills in [0, 1, 1] {
        std::thread::sleep(std::time::Duration::from_millis(3000));
        counts.ask()?;
        service.kill_repeatedly(&KillPlan::new(Target::Service, kills), &mut random, |_| {})?;
        std::thread::sleep(std::time::Duration::from_millis(1500));
    }
    let after = counts.ask()?;
    println!("{after:#}");
    for (kind, count) in after.as_object().context("counts")? {
        // Of SO_SNDTIMEO it is not known what was left.
        let times = if kind == "send" { 2.0 } else { TIMES };
        let [waits, least, most] =
            ["waits", "least_ms", "most_ms"].map(|name| count[name].as_f64().unwrap_or(0.0));
        ensure!(waits >= 2.0 && least >= long_ms, "{kind}: {count}");
        ensure!(most <= times * long_ms, "{kind} went on: {count}");
    }
    service.stop()?;
    Ok(())
}

#[test]
fn no_wait_shows_a_stop_or_a_takeover() -> Result<()> {
    const KILLS: usize = 4;
    let mut random = host()?;
    let service = start(TIMEOUT_MS)?;
    let mut counts = Counts::of(service.listening(PORT)?)?;
    let before = counts.ask()?;
    let plan = KillPlan::new(Target::Service, KILLS);
    let done = AtomicBool::new(false);
    let (asked, kills) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<u64> {
            let mut asked = 0;
            while !done.load(Ordering::Relaxed) {
                counts.ask()?;
                asked += 1;
            }
            Ok(asked)
        });
        let kills = service.kill_repeatedly(&plan, &mut random, |_| {});
        // A last while of stops without kills.
        std::thread::sleep(std::time::Duration::from_secs(2));
        done.store(true, Ordering::Relaxed);
        (asking.join(), kills)
    });
    let kills = kills?;
    let asked = asked.map_err(|_| anyhow::anyhow!("the asking thread panicked"))??;
    let after = Counts::ask(&mut counts)?;
    println!("{asked} answers, {} kills: {after:#}", kills.len());
    ensure!(kills.len() == KILLS && asked > 100, "{asked} answers");
    let kinds = after.as_object().context("counts")?;
    ensure!(kinds.len() == 17, "{} kinds", kinds.len());
    for (kind, count) in kinds {
        let number = |count: &Value, name: &str| count[name].as_f64().unwrap_or(0.0);
        ensure!(
            count["wrong"] == Value::Array(Vec::new()),
            "{kind}: {count}"
        );
        let (least, most) = (number(count, "least_ms"), number(count, "most_ms"));
        let timeout_ms = f64::from(TIMEOUT_MS);
        ensure!(least >= timeout_ms, "{kind} ended early: {count}");
        ensure!(most <= timeout_ms + SLACK_MS, "{kind} went on: {count}");
        let waits = number(count, "waits") - number(&before[kind], "waits");
        ensure!(waits >= 3.0, "{kind} waited {waits} times");
    }
    service.stop()?;
    Ok(())
}
