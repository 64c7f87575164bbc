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
    capture_segment_limit(fd, &mut options)?;
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

/// Without a connection `TCP_MAXSEG` reads what the service set, else the default.
fn capture_segment_limit(fd: BorrowedFd<'_>, options: &mut Vec<SocketOption>) -> Result<(), Error> {
    /// `TCP_MSS_DEFAULT` of include/uapi/linux/tcp.h.
    const DEFAULT_BYTES: i32 = 536;
    let bytes = sockopt::get_i32(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG)
        .during("read TCP_MAXSEG", SUBJECT)?;
    if bytes != DEFAULT_BYTES {
        options.push(SocketOption {
            level: libc::IPPROTO_TCP,
            name: libc::TCP_MAXSEG,
            value: bytes.to_ne_bytes().to_vec(),
        });
    }
    Ok(())
}

/// Makes the socket again on the calling thread's network namespace. Listeners go before
/// connections: a connection binds beside a listener by force, the other way round it would need
/// `SO_REUSEADDR` on both.
pub fn restore(state: &TcpListener) -> Result<OwnedFd, Error> {
    let fd = socket::open(state.family, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        .during("create", SUBJECT)?;
    let listener = fd.as_fd();
    socket_options::apply(listener, &state.socket_options, Moment::BeforeBind, SUBJECT)?;
    let reuse = |value| {
        sockopt::set_i32(listener, libc::SOL_SOCKET, libc::SO_REUSEADDR, value)
            .during("set SO_REUSEADDR", SUBJECT)
    };
    reuse(1)?;
    if state.local.port() != 0 {
        socket::bind(listener, &state.local).during("bind", SUBJECT)?;
    }
    // Accepted connections inherit from the listener, so everything stands before it listens.
    socket_options::apply(
        listener,
        &state.socket_options,
        Moment::AfterConnect,
        SUBJECT,
    )?;
    if state.listening {
        socket::listen(listener, state.backlog).during("listen", SUBJECT)?;
    }
    reuse(0)?;
    socket_options::apply(listener, &state.socket_options, Moment::Last, SUBJECT)?;
    socket::set_status_flags(listener, state.flags).during("F_SETFL", SUBJECT)?;
    Ok(fd)
}
