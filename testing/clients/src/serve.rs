//! The small servers that churn, bulk and latency clients talk to: one thread, one poll loop, so
//! that what is tested is the protection and not the server.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::content::Content;

const PIECE_BYTES: usize = 64 * 1024;
const LINE_LIMIT_BYTES: usize = 1024;

/// What a server does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Sends every byte back.
    Echo,
    /// Answers one line, then closes first or last, as the line asks; a line that begins with `x`
    /// is a bug that kills the server, whoever runs it.
    Churn,
    /// `GET bytes stream` sends that much of the stream; `PUT bytes stream` checks what follows.
    Bulk,
}

/// What a connection is at.
#[derive(Debug)]
enum Step {
    /// Waits for a whole line (echo: has none to wait for).
    Line,
    /// Sends a stream.
    Sending {
        content: Content,
        next: u64,
        end: u64,
    },
    /// Checks a stream; the first byte that differed, if any.
    Checking {
        content: Content,
        next: u64,
        end: u64,
        wrong_at: Option<u64>,
    },
    /// Everything is said: closes as soon as it is sent.
    Closing,
    /// Everything is said: waits for the client to close.
    Waiting,
}

#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    sent: usize,
    step: Step,
    ended: bool,
}

/// Serves on `port` of every address until the process dies.
pub fn serve(kind: Kind, port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    serve_on(kind, &listener)
}

/// The program behind each of our servers: one argument, the port.
pub fn main(kind: Kind) -> std::process::ExitCode {
    let port = std::env::args()
        .nth(1)
        .and_then(|argument| argument.parse().ok());
    let Some(port) = port else {
        eprintln!("usage: {kind:?} server: give the port to serve on");
        return std::process::ExitCode::from(2);
    };
    match serve(kind, port) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("{kind:?} server on port {port}: {cause}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Serves on a listener until an error of the listener itself.
pub fn serve_on(kind: Kind, listener: &TcpListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut peers: Vec<Peer> = Vec::new();
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        let mut polled = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        for peer in &peers {
            polled.push(PollFd::new(peer.stream.as_fd(), peer.wants()));
        }
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let happened: Vec<bool> = polled
            .iter()
            .map(|slot| slot.any().unwrap_or(true))
            .collect();
        let mut index = 0;
        peers.retain_mut(|peer| {
            index += 1;
            !happened[index] || peer.turn(kind, &mut buffer).unwrap_or(false)
        });
        if happened[0] {
            accept_all(listener, &mut peers)?;
        }
    }
}

fn accept_all(listener: &TcpListener, peers: &mut Vec<Peer>) -> io::Result<()> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => peers.push(Peer::new(stream)?),
            Err(cause) if cause.kind() == ErrorKind::WouldBlock => return Ok(()),
            // The client gave up before it was accepted; the next one may not have.
            Err(cause) if cause.kind() == ErrorKind::ConnectionAborted => {}
            Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
}

impl Peer {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let (incoming, outgoing) = (Vec::new(), Vec::new());
        Ok(Self {
            stream,
            incoming,
            outgoing,
            sent: 0,
            step: Step::Line,
            ended: false,
        })
    }

    fn has_output(&self) -> bool {
        self.sent < self.outgoing.len() || matches!(self.step, Step::Sending { .. })
    }

    fn wants(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        if self.has_output() {
            flags |= PollFlags::POLLOUT;
        }
        if !self.ended && !matches!(self.step, Step::Sending { .. } | Step::Closing) {
            flags |= PollFlags::POLLIN;
        }
        flags
    }

    /// Does what can be done now. `Ok(false)`: the conversation is over.
    fn turn(&mut self, kind: Kind, buffer: &mut [u8]) -> io::Result<bool> {
        if self.wants().contains(PollFlags::POLLIN) {
            self.read(buffer)?;
        }
        match self.step {
            Step::Line if kind == Kind::Echo => self.outgoing.append(&mut self.incoming),
            Step::Line => self.take_line(kind),
            _ => {}
        }
        self.check_incoming();
        self.write()?;
        let all_sent = !self.has_output();
        Ok(match self.step {
            Step::Closing => !all_sent,
            Step::Line | Step::Waiting | Step::Checking { .. } => !(self.ended && all_sent),
            Step::Sending { .. } => true,
        })
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        match self.stream.read(buffer) {
            Ok(0) => self.ended = true,
            Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
            Err(cause) if cause.kind() == ErrorKind::WouldBlock => {}
            Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
        Ok(())
    }

    fn take_line(&mut self, kind: Kind) {
        let Some(end) = self.incoming.iter().position(|byte| *byte == b'\n') else {
            if self.incoming.len() > LINE_LIMIT_BYTES {
                self.step = Step::Closing;
            }
            return;
        };
        let line: Vec<u8> = self.incoming.drain(..=end).collect();
        let line = String::from_utf8_lossy(&line[..end]).into_owned();
        self.step = match kind {
            Kind::Echo => Step::Line,
            Kind::Churn if line.starts_with('x') => std::process::abort(),
            Kind::Churn => {
                self.outgoing
                    .extend_from_slice(format!("{line} answered\n").as_bytes());
                if line.starts_with('c') {
                    Step::Waiting
                } else {
                    Step::Closing
                }
            }
            Kind::Bulk => bulk_step(&line).unwrap_or_else(|| {
                self.outgoing.extend_from_slice(b"BAD request\n");
                Step::Closing
            }),
        };
    }

    fn check_incoming(&mut self) {
        let Step::Checking {
            content,
            next,
            end,
            wrong_at,
        } = &mut self.step
        else {
            return;
        };
        if let Some(wrong) = content.first_difference(*next, &self.incoming) {
            wrong_at.get_or_insert(*next + wrong as u64);
        }
        *next += self.incoming.len() as u64;
        self.incoming.clear();
        if *next < *end && !self.ended {
            return;
        }
        let answer = match wrong_at {
            _ if next != end => format!("BAD length {next}\n"),
            Some(at) => format!("BAD byte {at}\n"),
            None => format!("OK {end}\n"),
        };
        self.outgoing.extend_from_slice(answer.as_bytes());
        self.step = Step::Closing;
    }

    fn write(&mut self) -> io::Result<()> {
        loop {
            if self.sent == self.outgoing.len() {
                self.outgoing.clear();
                self.sent = 0;
                self.produce();
            }
            if self.outgoing.is_empty() {
                return Ok(());
            }
            match self.stream.write(&self.outgoing[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(cause) if cause.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
            // One piece a turn: a fast reader must not keep the other connections waiting.
            if matches!(self.step, Step::Sending { .. }) {
                return Ok(());
            }
        }
    }

    /// Puts the next piece of a stream that is being sent into the empty outgoing buffer.
    fn produce(&mut self) {
        let Step::Sending { content, next, end } = &mut self.step else {
            return;
        };
        let count = (*end - *next).min(PIECE_BYTES as u64);
        self.outgoing.resize(count as usize, 0);
        content.fill(*next, &mut self.outgoing);
        *next += count;
        if next == end {
            self.step = Step::Closing;
        }
    }
}

fn bulk_step(line: &str) -> Option<Step> {
    let mut words = line.split(' ');
    let verb = words.next()?;
    let end: u64 = words.next()?.parse().ok()?;
    let content = Content::new(words.next()?.parse().ok()?);
    match verb {
        "GET" => Some(Step::Sending {
            content,
            next: 0,
            end,
        }),
        "PUT" => Some(Step::Checking {
            content,
            next: 0,
            end,
            wrong_at: None,
        }),
        _ => None,
    }
}
