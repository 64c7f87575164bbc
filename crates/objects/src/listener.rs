//! TCP sockets without a connection: listening, bound, or fresh.
//!
//! Connections in the accept queue have no descriptor and are not here: the node completes them
//! again on the restored listener by replaying the client's packets (SYN cookies).

use crate::socket_options::{self, Moment};
use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use unbroken_image::object::{SocketOption, TcpListener};
use unbroken_sys::tcp::{self, state};
use unbroken_sys::{socket, sockopt};

/// How errors call a socket of this module.
const SUBJECT: &str = "on a TCP listener";

/// Whether a TCP socket is one of this module: it listens, or it never had a connection. Others
/// are captured by [`crate::tcp`].
pub fn is_listener(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    let info = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
    if info.state == state::LISTEN {
        return Ok(true);
    }
    if info.state != state::CLOSE {
        return Ok(false);
    }
    // The end of a connection shuts both ways; a fresh socket is shut in none
    // (net/ipv4/tcp.c, tcp_poll).
    let ready = socket::poll(fd, libc::POLLRDHUP, Duration::ZERO).during("poll", SUBJECT)?;
    Ok(ready & libc::POLLRDHUP == 0)
}

/// Reads a listening, bound or fresh socket.
pub fn capture(fd: BorrowedFd<'_>) -> Result<TcpListener, Error> {
    let info = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
    let listening = info.state == state::LISTEN;
    let protocol = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)
        .during("read SO_PROTOCOL", SUBJECT)?;
    if protocol != libc::IPPROTO_TCP {
        return Err(Error::refused(
            "a stream socket of a protocol other than TCP (as MPTCP or SCTP)",
            "its connections could not be restored",
        ));
    }
    let family = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)
        .during("read SO_DOMAIN", SUBJECT)?;
    let mut options = socket_options::capture(fd, family, libc::SOCK_STREAM)?;
    // TCP_MSS_DEFAULT of include/uapi/linux/tcp.h: what the service did not set.
    capture_option(fd, libc::TCP_MAXSEG, 536, &mut options)?;
    capture_option(fd, libc::TCP_CORK, 0, &mut options)?;
    Ok(TcpListener {
        family,
        flags: socket::status_flags(fd).during("F_GETFL", SUBJECT)?,
        local: socket::local_address(fd).during("getsockname", SUBJECT)?,
        // A listener answers its backlog there (net/ipv4/tcp.c, tcp_get_info).
        backlog: if listening {
            info.sacked.cast_signed()
        } else {
            0
        },
        socket_options: options,
        listening,
    })
}

/// These two mean something else once there is a connection, and are no plain options then.
fn capture_option(
    fd: BorrowedFd<'_>,
    name: i32,
    fresh: i32,
    options: &mut Vec<SocketOption>,
) -> Result<(), Error> {
    let value = sockopt::get_i32(fd, libc::IPPROTO_TCP, name)
        .during("read TCP_MAXSEG or TCP_CORK", SUBJECT)?;
    if value != fresh {
        options.push(SocketOption {
            level: libc::IPPROTO_TCP,
            name,
            value: value.to_ne_bytes().to_vec(),
        });
    }
    Ok(())
}

/// Makes the sockets again on the calling thread's network namespace, in their order. Before any
/// connection: a connection binds beside a listener by force, the other way round it would need
/// `SO_REUSEADDR` on both.
///
/// What let several of them have one port may have been switched off since. So all are bound before
/// any listens, with `SO_REUSEADDR`; and where a port has a second listener all on it get
/// `SO_REUSEPORT`, until they listen.
pub fn restore_all(states: &[&TcpListener]) -> Result<Vec<OwnedFd>, Error> {
    let sockets = states
        .iter()
        .map(|state| bind(state).map_err(|error| of(state, error)))
        .collect::<Result<Vec<OwnedFd>, Error>>()?;
    for (state, socket) in states.iter().zip(&sockets) {
        if !state.listening {
            continue;
        }
        let listen = || socket::listen(socket.as_fd(), state.backlog);
        let mut listening = listen();
        if let Err(error) = &listening
            && error.raw_os_error() == Some(libc::EADDRINUSE)
        {
            let all = states.iter().zip(&sockets);
            for (_, other) in all.filter(|(other, _)| other.local.port() == state.local.port()) {
                set_reuse(other.as_fd(), libc::SO_REUSEPORT, 1)?;
            }
            listening = listen();
        }
        listening
            .during("listen", SUBJECT)
            .map_err(|error| of(state, error))?;
    }
    for (state, socket) in states.iter().zip(&sockets) {
        settle(socket.as_fd(), state).map_err(|error| of(state, error))?;
    }
    Ok(sockets)
}

fn of(state: &TcpListener, error: Error) -> Error {
    error.of(format!("listener {}", state.local))
}

fn bind(state: &TcpListener) -> Result<OwnedFd, Error> {
    let fd = socket::open(state.family, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        .during("create", SUBJECT)?;
    let options = &state.socket_options;
    socket_options::apply(fd.as_fd(), options, Moment::BeforeBind, SUBJECT)?;
    set_reuse(fd.as_fd(), libc::SO_REUSEADDR, 1)?;
    if state.local.port() != 0 {
        socket::bind(fd.as_fd(), &state.local).during("bind", SUBJECT)?;
    }
    // Accepted connections inherit from the listener, so everything stands before it listens.
    socket_options::apply(fd.as_fd(), options, Moment::AfterConnect, SUBJECT)?;
    Ok(fd)
}

fn settle(socket: BorrowedFd<'_>, state: &TcpListener) -> Result<(), Error> {
    let options = &state.socket_options;
    let shares_port = socket_options::find(options, libc::SOL_SOCKET, libc::SO_REUSEPORT);
    set_reuse(socket, libc::SO_REUSEPORT, shares_port.unwrap_or(0))?;
    set_reuse(socket, libc::SO_REUSEADDR, 0)?;
    socket_options::apply(socket, options, Moment::Last, SUBJECT)?;
    socket::set_status_flags(socket, state.flags).during("F_SETFL", SUBJECT)
}

fn set_reuse(socket: BorrowedFd<'_>, name: i32, value: i32) -> Result<(), Error> {
    sockopt::set_i32(socket, libc::SOL_SOCKET, name, value)
        .during("set SO_REUSEADDR or SO_REUSEPORT", SUBJECT)
}
