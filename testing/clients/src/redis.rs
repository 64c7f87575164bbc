//! Counters in a key-value store: INCR over one connection must answer 1, 2, 3, … without a
//! repeat (an update lost) and without a skip (an update done twice).

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};

use crate::running::{ClientError, PATIENCE, Running, Stop};
use crate::tally::{Tally, Timeline};

const NAME: &str = "redis";

/// How the counters behave.
#[derive(Debug, Clone)]
pub struct Options {
    pub connections: usize,
    /// Commands that each connection sends before it waits for their answers.
    pub pipeline: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 4,
            pipeline: 1,
        }
    }
}

/// Starts the counters. Returns when all are connected.
pub fn start(address: SocketAddr, options: &Options) -> Result<Running, ClientError> {
    let mut running = Running::new(NAME);
    let mut streams = Vec::new();
    for _ in 0..options.connections {
        let stream = connect(address).map_err(|cause| ClientError::Connect { address, cause })?;
        streams.push(stream);
    }
    let pipeline = options.pipeline.max(1);
    for (index, stream) in streams.into_iter().enumerate() {
        running.spawn(move |tally, stop| {
            let mut timeline = Timeline::default();
            let mut counter = Counter {
                index,
                stream,
                value: 0,
            };
            if let Err(cause) = counter.count(pipeline, &tally, &stop, &mut timeline) {
                tally.add_reconnect(|| format!("connection {index}: {cause}"));
            }
            vec![timeline]
        })?;
    }
    Ok(running)
}

fn connect(address: SocketAddr) -> std::io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(stream))
}

struct Counter {
    index: usize,
    stream: BufReader<TcpStream>,
    value: i64,
}

impl Counter {
    fn count(
        &mut self,
        pipeline: usize,
        tally: &Tally,
        stop: &Stop,
        timeline: &mut Timeline,
    ) -> std::io::Result<()> {
        let key = format!("counter:{}", self.index);
        let increment = command(&["INCR", &key]).repeat(pipeline);
        self.stream.get_mut().write_all(&command(&["DEL", &key]))?;
        self.answer()?;
        while !stop.asked() {
            self.stream.get_mut().write_all(&increment)?;
            tally.add_sent(pipeline as u64);
            for _ in 0..pipeline {
                let answer = self.answer()?;
                timeline.heard(tally);
                self.check(&answer, tally);
            }
        }
        self.stream.get_mut().write_all(&command(&["GET", &key]))?;
        let length = self.answer()?;
        let stored = if length.starts_with('$') {
            self.answer()?
        } else {
            length
        };
        if stored != self.value.to_string() {
            let what = || format!("{key}: stored {stored}, answered {}", self.value);
            tally.add_damaged(1, what);
        }
        Ok(())
    }

    fn check(&mut self, answer: &str, tally: &Tally) {
        tally.add_received(1);
        let index = self.index;
        let expected = self.value + 1;
        let Some(value) = answer
            .strip_prefix(':')
            .and_then(|number| number.parse::<i64>().ok())
        else {
            return tally.add_damaged(1, || format!("connection {index}: answer {answer:?}"));
        };
        let what = || format!("connection {index}: INCR answered {value}, expected {expected}");
        match value - expected {
            0 => {}
            skipped @ 1.. => tally.add_doubled(skipped as u64, what),
            repeated => tally.add_lost(repeated.unsigned_abs(), what),
        }
        self.value = value;
    }

    fn answer(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            let why = "the server closed the connection";
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, why));
        }
        Ok(line.trim_end().to_string())
    }
}

/// One command as the protocol wants it: an array of byte strings.
fn command(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
    bytes
}
