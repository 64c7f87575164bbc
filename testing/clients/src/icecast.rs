//! One source and several listeners of a streaming server: what each listener gets must be byte
//! for byte one contiguous run of what the source sent.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::{Connection, wait};
use crate::content::{Break, Content, RunChecker};
use crate::running::{ClientError, PATIENCE, Running, Stop};
use crate::tally::{Tally, Timeline};

const NAME: &str = "icecast";
/// base64 of `source:secret`; `config` writes the same password into the server's configuration.
const CREDENTIALS: &str = "c291cmNlOnNlY3JldA==";
const MOUNT: &str = "/live";
/// The server passes an MPEG stream on in blocks of this many bytes and keeps an unfinished block
/// back, so the source ends on a whole one (format_mp3.c, REFBUF_SIZE).
const BLOCK_BYTES: u64 = 1400;
/// The source may run this far ahead of the socket, so that a stall is followed by a catch-up.
const UNSENT_LIMIT_BYTES: usize = 256 * 1024;

/// How a stream behaves.
#[derive(Debug, Clone)]
pub struct Options {
    pub listeners: usize,
    /// Bytes a second that the source sends; `None`: as fast as the server takes them, but never
    /// further ahead of the slowest listener than the server's own queue allows.
    pub rate_bytes_per_s: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listeners: 10,
            rate_bytes_per_s: Some(320_000 / 8),
        }
    }
}

/// Starts a source and its listeners. Returns when every listener has received stream bytes.
pub fn start(address: SocketAddr, options: &Options) -> Result<Running, ClientError> {
    let mut running = Running::new(NAME);
    let mut cast = Cast::connect(address, options, Arc::clone(running.tally()))?;
    cast.gather()?;
    running.spawn(move |_, stop| cast.stream(&stop))?;
    Ok(running)
}

struct Listener {
    connection: Option<Connection>,
    checker: RunChecker,
    in_body: bool,
    timeline: Timeline,
}

struct Cast {
    address: SocketAddr,
    rate_bytes_per_s: Option<u64>,
    tally: Arc<Tally>,
    content: Content,
    source: Option<Connection>,
    sent_bytes: u64,
    started: Instant,
    listeners: Vec<Listener>,
}

impl Cast {
    fn connect(
        address: SocketAddr,
        options: &Options,
        tally: Arc<Tally>,
    ) -> Result<Self, ClientError> {
        let mut cast = Self {
            address,
            rate_bytes_per_s: options.rate_bytes_per_s,
            tally,
            content: Content::new(1),
            source: None,
            sent_bytes: 0,
            started: Instant::now(),
            listeners: Vec::new(),
        };
        let mut source = cast.open()?;
        source.queue(
            format!(
                "SOURCE {MOUNT} HTTP/1.0\r\nAuthorization: Basic {CREDENTIALS}\r\n\
                 Content-Type: audio/mpeg\r\nice-name: unbroken\r\nice-public: 0\r\n\r\n"
            )
            .as_bytes(),
        );
        cast.read_header(&mut source)?;
        cast.source = Some(source);
        for _ in 0..options.listeners {
            let mut connection = cast.open()?;
            connection.queue(format!("GET {MOUNT} HTTP/1.0\r\n\r\n").as_bytes());
            // At once: while many connect, the first would wait longer for this than the server does.
            connection
                .write_some()
                .map_err(|cause| ClientError::Connect { address, cause })?;
            cast.listeners.push(Listener {
                connection: Some(connection),
                checker: RunChecker::anywhere(cast.content),
                in_body: false,
                timeline: Timeline::default(),
            });
        }
        Ok(cast)
    }

    fn open(&self) -> Result<Connection, ClientError> {
        Connection::open(self.address, PATIENCE).map_err(|cause| ClientError::Connect {
            address: self.address,
            cause,
        })
    }

    /// Waits for the server to take the source.
    fn read_header(&self, source: &mut Connection) -> Result<(), ClientError> {
        let refused = |why: String| ClientError::Refused {
            load: NAME,
            address: self.address,
            why,
        };
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            source
                .write_some()
                .map_err(|cause| refused(cause.to_string()))?;
            wait(&[Some(source)], Duration::from_millis(100))
                .and_then(|_| source.read_some())
                .map_err(|cause| refused(cause.to_string()))?;
            if let Some(end) = header_end(source.waiting()) {
                let header = String::from_utf8_lossy(&source.waiting()[..end]).into_owned();
                source.skip(end);
                let status = header.lines().next().unwrap_or_default();
                let taken = status.contains(" 200 ");
                return if taken {
                    Ok(())
                } else {
                    Err(refused(status.to_string()))
                };
            }
        }
        Err(refused("no answer to the source".into()))
    }

    /// Streams until every listener has received bytes.
    fn gather(&mut self) -> Result<(), ClientError> {
        // Only now: the time that connecting took is none in which anything was to be sent.
        self.started = Instant::now();
        let deadline = Instant::now() + PATIENCE;
        while self
            .listeners
            .iter()
            .any(|listener| listener.checker.position().is_none())
        {
            self.produce();
            self.turn(Duration::from_millis(10));
            let totals = self.tally.snapshot();
            if !totals.is_clean() || Instant::now() > deadline {
                let why = format!("not every listener hears the stream; {:?}", totals.failures);
                return Err(ClientError::Refused {
                    load: NAME,
                    address: self.address,
                    why,
                });
            }
        }
        Ok(())
    }

    /// Streams until told to stop, then waits until every listener has everything.
    fn stream(mut self, stop: &Stop) -> Vec<Timeline> {
        while !stop.asked() {
            self.produce();
            self.turn(Duration::from_millis(10));
        }
        self.end_on_a_block();
        let deadline = Instant::now() + PATIENCE;
        while self.is_behind() && Instant::now() < deadline {
            self.turn(Duration::from_millis(10));
        }
        self.count_missing_end();
        self.listeners
            .into_iter()
            .map(|listener| listener.timeline)
            .collect()
    }

    /// Queues what the source should have sent by now.
    fn produce(&mut self) {
        let unsent = self.source.as_ref().map_or(0, Connection::unsent_bytes);
        let room = UNSENT_LIMIT_BYTES.saturating_sub(unsent) as u64;
        let due = match self.rate_bytes_per_s {
            Some(rate) => {
                let target = (self.started.elapsed().as_secs_f64() * rate as f64) as u64;
                target.saturating_sub(self.sent_bytes)
            }
            None => {
                let slowest = self
                    .listeners
                    .iter()
                    .filter_map(|l| l.checker.position())
                    .min();
                let ahead = self.sent_bytes - slowest.unwrap_or(0);
                (UNSENT_LIMIT_BYTES as u64).saturating_sub(ahead)
            }
        };
        self.send(due.min(room));
    }

    fn send(&mut self, count: u64) {
        let Some(source) = &mut self.source else {
            return;
        };
        let mut bytes = vec![0; count as usize];
        self.content.fill(self.sent_bytes, &mut bytes);
        source.queue(&bytes);
        self.sent_bytes += count;
        self.tally.add_sent(count);
    }

    fn end_on_a_block(&mut self) {
        self.send(self.sent_bytes.next_multiple_of(BLOCK_BYTES) - self.sent_bytes);
    }

    fn turn(&mut self, timeout: Duration) {
        let mut connections = vec![&mut self.source];
        connections.extend(
            self.listeners
                .iter_mut()
                .map(|listener| &mut listener.connection),
        );
        for connection in connections {
            let written = connection.as_mut().map(Connection::write_some);
            if let Some(Err(cause)) = written {
                *connection = None;
                self.tally.add_reconnect(|| format!("sending: {cause}"));
            }
        }
        let mut polled = vec![self.source.as_ref()];
        polled.extend(
            self.listeners
                .iter()
                .map(|listener| listener.connection.as_ref()),
        );
        let readable = wait(&polled, timeout).unwrap_or_default();
        for (index, _) in readable
            .iter()
            .enumerate()
            .filter(|(_, readable)| **readable)
        {
            match index.checked_sub(1) {
                None => self.read_source(),
                Some(listener) => self.listeners[listener].read(listener, &self.tally),
            }
        }
    }

    /// The server says nothing more to a source that it took: anything is its end.
    fn read_source(&mut self) {
        let outcome = self.source.as_mut().map(Connection::read_some);
        if let Some(Err(cause)) = outcome {
            self.source = None;
            self.tally.add_reconnect(|| format!("source: {cause}"));
        }
    }

    fn is_behind(&self) -> bool {
        let behind = |listener: &Listener| {
            listener.connection.is_some() && listener.checker.position() < Some(self.sent_bytes)
        };
        self.listeners.iter().any(behind)
    }

    fn count_missing_end(&self) {
        for (index, listener) in self.listeners.iter().enumerate() {
            let missing = self.sent_bytes - listener.checker.position().unwrap_or(0);
            if missing > 0 {
                let what = || format!("listener {index} lacks the last {missing} bytes");
                self.tally.add_lost(missing, what);
            }
        }
    }
}

impl Listener {
    fn read(&mut self, index: usize, tally: &Tally) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let outcome = connection.read_some();
        if !self.in_body
            && let Some(end) = header_end(connection.waiting())
        {
            let header = String::from_utf8_lossy(&connection.waiting()[..end]).into_owned();
            connection.skip(end);
            self.in_body = true;
            let status = header.lines().next().unwrap_or_default();
            if !status.contains(" 200 ") {
                tally.add_damaged(1, || format!("listener {index} was answered {status:?}"));
            }
        }
        if self.in_body {
            let bytes = connection.take_bytes();
            if !bytes.is_empty() {
                self.timeline.heard(tally);
                tally.add_received(bytes.len() as u64);
                self.checker
                    .accept(&bytes, |broken| count_break(tally, index, &broken));
            }
        }
        if let Err(cause) = outcome {
            self.connection = None;
            tally.add_reconnect(|| format!("listener {index}: {cause}"));
        }
    }
}

pub(crate) fn count_break(tally: &Tally, index: usize, broken: &Break) {
    let what = || format!("receiver {index}: {broken:?}");
    match broken {
        Break::Missing { bytes, .. } => tally.add_lost(*bytes, what),
        Break::Repeated { bytes, .. } => tally.add_doubled(*bytes, what),
        Break::Damaged { bytes, .. } => tally.add_damaged(*bytes, what),
    }
}

/// Length of an HTTP header with its empty line, once all of it is there.
fn header_end(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .map(|start| start + 4)
}
