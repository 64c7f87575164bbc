//! Making all Unix sockets of a tree again: they refer to each other, so they come together.

use super::{SUBJECT, name, number_of, waits_for_accept};
use crate::socket_options::{self, Moment};
use crate::{Context, Error};
use std::collections::HashMap;
use std::env;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use unbroken_image::ObjectId;
use unbroken_image::object::{UnixAddress, UnixKind, UnixMessage, UnixSocket};
use unbroken_sys::unix::Name;
use unbroken_sys::{socket, sockopt, unix};

/// Makes all sockets of the tree on the calling thread's network and mount namespaces, unread
/// messages included. The result has the order of `sockets`.
///
/// A path that a socket is bound to is taken over: the file of the primary's socket is replaced by
/// one with the same owner and mode.
pub(super) fn restore_all(
    sockets: &[(ObjectId, &UnixSocket)],
) -> Result<Vec<(ObjectId, OwnedFd)>, Error> {
    let mut making = Making {
        states: sockets.iter().map(|(_, state)| *state).collect(),
        by_inode: sockets
            .iter()
            .enumerate()
            .map(|(index, (_, state))| (state.inode, index))
            .collect(),
        made: sockets.iter().map(|_| None).collect(),
    };
    // Names first, so that the others find them.
    for index in 0..sockets.len() {
        if !making.states[index].connected {
            making.make_unconnected(index)?;
        }
    }
    for index in 0..sockets.len() {
        if making.made[index].is_none() {
            making.make_connected(index)?;
        }
    }
    for state in &making.states {
        making.fill(state)?;
    }
    for (state, fd) in making.states.iter().zip(&making.made) {
        if let Some(fd) = fd {
            finish(fd.as_fd(), state)?;
        }
    }
    Ok(sockets
        .iter()
        .zip(making.made)
        .filter_map(|((id, _), fd)| Some((*id, fd?)))
        .collect())
}

struct Making<'a> {
    states: Vec<&'a UnixSocket>,
    by_inode: HashMap<u64, usize>,
    made: Vec<Option<OwnedFd>>,
}

impl Making<'_> {
    fn make_unconnected(&mut self, index: usize) -> Result<(), Error> {
        let state = self.states[index];
        let fd = open(state.kind)?;
        // SO_PASSCRED on an unnamed socket would give it a name (autobind), so options wait.
        if let Some(local) = &state.local {
            bind(fd.as_fd(), local)?;
        }
        if let Some(backlog) = state.backlog {
            socket::listen(fd.as_fd(), backlog).during("listen", SUBJECT)?;
        }
        self.made[index] = Some(fd);
        Ok(())
    }

    fn make_connected(&mut self, index: usize) -> Result<(), Error> {
        let state = self.states[index];
        match state
            .peer_inode
            .and_then(|inode| self.by_inode.get(&inode).copied())
        {
            Some(peer) if self.states[peer].peer_inode == Some(state.inode) => {
                self.make_pair(index, peer)
            }
            _ if waits_for_accept(state) => self.make_waiting(index),
            _ if is_abandoned(state) => self.make_abandoned(index),
            _ => self.make_sender(index),
        }
    }

    /// Both ends of a connection. One that came through a listener goes through it again, as the
    /// accepted end has the listener's name and could not be bound to it beside the listener.
    fn make_pair(&mut self, one: usize, other: usize) -> Result<(), Error> {
        for (client, accepted) in [(one, other), (other, one)] {
            let Some(listener) = self.listener_named(self.states[accepted].local.as_ref()) else {
                continue;
            };
            let fd = open(self.states[client].kind)?;
            if let Some(local) = &self.states[client].local {
                bind(fd.as_fd(), local)?;
            }
            connect(fd.as_fd(), self.states[accepted].local.as_ref())?;
            let end = unix::accept(listener).during("accept", SUBJECT)?;
            self.made[client] = Some(fd);
            self.made[accepted] = Some(end);
            return Ok(());
        }
        let (first, second) =
            unix::pair(number_of(self.states[one].kind)).during("socketpair", SUBJECT)?;
        for (index, fd) in [(one, first), (other, second)] {
            if let Some(local) = &self.states[index].local {
                bind(fd.as_fd(), local)?;
            }
            self.made[index] = Some(fd);
        }
        Ok(())
    }

    /// A datagram socket that sends to a name, in the tree or outside of it.
    fn make_sender(&mut self, index: usize) -> Result<(), Error> {
        let state = self.states[index];
        let fd = open(state.kind)?;
        if let Some(local) = &state.local {
            bind(fd.as_fd(), local)?;
        }
        match connect(fd.as_fd(), state.connected_to.as_ref()) {
            // The log daemon may be down, as it may be for any sender: sends fail, and the service
            // connects again, as it does then.
            Err(Error::Kernel { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) => {}
            other => other?,
        }
        self.made[index] = Some(fd);
        Ok(())
    }

    /// The client of a connection that its listener has still to accept.
    fn make_waiting(&mut self, index: usize) -> Result<(), Error> {
        let state = self.states[index];
        let fd = open(state.kind)?;
        if let Some(local) = &state.local {
            bind(fd.as_fd(), local)?;
        }
        connect(fd.as_fd(), state.connected_to.as_ref())?;
        self.made[index] = Some(fd);
        Ok(())
    }

    /// An end whose peer is closed: what it left unread, then the end.
    fn make_abandoned(&mut self, index: usize) -> Result<(), Error> {
        let state = self.states[index];
        let (fd, peer) = unix::pair(number_of(state.kind)).during("socketpair", SUBJECT)?;
        if state.kind == UnixKind::Datagram
            && let Some(local) = &state.local
        {
            bind(fd.as_fd(), local)?;
        }
        send_all(peer.as_fd(), &state.queue)?;
        self.made[index] = Some(fd);
        Ok(())
    }

    /// Writes the unread messages of a socket from its other end.
    fn fill(&self, state: &UnixSocket) -> Result<(), Error> {
        if state.queue.is_empty() {
            return Ok(());
        }
        let peer = state.peer_inode.and_then(|inode| self.by_inode.get(&inode));
        if let Some(peer) = peer
            && self.states[*peer].peer_inode == Some(state.inode)
        {
            return self.made[*peer]
                .as_ref()
                .map_or(Ok(()), |fd| send_all(fd.as_fd(), &state.queue));
        }
        if state.kind == UnixKind::Datagram && !is_abandoned(state) {
            let sender = open(state.kind)?;
            connect(sender.as_fd(), state.local.as_ref())?;
            return send_all(sender.as_fd(), &state.queue);
        }
        // make_abandoned has filled what has no other end.
        Ok(())
    }

    fn listener_named(&self, local: Option<&UnixAddress>) -> Option<BorrowedFd<'_>> {
        let local = local?;
        let index = self
            .states
            .iter()
            .position(|state| state.backlog.is_some() && state.local.as_ref() == Some(local))?;
        self.made[index].as_ref().map(AsFd::as_fd)
    }
}

/// Whether the socket's peer is closed, and with it all that could be sent to. A datagram socket may
/// be connected to a name, which outlives the socket that had it.
fn is_abandoned(state: &UnixSocket) -> bool {
    let can_send = state.kind == UnixKind::Datagram && state.connected_to.is_some();
    state.connected && state.peer_inode.is_none() && !can_send
}

fn open(kind: UnixKind) -> Result<OwnedFd, Error> {
    socket::open(libc::AF_UNIX, number_of(kind), 0).during("create", SUBJECT)
}

fn connect(fd: BorrowedFd<'_>, to: Option<&UnixAddress>) -> Result<(), Error> {
    let Some(to) = to else {
        return Err(io::Error::from_raw_os_error(libc::EDESTADDRREQ)).during("connect", SUBJECT);
    };
    within_directory_of(to, || {
        unix::connect(fd, &name(to)).during("connect", SUBJECT)
    })
}

/// Binds, taking the path over from the file of a socket that is no more.
fn bind(fd: BorrowedFd<'_>, to: &UnixAddress) -> Result<(), Error> {
    let path = match to {
        UnixAddress::Path(path) | UnixAddress::Relative { path, .. } => path,
        UnixAddress::Abstract(_) => return unix::bind(fd, &name(to)).during("bind", SUBJECT),
    };
    within_directory_of(to, || bind_to_path(fd, path))
}

/// Runs `work` where a relative path begins. The working directory is the calling thread's own, as
/// its mount namespace is (setns(2)).
fn within_directory_of<T>(
    address: &UnixAddress,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let UnixAddress::Relative { directory, .. } = address else {
        return work();
    };
    let before = env::current_dir().during("read", "the working directory")?;
    env::set_current_dir(directory).during("enter", directory)?;
    let result = work();
    env::set_current_dir(&before).during("enter", before.display())?;
    result
}

fn bind_to_path(fd: BorrowedFd<'_>, path: &str) -> Result<(), Error> {
    let old = fs::symlink_metadata(path)
        .ok()
        .filter(|old| old.file_type().is_socket());
    if old.is_some() {
        fs::remove_file(path).during("replace the file", SUBJECT)?;
    }
    let bound_name = Name::Path(path.as_bytes().to_vec());
    unix::bind(fd, &bound_name).during("bind", SUBJECT)?;
    if let Some(old) = old {
        chown(path, Some(old.uid()), Some(old.gid())).during("chown", SUBJECT)?;
        let mode = fs::Permissions::from_mode(old.mode() & 0o7777);
        fs::set_permissions(path, mode).during("chmod", SUBJECT)?;
    }
    Ok(())
}

/// Sends all messages, with a buffer that holds them, which is put back.
fn send_all(fd: BorrowedFd<'_>, queue: &[UnixMessage]) -> Result<(), Error> {
    let before = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_SNDBUF)
        .during("read SO_SNDBUF", SUBJECT)?;
    let lock = sockopt::get_i32(fd, libc::SOL_SOCKET, sockopt::SO_BUF_LOCK)
        .during("read SO_BUF_LOCK", SUBJECT)?;
    let force = |bytes| {
        sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes)
            .during("set SO_SNDBUF", SUBJECT)
    };
    // Each message costs its bookkeeping as well, which a small one exceeds.
    let wanted: usize = queue.iter().map(|message| message.bytes.len() + 1024).sum();
    force(i32::try_from(wanted * 2).unwrap_or(i32::MAX / 2))?;
    for message in queue {
        let mut rest = message.bytes.as_slice();
        loop {
            let sent = socket::send(fd, rest, libc::MSG_DONTWAIT)
                .during("write the unread messages", SUBJECT)?;
            rest = &rest[sent..];
            if rest.is_empty() {
                break;
            }
        }
    }
    force(before / 2)?;
    sockopt::set_i32(fd, libc::SOL_SOCKET, sockopt::SO_BUF_LOCK, lock)
        .during("put SO_BUF_LOCK back", SUBJECT)
}

fn finish(fd: BorrowedFd<'_>, state: &UnixSocket) -> Result<(), Error> {
    for moment in [Moment::BeforeBind, Moment::AfterConnect, Moment::Last] {
        socket_options::apply(fd, &state.socket_options, moment, SUBJECT)?;
    }
    // Shutting one end shuts the other for the opposite way, which the kernel had done before too.
    let how = match state.shutdown {
        1 => Some(libc::SHUT_RD),
        2 => Some(libc::SHUT_WR),
        3 => Some(libc::SHUT_RDWR),
        _ => None,
    };
    if let Some(how) = how
        && state.backlog.is_none()
    {
        match socket::shutdown(fd, how) {
            // The peer that closed has shut it already.
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {}
            other => other.during("shutdown", SUBJECT)?,
        }
    }
    socket::set_status_flags(fd, state.flags).during("F_SETFL", SUBJECT)
}
