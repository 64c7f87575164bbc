//! One state per kind of kernel object: what `objects` captures from a descriptor and restores to
//! one. A state is whole: it replaces the one of the epoch before.

mod file;
mod notify;
mod pipe;
mod socket;

pub use file::{
    CharacterDevice, Directory, FileLock, LockOwner, MemoryFile, Ownership, RegularFile,
};
pub use notify::{
    BusyPoll, Epoll, EpollEntry, EventCounter, InterestChange, SignalDescriptor, TimerDescriptor,
};
pub use pipe::{Pipe, PipeEnd};
pub use socket::{
    SocketAddress, SocketOption, TcpConnection, TcpListener, TcpPhase, TcpWindow, UdpSocket,
    UnixAddress, UnixKind, UnixMessage, UnixSocket,
};

use crate::FileIdentity;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    RegularFile(RegularFile),
    Directory(Directory),
    CharacterDevice(CharacterDevice),
    MemoryFile(MemoryFile),
    PipeEnd(PipeEnd),
    Epoll(Epoll),
    EventCounter(EventCounter),
    TimerDescriptor(TimerDescriptor),
    SignalDescriptor(SignalDescriptor),
    TcpListener(TcpListener),
    TcpConnection(TcpConnection),
    UdpSocket(UdpSocket),
    UnixSocket(UnixSocket),
    /// The service's standard output (`stream` 1) or error (2): a pipe whose other end is ours.
    Output {
        stream: u8,
        flags: i32,
    },
}

impl Object {
    /// The file, directory or FIFO that it names, if that has an identity that lasts.
    pub fn file(&self) -> Option<FileIdentity> {
        let identity = match self {
            Object::RegularFile(file) => file.identity,
            Object::Directory(directory) => directory.identity,
            Object::PipeEnd(end) if end.fifo_path.is_some() => end.identity,
            _ => return None,
        };
        (identity != FileIdentity::default()).then_some(identity)
    }

    /// Bytes of queues and content that the state carries, about: what makes it large.
    pub fn content_bytes(&self) -> usize {
        match self {
            Object::MemoryFile(file) => {
                file.content.iter().map(|(_, bytes)| bytes.len() + 16).sum()
            }
            Object::PipeEnd(end) => end
                .pipe
                .iter()
                .flat_map(|pipe| &pipe.content)
                .map(|entry| entry.len() + 8)
                .sum(),
            Object::TcpConnection(connection) => {
                connection.send_queue.len() + connection.receive_queue.len()
            }
            Object::UdpSocket(socket) => socket
                .queue
                .iter()
                .map(|(_, datagram)| datagram.len() + 64)
                .sum(),
            Object::UnixSocket(socket) => socket
                .queue
                .iter()
                .map(|message| message.bytes.len() + 64)
                .sum(),
            Object::Epoll(epoll) => epoll.entries.len() * 32,
            _ => 0,
        }
    }
}
