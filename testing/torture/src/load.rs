//! Every server that the tests know, with the clients that judge it.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use unbroken_clients::{Running, bulk, churn, config, echo, icecast, irc, redis};
use unbroken_harness::{PATIENCE, Random, wait_until};

/// Where our own servers listen.
const PORT: u16 = 7000;
const TRANSFER_BYTES: u64 = 4 << 20;

/// Which server a session tortures, and how it is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    Chat,
    Stream,
    Counters,
    Churn,
    Echo,
    Download,
    Upload,
    /// One of testing/guests, by name: asked to check itself after each fault.
    Guest(&'static str),
}

/// The guests that need nothing of the host and are asked over one connection.
const GUESTS: [&str; 25] = [
    "alarm",
    "clock",
    "device",
    "directory",
    "dup",
    "epoll",
    "eventfd",
    "fifo",
    "file",
    "heap",
    "mapped_file",
    "memory",
    "overflow",
    "pending",
    "pipe",
    "process",
    "shared_memory",
    "signalfd",
    "signals",
    "stack",
    "threads",
    "timerfd",
    "timers",
    "udp",
    "vector",
];

impl Server {
    /// Drawn by lot.
    pub fn draw(random: &mut Random) -> Self {
        const OFTEN: [Server; 12] = [
            Server::Chat,
            Server::Chat,
            Server::Chat,
            Server::Stream,
            Server::Stream,
            Server::Counters,
            Server::Counters,
            Server::Churn,
            Server::Churn,
            Server::Echo,
            Server::Download,
            Server::Upload,
        ];
        let drawn = random.draw() as usize % (OFTEN.len() + 5);
        match OFTEN.get(drawn) {
            Some(server) => *server,
            None => Self::Guest(GUESTS[random.draw() as usize % GUESTS.len()]),
        }
    }

    /// By the name that [`Self::name`] gives.
    pub fn named(name: &str) -> Option<Self> {
        let plain = [
            Self::Chat,
            Self::Stream,
            Self::Counters,
            Self::Churn,
            Self::Echo,
            Self::Download,
            Self::Upload,
        ];
        let guests = GUESTS.into_iter().map(Self::Guest);
        plain
            .into_iter()
            .chain(guests)
            .find(|server| server.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "ngircd",
            Self::Stream => "icecast",
            Self::Counters => "redis",
            Self::Churn => "churn",
            Self::Echo => "echo",
            Self::Download => "download",
            Self::Upload => "upload",
            Self::Guest(name) => name,
        }
    }

    /// A guest says that it cannot write, which is right.
    pub fn lives_with_a_full_disk(self) -> bool {
        !matches!(self, Self::Guest(_))
    }

    /// The command that starts it with its files in `directory`, and the port it listens on.
    pub fn command(self, directory: &Path) -> Result<(Vec<String>, u16)> {
        Ok(match self {
            Self::Chat => (config::ngircd(directory)?, config::IRC_PORT),
            Self::Stream => (config::icecast(directory)?, config::ICECAST_PORT),
            Self::Counters => (config::redis(directory), config::REDIS_PORT),
            Self::Churn => (config::own_program("churn-server", PORT)?, PORT),
            Self::Echo => (config::own_program("echo-server", PORT)?, PORT),
            Self::Download | Self::Upload => (config::own_program("bulk-server", PORT)?, PORT),
            Self::Guest(name) => {
                let mut command = config::own_program(name, PORT)?;
                command.push(directory.to_string_lossy().into_owned());
                (command, PORT)
            }
        })
    }

    /// Starts the clients.
    pub fn load(self, address: SocketAddr) -> Result<Load> {
        Ok(Load::Clients(match self {
            Self::Chat => {
                let options = irc::Options {
                    clients: 8,
                    rate_per_s: 20.0,
                    message_bytes: 80,
                };
                irc::start(address, &options)?
            }
            Self::Stream => icecast::start(address, &icecast::Options::default())?,
            Self::Counters => redis::start(address, &redis::Options::default())?,
            Self::Churn => churn::start(address, 4)?,
            Self::Echo => echo::start(address, 4)?,
            Self::Download => {
                bulk::start_endless(address, bulk::Direction::Download, 2, TRANSFER_BYTES)?
            }
            Self::Upload => {
                bulk::start_endless(address, bulk::Direction::Upload, 2, TRANSFER_BYTES)?
            }
            Self::Guest(_) => return Ok(Load::Guest(Guest::set_up(address)?)),
        }))
    }
}

/// A load under way.
#[derive(Debug)]
pub enum Load {
    Clients(Running),
    Guest(Guest),
}

impl Load {
    /// Fails unless everything that clients heard so far is right, and every connection has heard
    /// something since `moment`.
    pub fn verify(&mut self, moment: Instant) -> Result<()> {
        match self {
            Self::Clients(running) => {
                let tally = running.tally();
                let since_us = tally.us_at(moment);
                let mut silent = (0, 0);
                let heard = wait_until("a word on every connection", PATIENCE, || {
                    still_clean(running)?;
                    silent = tally.silent_since(since_us);
                    Ok((silent.1 == 0).then_some(()))
                });
                heard.with_context(|| format!("{} of {} are silent", silent.1, silent.0))?;
                ensure!(
                    !running.has_ended(),
                    "the load has ended: {:?}",
                    tally.snapshot()
                );
                Ok(())
            }
            Self::Guest(guest) => guest.tell("check"),
        }
    }

    /// The longest silence on any connection since this was asked last, where connections should
    /// hear all the time.
    pub fn take_longest_gap_ms(&self) -> Option<f64> {
        let Self::Clients(running) = self else {
            return None;
        };
        let gap_us = running.tally().take_longest_gap_us();
        (gap_us > 0).then_some(gap_us as f64 / 1e3)
    }

    /// Ends it; everything that was under way must have arrived.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Clients(running) => running.finish().verdict().map_err(|why| anyhow!(why)),
            Self::Guest(mut guest) => guest.tell("check"),
        }
    }

    /// What was seen so far, for a report.
    pub fn seen(&self) -> String {
        match self {
            Self::Clients(running) => {
                let tally = running.tally();
                let now_us = tally.now_us();
                format!("{now_us} us after the load began: {:#?}", tally.snapshot())
            }
            Self::Guest(guest) => format!("{guest:?}"),
        }
    }
}

fn still_clean(running: &Running) -> Result<()> {
    let totals = running.tally().snapshot();
    ensure!(totals.is_clean(), "the clients saw: {totals:?}");
    Ok(())
}

/// A guest and the one connection over which everything is said to it.
#[derive(Debug)]
pub struct Guest {
    conversation: BufReader<TcpStream>,
}

impl Guest {
    fn set_up(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut guest = Self {
            conversation: BufReader::new(stream),
        };
        guest.tell("set up")?;
        guest.tell("check").context("before any fault")?;
        Ok(guest)
    }

    /// Says a line and hears `ok`.
    fn tell(&mut self, words: &str) -> Result<()> {
        let line = format!("{words}\n");
        self.conversation.get_ref().write_all(line.as_bytes())?;
        let mut answer = String::new();
        let read = self.conversation.read_line(&mut answer);
        read.with_context(|| format!("no answer to {words:?}"))?;
        ensure!(answer == "ok\n", "after {words:?}: {answer:?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_is_found_by_its_name() {
        let mut random = Random::from_seed(1);
        for _ in 0..200 {
            let server = Server::draw(&mut random);
            assert_eq!(Server::named(server.name()), Some(server));
        }
    }
}
