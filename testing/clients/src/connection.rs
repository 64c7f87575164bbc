//! A nonblocking connection with a buffer on each side, and waiting for many of them.

use std::cell::RefCell;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;

const READ_BYTES: usize = 64 * 1024;
const EVENTS: usize = 256;

thread_local! {
    /// What arrives passes through here: clearing so much for every answer would cost more than the
    /// answer.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// One TCP connection that never blocks.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl Connection {
    /// Connects (waiting at most `patience`) and turns the socket nonblocking.
    pub(crate) fn open(address: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, patience)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            outgoing: Vec::new(),
            incoming: Vec::new(),
        })
    }

    /// Queues bytes; [`Connection::write_some`] sends them.
    pub(crate) fn queue(&mut self, bytes: &[u8]) {
        self.outgoing.extend_from_slice(bytes);
    }

    pub(crate) fn unsent_bytes(&self) -> usize {
        self.outgoing.len()
    }

    /// Sends what the socket takes now.
    pub(crate) fn write_some(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(cause) if cause.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
        Ok(())
    }

    /// Reads what has arrived into the incoming buffer; the end of the stream is an error, since
    /// no server of these loads has reason to close.
    pub(crate) fn read_some(&mut self) -> io::Result<usize> {
        BUFFER.with_borrow_mut(|buffer| self.read_through(buffer))
    }

    fn read_through(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let before = self.incoming.len();
        loop {
            match self.stream.read(buffer) {
                Ok(0) => {
                    let why = "the server closed the connection";
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, why));
                }
                Ok(count) => {
                    self.incoming.extend_from_slice(&buffer[..count]);
                    if count < buffer.len() {
                        return Ok(self.incoming.len() - before);
                    }
                }
                Err(cause) if cause.kind() == ErrorKind::WouldBlock => {
                    return Ok(self.incoming.len() - before);
                }
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
    }

    /// Takes the whole lines that have arrived, with all their ends but the last.
    pub(crate) fn take_lines(&mut self) -> Vec<u8> {
        let Some(end) = self.incoming.iter().rposition(|byte| *byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.incoming.split_off(end + 1);
        let mut whole = std::mem::replace(&mut self.incoming, rest);
        whole.truncate(end);
        whole
    }

    /// Takes everything that has arrived.
    pub(crate) fn take_bytes(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.incoming)
    }

    /// What has arrived and was not taken.
    pub(crate) fn waiting(&self) -> &[u8] {
        &self.incoming
    }

    /// Forgets the first `count` bytes that have arrived.
    pub(crate) fn skip(&mut self, count: usize) {
        self.incoming.drain(..count.min(self.incoming.len()));
    }
}

/// Waits until one of `connections` can be read, or written where it has something to send, but
/// not longer than `timeout`. Says for each whether a read will tell something: data, the end of
/// the stream, or an error. `None` entries have nothing to tell.
pub(crate) fn wait(
    connections: &[Option<&Connection>],
    timeout: Duration,
) -> io::Result<Vec<bool>> {
    let mut readable = vec![false; connections.len()];
    let mut slots = Vec::with_capacity(connections.len());
    let mut descriptors = Vec::with_capacity(connections.len());
    for (index, connection) in connections.iter().enumerate() {
        let Some(connection) = connection else {
            continue;
        };
        let mut wanted = PollFlags::POLLIN;
        if !connection.outgoing.is_empty() {
            wanted |= PollFlags::POLLOUT;
        }
        slots.push(index);
        descriptors.push(PollFd::new(connection.stream.as_fd(), wanted));
    }
    // Not poll: its milliseconds would turn an even load into bursts.
    match ppoll(&mut descriptors, Some(TimeSpec::from(timeout)), None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    for (slot, descriptor) in slots.into_iter().zip(&descriptors) {
        let found = descriptor.revents().unwrap_or(PollFlags::empty());
        let telling = PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR;
        readable[slot] = found.intersects(telling);
    }
    Ok(readable)
}

/// Waits for thousands of connections at the cost of those that have something to say.
pub(crate) struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            events: vec![EpollEvent::empty(); EVENTS],
        })
    }

    /// From now on `connection` is waited for, as number `index`, until it is dropped.
    pub(crate) fn add(&self, connection: &Connection, index: usize) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
        Ok(self.epoll.add(&connection.stream, event)?)
    }

    /// From now on it is waited for that the socket takes more, while there is more.
    pub(crate) fn watch_writing(&self, connection: &Connection, index: usize) -> io::Result<()> {
        let mut wanted = EpollFlags::EPOLLIN;
        wanted.set(EpollFlags::EPOLLOUT, connection.unsent_bytes() > 0);
        let mut event = EpollEvent::new(wanted, index as u64);
        Ok(self.epoll.modify(&connection.stream, &mut event)?)
    }

    /// Waits until there is something to do, but not longer than `timeout`; `ready` is
    /// then the numbers of those that have it, or of some.
    pub(crate) fn wait(&mut self, timeout: Duration, ready: &mut Vec<usize>) -> io::Result<()> {
        ready.clear();
        let mut whole = [PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)];
        // epoll_wait counts milliseconds, which would turn an even load into bursts.
        match ppoll(&mut whole, Some(TimeSpec::from(timeout)), None) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let count = self.epoll.wait(&mut self.events, EpollTimeout::ZERO)?;
        ready.extend(
            self.events[..count]
                .iter()
                .map(|event| event.data() as usize),
        );
        Ok(())
    }
}
