//! A swarm of chat clients in one channel, each of which must hear every numbered message of every
//! other, exactly once and in order, on one connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::connection::{Connection, wait};
use crate::running::{ClientError, PATIENCE, Running, Stop};
use crate::sequence::{Arrival, Sequence};
use crate::tally::{Tally, Timeline};

const NAME: &str = "irc";
const CHANNEL: &str = "#unbroken";
/// A client whose connection broke tries again this often.
const RECONNECT_EVERY: Duration = Duration::from_millis(100);

/// Messages of each client that are kept as they were said.
const SAID_KEPT: usize = 32;
/// More than any swarm says; times its clients it is still a number.
const UNHEARD_UNLIMITED: u64 = u32::MAX as u64;
/// Longest wait before the swarm looks whether it is to talk differently, or to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How a swarm behaves.
#[derive(Debug, Clone)]
pub struct Options {
    pub clients: usize,
    /// Messages a second that each client sends.
    pub rate_per_s: f64,
    /// Length of each message's text in bytes, at most 400 (a line of the protocol has 512).
    pub message_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clients: 20,
            rate_per_s: 10.0,
            message_bytes: 80,
        }
    }
}

/// Starts a swarm. Returns when every client stands in the channel and has begun to talk.
pub fn start(address: SocketAddr, options: &Options) -> Result<Running, ClientError> {
    start_paced(address, options).map(|(running, _)| running)
}

/// Starts a swarm whose pace can be changed while it talks.
pub fn start_paced(
    address: SocketAddr,
    options: &Options,
) -> Result<(Running, Arc<Pace>), ClientError> {
    let mut running = Running::new(NAME);
    let pace = Arc::new(Pace {
        period_us: AtomicU64::new(0),
        unheard_max: AtomicU64::new(UNHEARD_UNLIMITED),
    });
    pace.set_rate(options.rate_per_s);
    let mut swarm = Swarm::new(
        address,
        options,
        Arc::clone(&pace),
        Arc::clone(running.tally()),
    );
    swarm.gather()?;
    running.spawn(move |_, stop| swarm.talk(&stop))?;
    Ok((running, pace))
}

/// How fast a swarm talks: at a rate, or as fast as the server passes its words on.
#[derive(Debug)]
pub struct Pace {
    /// Microseconds between two messages of one client; 0: as fast as they are heard.
    period_us: AtomicU64,
    /// Of the whole swarm.
    unheard_max: AtomicU64,
}

impl Pace {
    /// So many messages a second by each client.
    pub fn set_rate(&self, per_s: f64) {
        let period_us = (1e6 / per_s).max(1.0) as u64;
        self.period_us.store(period_us, Ordering::Relaxed);
    }

    /// The next message as soon as few enough are unheard.
    pub fn saturate(&self) {
        self.period_us.store(0, Ordering::Relaxed);
    }

    /// No message while so many of the swarm's are still to be heard by somebody: a server that
    /// cannot follow is not drowned, and with 0 the swarm is silent.
    pub fn limit_unheard(&self, messages: u64) {
        self.unheard_max.store(messages, Ordering::Relaxed);
    }

    fn period(&self) -> Option<Duration> {
        let period_us = self.period_us.load(Ordering::Relaxed);
        (period_us > 0).then_some(Duration::from_micros(period_us))
    }
}

/// What is known of an arrival beside its lines.
struct Heard<'a> {
    /// Who heard it, and when.
    index: usize,
    now_us: u64,
    tally: &'a Tally,
    last_said: &'a [Vec<String>],
    message_bytes: usize,
}

/// Where a client stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Registering,
    Joining,
    InChannel,
}

#[derive(Debug)]
struct Client {
    connection: Option<Connection>,
    stage: Stage,
    retry_at: Instant,
    next_number: u64,
    next_send_at: Instant,
    heard: Vec<Sequence>,
    timeline: Timeline,
}

struct Swarm {
    address: SocketAddr,
    pace: Arc<Pace>,
    message_bytes: usize,
    tally: Arc<Tally>,
    clients: Vec<Client>,
    /// When each client said each of its messages.
    said_at: Vec<Vec<Instant>>,
    /// What each client said last, by number: all others hear the same, so it need not be made
    /// again for each.
    last_said: Vec<Vec<String>>,
    said: u64,
    heard: u64,
    /// Whose turn it is when the swarm talks as fast as it is heard.
    next_speaker: usize,
}

impl Swarm {
    fn new(address: SocketAddr, options: &Options, pace: Arc<Pace>, tally: Arc<Tally>) -> Self {
        let now = Instant::now();
        let client = || Client {
            connection: None,
            stage: Stage::Registering,
            retry_at: now,
            next_number: 0,
            next_send_at: now,
            heard: (0..options.clients).map(|_| Sequence::default()).collect(),
            timeline: Timeline::default(),
        };
        let clients = (0..options.clients).map(|_| client()).collect();
        Self {
            address,
            pace,
            message_bytes: options.message_bytes,
            tally,
            clients,
            said_at: vec![Vec::new(); options.clients],
            last_said: vec![vec![String::new(); SAID_KEPT]; options.clients],
            said: 0,
            heard: 0,
            next_speaker: 0,
        }
    }

    /// Registers every client and waits until all are in the channel.
    fn gather(&mut self) -> Result<(), ClientError> {
        let deadline = Instant::now() + PATIENCE;
        for index in 0..self.clients.len() {
            let connection =
                Connection::open(self.address, PATIENCE).map_err(|cause| ClientError::Connect {
                    address: self.address,
                    cause,
                })?;
            self.clients[index].begin(connection, index);
        }
        while self
            .clients
            .iter()
            .any(|client| client.stage != Stage::InChannel)
        {
            self.turn(Duration::from_millis(100));
            let totals = self.tally.snapshot();
            if totals.reconnects > 0 || Instant::now() > deadline {
                let inside = self
                    .clients
                    .iter()
                    .filter(|c| c.stage == Stage::InChannel)
                    .count();
                let why = format!("{inside} are in the channel; {:?}", totals.failures);
                return Err(ClientError::Refused {
                    load: NAME,
                    address: self.address,
                    why,
                });
            }
        }
        Ok(())
    }

    /// Talks until told to stop, then listens until everything said was heard.
    fn talk(mut self, stop: &Stop) -> Vec<Timeline> {
        let mut paced_by = None;
        while !stop.asked() {
            let period = self.pace.period();
            let wait = match period {
                Some(period) => {
                    if paced_by != Some(period) {
                        self.spread(period);
                    }
                    self.send_due(period)
                }
                None => self.send_while_heard(),
            };
            paced_by = period;
            self.turn(wait);
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.everything_heard() && Instant::now() < deadline {
            self.turn(Duration::from_millis(20));
        }
        self.count_unheard();
        self.clients
            .into_iter()
            .map(|client| client.timeline)
            .collect()
    }

    /// Gives the clients their first turns evenly over a period.
    fn spread(&mut self, period: Duration) {
        let start = Instant::now();
        let count = self.clients.len() as u32;
        for (index, client) in (0..).zip(&mut self.clients) {
            client.next_send_at = start + period * index / count;
        }
    }

    /// Says what is due; returns how long nothing is.
    fn send_due(&mut self, period: Duration) -> Duration {
        let now = Instant::now();
        let mut next_at = now + LOOK_EVERY;
        for index in 0..self.clients.len() {
            while self.clients[index].next_send_at <= now {
                self.clients[index].next_send_at += period;
                if self.may_speak() {
                    self.say(index);
                }
            }
            next_at = next_at.min(self.clients[index].next_send_at);
        }
        next_at.saturating_duration_since(now)
    }

    /// Says as much as may be unheard at a time.
    fn send_while_heard(&mut self) -> Duration {
        let mut silent = 0;
        while self.may_speak() && silent < self.clients.len() {
            let spoke = self.say(self.next_speaker);
            silent = if spoke { 0 } else { silent + 1 };
            self.next_speaker = (self.next_speaker + 1) % self.clients.len();
        }
        LOOK_EVERY
    }

    fn may_speak(&self) -> bool {
        let listeners = self.clients.len() as u64 - 1;
        let unheard_max = self.pace.unheard_max.load(Ordering::Relaxed);
        self.said * listeners < self.heard + unheard_max * listeners
    }

    /// Queues the next message of a client that is in the channel.
    fn say(&mut self, index: usize) -> bool {
        let client = &mut self.clients[index];
        let Some(connection) = &mut client.connection else {
            return false;
        };
        if client.stage != Stage::InChannel {
            return false;
        }
        let text = message(index, client.next_number, self.message_bytes);
        connection.queue(format!("PRIVMSG {CHANNEL} :{text}\r\n").as_bytes());
        self.last_said[index][client.next_number as usize % SAID_KEPT] = text;
        client.next_number += 1;
        self.said_at[index].push(Instant::now());
        self.said += 1;
        self.tally.add_sent(1);
        true
    }

    /// Sends and receives what is ready, waiting at most `timeout`.
    fn turn(&mut self, timeout: Duration) {
        for index in 0..self.clients.len() {
            self.reconnect_when_due(index);
            let sent = self.clients[index]
                .connection
                .as_mut()
                .map(Connection::write_some);
            if let Some(Err(cause)) = sent {
                self.broke(index, &cause);
            }
        }
        let polled: Vec<_> = self.clients.iter().map(|c| c.connection.as_ref()).collect();
        let readable = wait(&polled, timeout).unwrap_or_default();
        for (index, readable) in readable.into_iter().enumerate() {
            if readable {
                self.receive(index);
            }
        }
    }

    fn receive(&mut self, index: usize) {
        let Some(connection) = &mut self.clients[index].connection else {
            return;
        };
        let outcome = connection.read_some();
        let lines = connection.take_lines();
        // What was read together has arrived together.
        let now = Instant::now();
        let arrival = Heard {
            index,
            now_us: self.tally.us_at(now),
            tally: &self.tally,
            last_said: &self.last_said,
            message_bytes: self.message_bytes,
        };
        let client = &mut self.clients[index];
        let lines = lines.split(|byte| *byte == b'\n');
        let messages = lines.filter(|line| !line.is_empty()).filter_map(|line| {
            client.take_line(&arrival, line.strip_suffix(b"\r").unwrap_or(line))
        });
        let said_at = &self.said_at;
        let heard = &mut self.heard;
        let latencies = messages.filter_map(|(speaker, number)| {
            *heard += 1;
            let said_at = said_at[speaker].get(number as usize)?;
            Some(now.saturating_duration_since(*said_at))
        });
        self.tally.add_latencies(latencies);
        if let Err(cause) = outcome {
            self.broke(index, &cause);
        }
    }

    fn broke(&mut self, index: usize, cause: &std::io::Error) {
        let client = &mut self.clients[index];
        client.connection = None;
        client.stage = Stage::Registering;
        client.retry_at = Instant::now() + RECONNECT_EVERY;
        self.tally
            .add_reconnect(|| format!("client {index}: {cause}"));
    }

    fn reconnect_when_due(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.connection.is_some() || Instant::now() < client.retry_at {
            return;
        }
        match Connection::open(self.address, RECONNECT_EVERY) {
            Ok(connection) => client.begin(connection, index),
            Err(_) => client.retry_at = Instant::now() + RECONNECT_EVERY,
        }
    }

    fn everything_heard(&self) -> bool {
        self.unheard().next().is_none()
    }

    /// (listener, speaker, messages never heard) where there are any.
    fn unheard(&self) -> impl Iterator<Item = (usize, usize, u64)> {
        self.clients
            .iter()
            .enumerate()
            .flat_map(move |(listener, client)| {
                let tails = client.heard.iter().zip(&self.clients).enumerate();
                tails.filter_map(move |(speaker, (heard, said))| {
                    let unheard = said.next_number - heard.next();
                    (speaker != listener && unheard > 0).then_some((listener, speaker, unheard))
                })
            })
    }

    fn count_unheard(&self) {
        for (listener, speaker, unheard) in self.unheard() {
            self.tally.add_lost(unheard, || {
                format!("client {listener} never heard the last {unheard} of client {speaker}")
            });
        }
    }
}

impl Client {
    fn begin(&mut self, mut connection: Connection, index: usize) {
        let nick = nick(index);
        connection.queue(format!("NICK {nick}\r\nUSER {nick} 0 * :{nick}\r\n").as_bytes());
        self.connection = Some(connection);
        self.stage = Stage::Registering;
    }

    /// Obeys a line. Speaker and number when it was a message of one of the swarm.
    fn take_line(&mut self, arrival: &Heard<'_>, line: &[u8]) -> Option<(usize, u64)> {
        let (index, tally) = (arrival.index, arrival.tally);
        let Ok(line) = std::str::from_utf8(line) else {
            tally.add_damaged(1, || format!("client {index}: a line that is not UTF-8"));
            return None;
        };
        let connection = self.connection.as_mut()?;
        if let Some(token) = line.strip_prefix("PING ") {
            connection.queue(format!("PONG {token}\r\n").as_bytes());
            return None;
        }
        let (sender, rest) = match line.strip_prefix(':').and_then(|line| line.split_once(' ')) {
            Some((prefix, rest)) => (prefix.split('!').next().unwrap_or(prefix), rest),
            None => ("", line),
        };
        let command = rest.split(' ').next().unwrap_or_default();
        match command {
            // End of the greeting, with or without a message of the day.
            "376" | "422" if self.stage == Stage::Registering => {
                self.stage = Stage::Joining;
                connection.queue(format!("JOIN {CHANNEL}\r\n").as_bytes());
            }
            // End of the list of names: the join is complete.
            "366" => self.stage = Stage::InChannel,
            "PRIVMSG" => {
                let text = rest
                    .split_once(" :")
                    .map(|(_, text)| text)
                    .unwrap_or_default();
                self.timeline.heard_at(tally, arrival.now_us);
                return self.take_message(arrival, sender, text);
            }
            "JOIN" | "MODE" | "NOTICE" | "QUIT" | "PONG" => {}
            number if number.starts_with(['0', '2', '3']) => {}
            _ => tally.add_damaged(1, || format!("client {index}: unexpected line {line:?}")),
        }
        None
    }

    fn take_message(
        &mut self,
        arrival: &Heard<'_>,
        sender: &str,
        text: &str,
    ) -> Option<(usize, u64)> {
        let (index, tally) = (arrival.index, arrival.tally);
        tally.add_received(1);
        let Some((speaker, number)) = parse(sender, text, arrival) else {
            tally.add_damaged(1, || format!("client {index}: {sender} said {text:?}"));
            return None;
        };
        let sequence = self.heard.get_mut(speaker)?;
        let what = || format!("client {index}, message {number} of client {speaker}");
        match sequence.arrive(number) {
            Arrival::InOrder => {}
            Arrival::After { missing } => {
                tally.add_lost(missing, || {
                    format!("{}: {missing} before it missing", what())
                });
            }
            Arrival::Late => tally.found_late(|| format!("{}: late", what())),
            Arrival::Again => tally.add_doubled(1, || format!("{}: again", what())),
        }
        Some((speaker, number))
    }
}

/// Nicknames have at most nine characters by default.
fn nick(index: usize) -> String {
    format!("c{index}")
}

/// A message names its sender and number and is padded with letters that follow from both.
fn message(sender: usize, number: u64, bytes: usize) -> String {
    let mut text = format!("{sender} {number} ");
    let mut letter = number.wrapping_add(sender as u64);
    while text.len() < bytes {
        text.push(char::from(b'a' + (letter % 26) as u8));
        letter = letter.wrapping_mul(31).wrapping_add(7);
    }
    text
}

/// Sender and number of a message that is whole and came from whom it says.
fn parse(sender: &str, text: &str, arrival: &Heard<'_>) -> Option<(usize, u64)> {
    let mut words = text.split(' ');
    let speaker: usize = words.next()?.parse().ok()?;
    let number: u64 = words.next()?.parse().ok()?;
    let said = arrival.last_said.get(speaker);
    let said = said.and_then(|said| said.get(number as usize % SAID_KEPT));
    let whole = said.is_some_and(|said| said == text)
        || text == message(speaker, number, arrival.message_bytes);
    (is_nick(sender, speaker) && whole).then_some((speaker, number))
}

/// Whether this is the nickname of that client.
fn is_nick(name: &str, index: usize) -> bool {
    name.strip_prefix('c')
        .and_then(|digits| digits.parse().ok())
        == Some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_known_by_sender_number_and_padding() {
        let text = message(3, 41, 60);
        assert_eq!(text.len(), 60);
        for last_said in [&[][..], &vec![vec![text.clone(); SAID_KEPT]; 4]] {
            let arrival = Heard {
                index: 0,
                now_us: 0,
                tally: &Tally::new(),
                last_said,
                message_bytes: 60,
            };
            assert_eq!(parse("c3", &text, &arrival), Some((3, 41)));
            assert_eq!(parse("c4", &text, &arrival), None);
            assert_eq!(parse("c3", &text.replace("41", "42"), &arrival), None);
            assert_eq!(parse("c3", &text[..59], &arrival), None);
        }
    }
}
