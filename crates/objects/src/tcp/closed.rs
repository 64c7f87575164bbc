//! A connection that is over while the service still holds its descriptor: it may have bytes to
//! read, then an error or the end of the stream. No option brings a socket there, only a peer; so
//! both ends are made on the loopback device, silently, and the peer hangs up.

use super::SUBJECT;
use super::queues::fill_queue;
use crate::socket_options::{self, Moment};
use crate::{Context, Error};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use unbroken_image::object::TcpConnection;
use unbroken_sys::tcp::{self, Queue, Repair, RepairWindow};
use unbroken_sys::{socket, sockopt};

/// Both ends talk to each other alone, so any numbers do.
const SERVICE_SEQUENCE: u32 = 0x1000_0000;
const PEER_SEQUENCE: u32 = 0x2000_0000;

const WINDOW_BYTES: u32 = 16 * 1024;

/// The peer's hanging up takes microseconds on the loopback device.
const PATIENCE: Duration = Duration::from_secs(2);

/// A socket that reads as `connection` would. Its names are of the loopback device: after the end
/// of a connection `getpeername` fails anyhow.
pub(super) fn restore(connection: &TcpConnection) -> Result<OwnedFd, Error> {
    let ip = loopback(connection.local);
    let service = end_on_loopback(connection.family, ip)?;
    let peer = end_on_loopback(connection.family, ip)?;
    let room = i32::try_from(connection.receive_queue.len() * 2).unwrap_or(i32::MAX / 2);
    sockopt::set_i32(
        service.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_RCVBUFFORCE,
        room.max(65536),
    )
    .during("raise SO_RCVBUF", SUBJECT)?;
    let read = PEER_SEQUENCE.wrapping_add(connection.receive_queue.len() as u32);
    join(
        service.as_fd(),
        peer.as_fd(),
        SERVICE_SEQUENCE,
        PEER_SEQUENCE,
    )?;
    join(peer.as_fd(), service.as_fd(), read, SERVICE_SEQUENCE)?;
    tcp::select_queue(service.as_fd(), Queue::Receive).during("select receive queue", SUBJECT)?;
    fill_queue(service.as_fd(), &connection.receive_queue)?;
    for (end, receive_next) in [(&service, read), (&peer, SERVICE_SEQUENCE)] {
        open_window(end.as_fd(), receive_next)?;
        tcp::repair(end.as_fd(), Repair::OffSilently).during("leave TCP repair mode", SUBJECT)?;
    }
    hang_up(service.as_fd(), peer, connection.error != 0)?;
    let options = &connection.socket_options;
    socket_options::apply(service.as_fd(), options, Moment::AfterConnect, SUBJECT)?;
    socket::set_status_flags(service.as_fd(), connection.flags).during("F_SETFL", SUBJECT)?;
    Ok(service)
}

/// Whether the pending error of a connection is reported by now, which the kernel does once; no
/// number tells.
pub(super) fn error_was_taken(
    fd: BorrowedFd<'_>,
    connection: &mut TcpConnection,
) -> Result<bool, Error> {
    if connection.error == 0 {
        return Ok(false);
    }
    let ready = socket::poll(fd, 0, Duration::ZERO).during("poll", SUBJECT)?;
    let is_taken = ready & libc::POLLERR == 0;
    if is_taken {
        connection.error = 0;
    }
    Ok(is_taken)
}

fn loopback(local: SocketAddr) -> IpAddr {
    match local.ip() {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => {
            Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()
        }
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// An unconnected socket in repair mode on a free port.
fn end_on_loopback(family: i32, ip: IpAddr) -> Result<OwnedFd, Error> {
    let end =
        socket::open(family, libc::SOCK_STREAM, libc::IPPROTO_TCP).during("create", SUBJECT)?;
    socket::bind(end.as_fd(), &SocketAddr::new(ip, 0)).during("bind to loopback", SUBJECT)?;
    tcp::repair(end.as_fd(), Repair::On)
        .during("enter TCP repair mode (needs CAP_NET_ADMIN)", SUBJECT)?;
    Ok(end)
}

fn join(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    send_sequence: u32,
    receive_sequence: u32,
) -> Result<(), Error> {
    for (queue, sequence) in [
        (Queue::Receive, receive_sequence),
        (Queue::Send, send_sequence),
    ] {
        tcp::select_queue(from, queue).during("select a queue", SUBJECT)?;
        tcp::set_queue_sequence(from, sequence).during("set TCP_QUEUE_SEQ", SUBJECT)?;
    }
    let to = socket::local_address(to).during("getsockname", SUBJECT)?;
    socket::connect(from, &to).during(
        "connect over loopback (the namespace's lo must be up)",
        SUBJECT,
    )
}

/// Without a handshake there is no window, and a FIN does not fit into none.
fn open_window(end: BorrowedFd<'_>, receive_next: u32) -> Result<(), Error> {
    let window = RepairWindow {
        snd_wl1: receive_next,
        snd_wnd: WINDOW_BYTES,
        max_window: WINDOW_BYTES,
        rcv_wnd: WINDOW_BYTES,
        rcv_wup: receive_next,
    };
    tcp::set_repair_window(end, &window).during("set TCP_REPAIR_WINDOW", SUBJECT)
}

/// Ends the connection by a reset when there is an error to report, by FINs when not.
fn hang_up(service: BorrowedFd<'_>, peer: OwnedFd, by_reset: bool) -> Result<(), Error> {
    if by_reset {
        // Linger on with no time: close resets (man 7 socket).
        let mut linger = [0; 8];
        linger[..4].copy_from_slice(&1i32.to_ne_bytes());
        sockopt::set(peer.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger)
            .during("set SO_LINGER", SUBJECT)?;
    } else {
        socket::shutdown(service, libc::SHUT_WR).during("shut down writing", SUBJECT)?;
        wait_for(peer.as_fd(), libc::POLLRDHUP)?;
    }
    drop(peer);
    wait_for(service, libc::POLLHUP)
}

fn wait_for(end: BorrowedFd<'_>, event: i16) -> Result<(), Error> {
    let ready = socket::poll(end, event, PATIENCE).during("poll", SUBJECT)?;
    if ready & event == 0 {
        return Err(std::io::Error::from(std::io::ErrorKind::TimedOut)).during(
            "wait for the end over loopback (the namespace's lo must be up)",
            SUBJECT,
        );
    }
    Ok(())
}
