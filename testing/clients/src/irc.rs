//! A swarm of chat clients in one channel, each of which must hear every numbered message of every
//! other, exactly once and in order, on one connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::{Connection, wait};
use crate::running::{ClientError, PATIENCE, Running, Stop};
use crate::sequence::{Arrival, Sequence};
use crate::tally::{Tally, Timeline};

const NAME: &str = "irc";
const CHANNEL: &str = "#unbroken";
/// A client whose connection broke tries again this often.
const RECONNECT_EVERY: Duration = Duration::from_millis(100);

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
    let mut running = Running::new(NAME);
    let mut swarm = Swarm::new(address, options.clone(), Arc::clone(running.tally()));
    swarm.gather()?;
    running.spawn(move |_, stop| swarm.talk(&stop))?;
    Ok(running)
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
    options: Options,
    tally: Arc<Tally>,
    clients: Vec<Client>,
}

impl Swarm {
    fn new(address: SocketAddr, options: Options, tally: Arc<Tally>) -> Self {
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
            options,
            tally,
            clients,
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
        let period = Duration::from_secs_f64(1.0 / self.options.rate_per_s);
        let start = Instant::now();
        let count = self.clients.len() as u32;
        for (index, client) in (0..).zip(&mut self.clients) {
            client.next_send_at = start + period * index / count;
        }
        while !stop.asked() {
            self.send_due(period);
            let now = Instant::now();
            let due = self
                .clients
                .iter()
                .map(|client| client.next_send_at)
                .min()
                .unwrap_or(now);
            self.turn(
                due.saturating_duration_since(now)
                    .min(Duration::from_millis(50)),
            );
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

    fn send_due(&mut self, period: Duration) {
        let now = Instant::now();
        for (index, client) in self.clients.iter_mut().enumerate() {
            while client.next_send_at <= now {
                client.next_send_at += period;
                let Some(connection) = &mut client.connection else {
                    continue;
                };
                if client.stage != Stage::InChannel {
                    continue;
                }
                let text = message(index, client.next_number, self.options.message_bytes);
                connection.queue(format!("PRIVMSG {CHANNEL} :{text}\r\n").as_bytes());
                client.next_number += 1;
                self.tally.add_sent(1);
            }
        }
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
        for line in lines {
            self.clients[index].take_line(index, &line, &self.tally, self.options.message_bytes);
        }
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

    fn take_line(&mut self, index: usize, line: &[u8], tally: &Tally, message_bytes: usize) {
        let Ok(line) = std::str::from_utf8(line) else {
            tally.add_damaged(1, || format!("client {index}: a line that is not UTF-8"));
            return;
        };
        let Some(connection) = &mut self.connection else {
            return;
        };
        if let Some(token) = line.strip_prefix("PING ") {
            connection.queue(format!("PONG {token}\r\n").as_bytes());
            return;
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
                self.timeline.heard(tally);
                self.take_message(index, sender, text, tally, message_bytes);
            }
            "JOIN" | "MODE" | "NOTICE" | "QUIT" | "PONG" => {}
            number if number.starts_with(['0', '2', '3']) => {}
            _ => tally.add_damaged(1, || format!("client {index}: unexpected line {line:?}")),
        }
    }

    fn take_message(
        &mut self,
        index: usize,
        sender: &str,
        text: &str,
        tally: &Tally,
        bytes: usize,
    ) {
        tally.add_received(1);
        let Some((speaker, number)) = parse(sender, text, bytes) else {
            tally.add_damaged(1, || format!("client {index}: {sender} said {text:?}"));
            return;
        };
        let Some(sequence) = self.heard.get_mut(speaker) else {
            return;
        };
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
fn parse(sender: &str, text: &str, bytes: usize) -> Option<(usize, u64)> {
    let mut words = text.split(' ');
    let speaker: usize = words.next()?.parse().ok()?;
    let number: u64 = words.next()?.parse().ok()?;
    let whole = sender == nick(speaker) && text == message(speaker, number, bytes);
    whole.then_some((speaker, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_known_by_sender_number_and_padding() {
        let text = message(3, 41, 60);
        assert_eq!(text.len(), 60);
        assert_eq!(parse("c3", &text, 60), Some((3, 41)));
        assert_eq!(parse("c4", &text, 60), None);
        assert_eq!(parse("c3", &text.replace("41", "42"), 60), None);
        assert_eq!(parse("c3", &text[..59], 60), None);
    }
}
