//! Unix sockets: pairs and connections inside the tree, listeners, and datagram sockets connected
//! to a name outside of it, as `/dev/log`.
//!
//! What does not come back: credentials that `SO_PEERCRED` shows (the restored peer is ours), and
//! the names of those who sent datagrams that are still unread.

mod restore;

use crate::methods::{Capture, Inode, Look, Means, Methods, Reading};
use crate::restored::{Batch, Phase, Restored, Scene};
use crate::table::process::Holders;
use crate::{Context, Error, socket_options};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use unbroken_image::object::{UnixAddress, UnixKind, UnixMessage, UnixSocket};
use unbroken_image::{Object, ObjectId};
use unbroken_sys::unix::{self, Diag, Name};
use unbroken_sys::{socket, sockopt};

pub(crate) const METHODS: Methods = Methods {
    inode: Inode::Unique,
    is_volatile: |_| true,
    look,
    refuse: |object, others| match object {
        Object::UnixSocket(state) => refuse(state, others.has_socket),
        _ => Ok(()),
    },
    ..Methods::new(
        Capture::Descriptor(|reading, fd, means| {
            let diag = means.tools.unix_diag(fd)?;
            let mut state = capture(fd, diag)?;
            find_directory(&mut state, diag, &means.holders)?;
            reading.state = Some(Object::UnixSocket(state));
            Ok(())
        }),
        &[(Phase::Make, make)],
    )
};

fn look(reading: &mut Reading, means: &mut Means<'_>) -> Result<Look, Error> {
    let (Some(Object::UnixSocket(state)), Some(fd)) =
        (&mut reading.state, means.holders.duplicate()?)
    else {
        return Ok(Look::Unknown);
    };
    let diag = means.tools.unix_diag(fd.as_fd())?;
    match capture_into(fd.as_fd(), diag, state)? {
        true => Ok(Look::Refreshed),
        false => Ok(Look::Same),
    }
}

fn make(batch: &Batch<'_>, _: &Scene, restored: &mut Restored) -> Result<(), Error> {
    let sockets: Vec<(ObjectId, &UnixSocket)> = batch
        .iter()
        .filter_map(|(id, object)| match object {
            Object::UnixSocket(state) => Some((*id, state)),
            _ => None,
        })
        .collect();
    restored.descriptors.extend(restore::restore_all(&sockets)?);
    Ok(())
}

/// How errors call a socket of this module.
const SUBJECT: &str = "on a Unix socket";

/// Room for one peek at a stream.
const PEEK_BYTES: usize = 64 * 1024;

/// Reads a socket, unread messages included, and leaves it as it is. `diag` was opened in the
/// service's network namespace ([`Diag::of_namespace`]).
///
/// `Refused` when unread messages carry descriptors, or bytes wait in a connection that nobody has
/// accepted.
pub fn capture(fd: BorrowedFd<'_>, diag: &mut Diag) -> Result<UnixSocket, Error> {
    let kind =
        sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_TYPE).during("read SO_TYPE", SUBJECT)?;
    let inode = socket::inode(fd).during("fstat", SUBJECT)?;
    let facts = diag.query(inode).during("ask sock_diag", SUBJECT)?;
    let connected = facts.peer_inode.is_some();
    let mut state = UnixSocket {
        kind: kind_of(kind)?,
        flags: socket::status_flags(fd).during("F_GETFL", SUBJECT)?,
        inode,
        peer_inode: facts.peer_inode.filter(|inode| *inode != 0),
        connected,
        local: address(unix::local_name(fd).during("getsockname", SUBJECT)?)?,
        connected_to: None,
        backlog: facts.listening.then_some(facts.limit.cast_signed()),
        queue: Vec::new(),
        shutdown: facts.shutdown,
        socket_options: socket_options::capture(fd, libc::AF_UNIX, kind)?,
    };
    if connected {
        state.connected_to = address(unix::peer_name(fd).during("getpeername", SUBJECT)?)?;
    }
    if !facts.listening {
        capture_queue(fd, state.kind, &mut state.queue)?;
    }
    if waits_for_accept(&state) && facts.limit != 0 {
        return Err(Error::refused(
            "bytes sent on a Unix connection that is not accepted yet",
            "they have no descriptor that they could be read from",
        ));
    }
    Ok(state)
}

/// Reads the socket again into its `state` when the peer may have done something; says whether
/// anything did change. A socket at rest costs one `poll`.
pub fn capture_into(
    fd: BorrowedFd<'_>,
    diag: &mut Diag,
    state: &mut UnixSocket,
) -> Result<bool, Error> {
    let at_rest = state.queue.is_empty()
        && state.shutdown == 0
        && (!state.connected || state.peer_inode.is_some());
    if at_rest {
        // A listener's input is connections to accept, which are not its state.
        let events = if state.backlog.is_some() {
            0
        } else {
            libc::POLLIN | libc::POLLRDHUP
        };
        let ready = socket::poll(fd, events, Duration::ZERO).during("poll", SUBJECT)?;
        if ready & (libc::POLLIN | libc::POLLRDHUP) == 0 {
            return Ok(false);
        }
    }
    let mut now = capture(fd, diag)?;
    // A call that binds is announced.
    now.local.clone_from(&state.local);
    let changed = *state != now;
    *state = now;
    Ok(changed)
}

/// Finds where a relative path begins: the working directory of a process that holds the socket, if
/// the path leads from there to the very file that the socket is bound to.
fn find_directory(
    state: &mut UnixSocket,
    diag: &mut Diag,
    holders: &Holders<'_>,
) -> Result<(), Error> {
    let Some(UnixAddress::Path(path)) = &state.local else {
        return Ok(());
    };
    if path.starts_with('/') {
        return Ok(());
    }
    let facts = diag.query(state.inode).during("ask sock_diag", SUBJECT)?;
    let leads_to_it = |link: &Path| {
        let file = fs::symlink_metadata(link.join(path));
        file.is_ok_and(|file| facts.is_file(&file))
    };
    let host_pids = holders
        .slots
        .iter()
        .filter_map(|(pid, _)| holders.host_pid(*pid));
    let links = host_pids.map(|host_pid| PathBuf::from(format!("/proc/{host_pid}/cwd")));
    for link in links {
        if leads_to_it(&link)
            && let Ok(directory) = fs::read_link(&link)
            && let Some(directory) = directory.to_str()
        {
            state.local = Some(UnixAddress::Relative {
                directory: directory.to_owned(),
                path: path.clone(),
            });
            return Ok(());
        }
    }
    Ok(())
}

/// Whether the socket can be made again, as far as its names and its peer are concerned:
/// `has_socket` says which inodes are of the service's sockets.
pub(crate) fn refuse(socket: &UnixSocket, has_socket: &dyn Fn(u64) -> bool) -> Result<(), Error> {
    let is_relative = |name: &Option<UnixAddress>| matches!(name, Some(UnixAddress::Path(path)) if !path.starts_with('/'));
    if is_relative(&socket.local) {
        return Err(Error::refused(
            "a Unix socket bound to a relative path",
            "no process that has it open is in the directory that the path began in, or the file is \
             gone; have the service bind to an absolute path",
        ));
    }
    let connects = socket.kind == UnixKind::Datagram || waits_for_accept(socket);
    if connects && is_relative(&socket.connected_to) {
        return Err(Error::refused(
            "a Unix socket connected to a relative path",
            "what directory the path began in is not known; have the service connect to an \
             absolute path",
        ));
    }
    let outside = socket.peer_inode.is_some_and(|peer| !has_socket(peer));
    if outside && socket.kind != UnixKind::Datagram {
        return Err(Error::refused(
            "a Unix connection to a process outside the service",
            "the other end cannot be made to talk to the replica; have it connect over \
             TCP, or run it inside the service",
        ));
    }
    if outside && socket.connected_to.is_none() {
        return Err(Error::refused(
            "a datagram socket connected to a socket without a name outside the service",
            "there is nothing that the replica could connect to",
        ));
    }
    Ok(())
}

/// Connected by this side to a listener that has not accepted.
fn waits_for_accept(state: &UnixSocket) -> bool {
    state.kind != UnixKind::Datagram
        && state.connected
        && state.peer_inode.is_none()
        && state.shutdown == 0
}

fn kind_of(kind: i32) -> Result<UnixKind, Error> {
    match kind {
        libc::SOCK_STREAM => Ok(UnixKind::Stream),
        libc::SOCK_DGRAM => Ok(UnixKind::Datagram),
        libc::SOCK_SEQPACKET => Ok(UnixKind::SequencedPacket),
        _ => Err(Error::refused(
            "a Unix socket of an unknown type",
            "only streams, datagrams and sequenced packets are known",
        )),
    }
}

fn number_of(kind: UnixKind) -> i32 {
    match kind {
        UnixKind::Stream => libc::SOCK_STREAM,
        UnixKind::Datagram => libc::SOCK_DGRAM,
        UnixKind::SequencedPacket => libc::SOCK_SEQPACKET,
    }
}

fn address(name: Option<Name>) -> Result<Option<UnixAddress>, Error> {
    Ok(match name {
        None => None,
        Some(Name::Abstract(bytes)) => Some(UnixAddress::Abstract(bytes)),
        Some(Name::Path(bytes)) => {
            let path = String::from_utf8(bytes).map_err(|_| {
                Error::refused(
                    "a Unix socket whose path is not UTF-8",
                    "paths travel as text",
                )
            })?;
            Some(UnixAddress::Path(path))
        }
    })
}

fn name(address: &UnixAddress) -> Name {
    match address {
        UnixAddress::Path(path) | UnixAddress::Relative { path, .. } => {
            Name::Path(path.clone().into_bytes())
        }
        UnixAddress::Abstract(bytes) => Name::Abstract(bytes.clone()),
    }
}

/// Peeks at every unread message. The peek offset counts bytes and steps over whole messages that
/// lie before it (net/core/datagram.c, `__skb_try_recv_from_queue`), except that a message of no
/// bytes is stepped over too once it was peeked at: the first capture alone sees it.
fn capture_queue(
    fd: BorrowedFd<'_>,
    kind: UnixKind,
    queue: &mut Vec<UnixMessage>,
) -> Result<(), Error> {
    // SIOCINQ is the length of all unread bytes of a stream, of the first message otherwise.
    let unread = socket::unread_bytes(fd).during("read SIOCINQ", SUBJECT)?;
    if unread == 0 && kind == UnixKind::Stream {
        return Ok(());
    }
    let before = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)
        .during("read SO_PEEK_OFF", SUBJECT)?;
    let result = walk_queue(fd, kind, queue);
    set_peek_offset(fd, before)?;
    result
}

fn walk_queue(
    fd: BorrowedFd<'_>,
    kind: UnixKind,
    queue: &mut Vec<UnixMessage>,
) -> Result<(), Error> {
    let mut walked_bytes = 0;
    loop {
        set_peek_offset(fd, i32::try_from(walked_bytes).unwrap_or(i32::MAX))?;
        let mut bytes = Vec::new();
        let Some(mut peeked) = unix::peek(fd, &mut bytes, PEEK_BYTES).during("peek", SUBJECT)?
        else {
            return Ok(());
        };
        if peeked.length_bytes > bytes.len() {
            set_peek_offset(fd, i32::try_from(walked_bytes).unwrap_or(i32::MAX))?;
            bytes.clear();
            let again = unix::peek(fd, &mut bytes, peeked.length_bytes).during("peek", SUBJECT)?;
            peeked = again.unwrap_or(peeked);
        }
        if peeked.descriptors {
            return Err(Error::refused(
                "descriptors in flight on a Unix socket (SCM_RIGHTS)",
                "an unread message that carries descriptors cannot be made again; it will \
                      pass when the receiver reads it",
            ));
        }
        // The end of a connection reads as no bytes. An empty sequenced packet looks the same.
        if bytes.is_empty() && kind != UnixKind::Datagram {
            return Ok(());
        }
        walked_bytes += bytes.len();
        queue.push(UnixMessage { bytes });
    }
}

fn set_peek_offset(fd: BorrowedFd<'_>, offset: i32) -> Result<(), Error> {
    sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
        .during("set SO_PEEK_OFF", SUBJECT)
}
