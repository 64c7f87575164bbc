//! Requests and answers over many connections at once, from one thread: each answer is known to
//! the byte, and how long it took is counted.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::{Connection, Poller};
use crate::running::{ClientError, PATIENCE, Running, Stop};
use crate::tally::{Tally, Timeline};

const NAME: &str = "requests";
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// So many ask at once before the load begins: it is to find a server at rest.
const FIRST_AT_ONCE: usize = 100;

/// What is asked for. Each connection asks for things of its own, numbered from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// So many bytes, which come back: [`crate::serve`] echo servers.
    Echo(usize),
    /// Stores a value of so many bytes in memcached.
    MemcachedSet(usize),
    /// Reads back what the first [`Kind::MemcachedSet`] of this connection would have stored; it
    /// is stored before the load begins.
    MemcachedGet(usize),
    /// Stores a value of so many bytes in a redis server.
    RedisSet(usize),
}

/// How a load of requests behaves.
#[derive(Debug, Clone)]
pub struct Options {
    pub kind: Kind,
    /// Connections that are open.
    pub connections: usize,
    /// How many of them ask; the others are used once, at the end, to see that they live.
    pub active: usize,
    /// All together; `None`: each asks again as soon as it has its answer.
    pub rate_per_s: Option<f64>,
}

/// Starts the requests. Returns when every connection is open and was answered once.
pub fn start(address: SocketAddr, options: &Options) -> Result<Running, ClientError> {
    let mut running = Running::new(NAME);
    let failed = |cause| ClientError::Connect { address, cause };
    let mut crowd =
        Crowd::connect(address, options, Arc::clone(running.tally())).map_err(failed)?;
    crowd.ask_all().map_err(failed)?;
    running.spawn(move |_, stop| crowd.work(&stop))?;
    Ok(running)
}

struct Asker {
    connection: Option<Connection>,
    number: u64,
    /// The answer that is waited for, and when it was due to be asked for.
    awaited: Option<(Vec<u8>, Instant)>,
    next_at: Instant,
    /// The socket did not take all of the question.
    is_stuck: bool,
    timeline: Timeline,
}

struct Crowd {
    options: Options,
    tally: Arc<Tally>,
    askers: Vec<Asker>,
    poller: Poller,
    ready: Vec<usize>,
    /// Those that have their answer.
    free: Vec<usize>,
}

impl Crowd {
    fn connect(address: SocketAddr, options: &Options, tally: Arc<Tally>) -> io::Result<Self> {
        let now = Instant::now();
        let poller = Poller::new()?;
        let mut askers = Vec::with_capacity(options.connections);
        for index in 0..options.connections {
            let connection = Connection::open(address, PATIENCE)?;
            poller.add(&connection, index)?;
            askers.push(Asker {
                connection: Some(connection),
                number: 0,
                awaited: None,
                next_at: now,
                is_stuck: false,
                timeline: Timeline::default(),
            });
        }
        Ok(Self {
            options: options.clone(),
            tally,
            askers,
            poller,
            ready: Vec::new(),
            free: Vec::new(),
        })
    }

    /// One request and its answer on every connection.
    fn ask_all(&mut self) -> io::Result<()> {
        let first = match self.options.kind {
            Kind::MemcachedGet(bytes) => Kind::MemcachedSet(bytes),
            other => other,
        };
        let everyone = self.askers.len();
        for first_index in (0..everyone).step_by(FIRST_AT_ONCE) {
            let some = first_index..everyone.min(first_index + FIRST_AT_ONCE);
            let deadline = Instant::now() + PATIENCE;
            for index in some.clone() {
                self.ask(index, first, Instant::now());
            }
            while self.askers[some.clone()].iter().any(Asker::is_waiting) {
                self.turn(LOOK_EVERY);
                if Instant::now() > deadline {
                    let waiting = self.askers[some].iter().filter(|a| a.is_waiting()).count();
                    let why = format!("{waiting} of {everyone} connections got no answer");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
            }
        }
        let totals = self.tally.snapshot();
        if totals.is_clean() {
            return Ok(());
        }
        Err(io::Error::other(totals.failures.join("; ")))
    }

    fn work(mut self, stop: &Stop) -> Vec<Timeline> {
        let active = self.options.active.min(self.askers.len());
        let period = self
            .options
            .rate_per_s
            .map(|rate| Duration::from_secs_f64(active as f64 / rate));
        let start = Instant::now();
        for (index, asker) in (0..).zip(&mut self.askers[..active]) {
            asker.next_at = start + period.unwrap_or_default() * index / active as u32;
        }
        drop(self.tally.take_latency_ns());
        self.free = (0..active).collect();
        while !stop.asked() {
            let wait = match period {
                Some(period) => self.ask_due(active, period),
                None => self.ask_free(active),
            };
            self.turn(wait);
        }
        let deadline = Instant::now() + PATIENCE;
        while self.askers.iter().any(Asker::is_waiting) && Instant::now() < deadline {
            self.turn(LOOK_EVERY);
        }
        if let Err(cause) = self.ask_all() {
            self.tally
                .add_reconnect(|| format!("after the load: {cause}"));
        }
        let used = self.askers.into_iter().take(active);
        used.map(|asker| asker.timeline).collect()
    }

    /// Has those that have their answer ask again.
    fn ask_free(&mut self, active: usize) -> Duration {
        let mut free = std::mem::take(&mut self.free);
        for index in free.drain(..) {
            if index < active {
                self.ask(index, self.options.kind, Instant::now());
            }
        }
        self.free = free;
        LOOK_EVERY
    }

    /// Asks what is due; returns how long nothing is.
    fn ask_due(&mut self, active: usize, period: Duration) -> Duration {
        self.free.clear();
        let now = Instant::now();
        let mut next_at = now + LOOK_EVERY;
        for index in 0..active {
            let asker = &mut self.askers[index];
            if asker.connection.is_none() || asker.awaited.is_some() {
                continue;
            }
            if asker.next_at > now {
                next_at = next_at.min(asker.next_at);
                continue;
            }
            // Where answers come late the next question is late too: its time counts from when
            // it was due, or slowness would hide itself.
            let due_at = asker.next_at;
            asker.next_at += period;
            self.ask(index, self.options.kind, due_at);
        }
        next_at.saturating_duration_since(now)
    }

    fn ask(&mut self, index: usize, kind: Kind, due_at: Instant) {
        let asker = &mut self.askers[index];
        let Some(connection) = &mut asker.connection else {
            return;
        };
        let (request, answer) = exchange(kind, index, asker.number);
        asker.number += 1;
        asker.awaited = Some((answer, due_at));
        connection.queue(&request);
        self.tally.add_sent(1);
        if let Err(cause) = self.send_some(index) {
            self.broke(index, &cause);
        }
    }

    fn send_some(&mut self, index: usize) -> io::Result<()> {
        let asker = &mut self.askers[index];
        let Some(connection) = &mut asker.connection else {
            return Ok(());
        };
        connection.write_some()?;
        let is_stuck = connection.unsent_bytes() > 0;
        if is_stuck != asker.is_stuck {
            asker.is_stuck = is_stuck;
            self.poller.watch_writing(connection, index)?;
        }
        Ok(())
    }

    /// Sends and receives what is ready.
    fn turn(&mut self, timeout: Duration) {
        let mut ready = std::mem::take(&mut self.ready);
        if self.poller.wait(timeout, &mut ready).is_ok() {
            for &index in &ready {
                if let Err(cause) = self.exchange_some(index) {
                    self.broke(index, &cause);
                }
            }
        }
        self.ready = ready;
    }

    fn exchange_some(&mut self, index: usize) -> io::Result<()> {
        if self.askers[index].is_stuck {
            self.send_some(index)?;
        }
        let asker = &mut self.askers[index];
        let Some(connection) = &mut asker.connection else {
            return Ok(());
        };
        let outcome = connection.read_some();
        let arrived = connection.waiting();
        match &asker.awaited {
            Some((answer, due_at)) if arrived.len() >= answer.len() => {
                if arrived == answer {
                    self.tally.add_latency(due_at.elapsed());
                    self.tally.add_received(1);
                    asker.timeline.heard(&self.tally);
                } else {
                    let shown = String::from_utf8_lossy(&arrived[..arrived.len().min(80)]);
                    let what = || format!("connection {index}: answered {shown:?}");
                    self.tally.add_damaged(1, what);
                }
                drop(connection.take_bytes());
                asker.awaited = None;
                self.free.push(index);
            }
            None if !arrived.is_empty() => {
                let count = arrived.len();
                drop(connection.take_bytes());
                let what = || format!("connection {index}: {count} bytes that nobody asked for");
                self.tally.add_doubled(1, what);
            }
            _ => {}
        }
        outcome.map(drop)
    }

    fn broke(&mut self, index: usize, cause: &io::Error) {
        let asker = &mut self.askers[index];
        asker.connection = None;
        asker.awaited = None;
        self.tally
            .add_reconnect(|| format!("connection {index}: {cause}"));
    }
}

impl Asker {
    fn is_waiting(&self) -> bool {
        self.awaited.is_some()
    }
}

/// A request and its whole answer.
fn exchange(kind: Kind, connection: usize, number: u64) -> (Vec<u8>, Vec<u8>) {
    match kind {
        Kind::Echo(bytes) => {
            let mut line = format!("{number:0width$}", width = bytes.max(2) - 1).into_bytes();
            line.push(b'\n');
            (line.clone(), line)
        }
        Kind::MemcachedSet(bytes) => {
            let value = value(connection, bytes);
            let request = format!("set key:{connection} 0 0 {bytes}\r\n{value}\r\n");
            (request.into_bytes(), b"STORED\r\n".to_vec())
        }
        Kind::RedisSet(bytes) => {
            let (key, value) = (format!("key:{connection}"), value(connection, bytes));
            let key_bytes = key.len();
            let request =
                format!("*3\r\n$3\r\nSET\r\n${key_bytes}\r\n{key}\r\n${bytes}\r\n{value}\r\n");
            (request.into_bytes(), b"+OK\r\n".to_vec())
        }
        Kind::MemcachedGet(bytes) => {
            let value = value(connection, bytes);
            let request = format!("get key:{connection}\r\n").into_bytes();
            let answer = format!("VALUE key:{connection} 0 {bytes}\r\n{value}\r\nEND\r\n");
            (request, answer.into_bytes())
        }
    }
}

fn value(connection: usize, bytes: usize) -> String {
    format!("{connection:0bytes$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_what_was_asked_for() {
        let (request, answer) = exchange(Kind::Echo(64), 0, 7);
        assert_eq!((request.len(), request == answer), (64, true));
        let (request, _) = exchange(Kind::MemcachedSet(10), 3, 0);
        assert_eq!(request, b"set key:3 0 0 10\r\n0000000003\r\n");
        let (_, answer) = exchange(Kind::MemcachedGet(10), 3, 0);
        assert_eq!(answer, b"VALUE key:3 0 10\r\n0000000003\r\nEND\r\n");
    }
}
