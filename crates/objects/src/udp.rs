//! UDP sockets. Unread datagrams are peeked at without consuming them, and put back as packets
//! over the restored namespace's loopback device.
//!
//! Not carried, as nothing shows it: multicast memberships, and a datagram under construction
//! (`MSG_MORE`).

use crate::methods::{Capture, Inode, Look, Means, Methods, Reading};
use crate::restored::{Batch, Phase, Restored, Scene};
use crate::socket_options::{self, Moment};
use crate::{Context, Error};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use unbroken_image::object::UdpSocket;
use unbroken_image::{Object, ObjectId};
use unbroken_sys::{socket, sockopt};

pub(crate) const METHODS: Methods = Methods {
    inode: Inode::Unique,
    is_volatile: |_| true,
    look,
    ..Methods::new(
        Capture::Descriptor(|reading, fd, means| {
            let mut state = capture(fd)?;
            state.shutdown = shutdown(fd, &state, means)?;
            reading.state = Some(Object::UdpSocket(state));
            Ok(())
        }),
        &[(Phase::Make, make)],
    )
};

/// `poll` tells of the reading side, and of the other only when both are shut down.
fn shutdown(fd: BorrowedFd<'_>, state: &UdpSocket, means: &mut Means<'_>) -> Result<u8, Error> {
    let told = match (state.local, state.remote) {
        (Some(local), Some(remote)) => means
            .tools
            .udp_diag(fd)?
            .shutdown(fd, local, remote)
            .during("ask sock_diag", SUBJECT)?,
        _ => None,
    };
    let ready = socket::poll(fd, libc::POLLRDHUP, Duration::ZERO).during("poll", SUBJECT)?;
    Ok(
        told.unwrap_or(match ready & (libc::POLLRDHUP | libc::POLLHUP) {
            0 => 0,
            libc::POLLRDHUP => 1,
            _ => 3,
        }),
    )
}

fn look(reading: &mut Reading, means: &mut Means<'_>) -> Result<Look, Error> {
    let (Some(Object::UdpSocket(state)), Some(fd)) =
        (&mut reading.state, means.holders.duplicate()?)
    else {
        return Ok(Look::Unknown);
    };
    match capture_queue_into(fd.as_fd(), state)? {
        true => Ok(Look::Refreshed),
        false => Ok(Look::Same),
    }
}

/// How errors call a socket of this module.
const SUBJECT: &str = "on a UDP socket";

/// Room for the largest datagram.
const DATAGRAM_BYTES: usize = 65536;

/// `UDP_CORK` of include/uapi/linux/udp.h.
const UDP_CORK: i32 = 1;

/// Reads a socket and leaves it as it is. `Refused` for protocols other than UDP and for a corked
/// socket.
pub fn capture(fd: BorrowedFd<'_>) -> Result<UdpSocket, Error> {
    let protocol = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)
        .during("read SO_PROTOCOL", SUBJECT)?;
    if protocol != libc::IPPROTO_UDP {
        return Err(Error::refused(
            "a datagram socket of a protocol other than UDP (as ICMP or UDP-Lite)",
            "its state is not known",
        ));
    }
    if sockopt::get_i32(fd, libc::IPPROTO_UDP, UDP_CORK).during("read UDP_CORK", SUBJECT)? != 0 {
        return Err(Error::refused(
            "a corked UDP socket",
            "the datagram under construction cannot be read back",
        ));
    }
    let family = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)
        .during("read SO_DOMAIN", SUBJECT)?;
    let local = socket::local_address(fd).during("getsockname", SUBJECT)?;
    let remote = match socket::peer_address(fd) {
        Ok(remote) => Some(remote),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => None,
        Err(error) => return Err(error).during("read SO_PEERNAME", SUBJECT),
    };
    let mut state = UdpSocket {
        family,
        flags: socket::status_flags(fd).during("F_GETFL", SUBJECT)?,
        local: (local.port() != 0).then_some(local),
        remote,
        socket_options: socket_options::capture(fd, family, libc::SOCK_DGRAM)?,
        queue: Vec::new(),
        shutdown: 0,
    };
    capture_queue(fd, &mut state.queue)?;
    Ok(state)
}

/// Reads the unread datagrams again, into the `state` of the same socket; says whether they are
/// others. What else there is changes by announced calls alone (`bind`, `connect`, `setsockopt`,
/// `fcntl`).
pub fn capture_queue_into(fd: BorrowedFd<'_>, state: &mut UdpSocket) -> Result<bool, Error> {
    if state.queue.is_empty() && !has_input(fd)? {
        return Ok(false);
    }
    let before = std::mem::take(&mut state.queue);
    capture_queue(fd, &mut state.queue)?;
    Ok(state.queue != before)
}

/// SIOCINQ would not do: it is the first datagram's length, and 0 also for an empty one.
fn has_input(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    let ready = socket::poll(fd, libc::POLLIN, Duration::ZERO).during("poll", SUBJECT)?;
    Ok(ready & libc::POLLIN != 0)
}

fn capture_queue(fd: BorrowedFd<'_>, queue: &mut Vec<(SocketAddr, Vec<u8>)>) -> Result<(), Error> {
    if !has_input(fd)? {
        return Ok(());
    }
    let before = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)
        .during("read SO_PEEK_OFF", SUBJECT)?;
    let result = walk_queue(fd, queue);
    set_peek_offset(fd, before)?;
    result
}

/// The peek offset counts bytes and steps over whole datagrams before it (net/core/datagram.c,
/// `__skb_try_recv_from_queue`), except that an empty one is stepped over too once it was peeked
/// at: the first capture alone sees it.
fn walk_queue(fd: BorrowedFd<'_>, queue: &mut Vec<(SocketAddr, Vec<u8>)>) -> Result<(), Error> {
    let mut walked_bytes = 0;
    let mut buffer = Vec::with_capacity(DATAGRAM_BYTES);
    loop {
        set_peek_offset(fd, walked_bytes)?;
        buffer.clear();
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        match socket::receive_from(fd, &mut buffer, DATAGRAM_BYTES, flags) {
            Ok(source) => {
                walked_bytes = walked_bytes.saturating_add(buffer.len() as i32);
                queue.push((source, buffer.clone()));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).during("peek at the queue", SUBJECT),
        }
    }
}

fn set_peek_offset(fd: BorrowedFd<'_>, offset: i32) -> Result<(), Error> {
    sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
        .during("set SO_PEEK_OFF", SUBJECT)
}

fn make(batch: &Batch<'_>, _: &Scene, restored: &mut Restored) -> Result<(), Error> {
    let (ids, states): (Vec<ObjectId>, Vec<&UdpSocket>) = batch
        .iter()
        .filter_map(|(id, object)| match object {
            Object::UdpSocket(state) => Some((*id, state)),
            _ => None,
        })
        .unzip();
    let sockets = restore_all(&states)?;
    restored.descriptors.extend(ids.into_iter().zip(sockets));
    Ok(())
}

/// Makes the sockets again on the calling thread's network namespace, in their order, unread
/// datagrams included. What let several of them have one address may have been switched off since,
/// so all are bound with `SO_REUSEADDR` first; and all are connected before any gets its datagrams,
/// which go to the socket that fits best.
pub fn restore_all(states: &[&UdpSocket]) -> Result<Vec<OwnedFd>, Error> {
    let sockets = states.iter().map(|state| bind(state));
    let sockets = sockets.collect::<Result<Vec<OwnedFd>, Error>>()?;
    let all = || states.iter().zip(&sockets);
    all().try_for_each(|(state, socket)| connect(socket.as_fd(), state))?;
    for (state, _) in all() {
        if let Some(local) = state.local {
            for (source, bytes) in &state.queue {
                deliver(*source, local, bytes)?;
            }
        }
    }
    for (state, socket) in all() {
        shut_down(socket.as_fd(), state.shutdown)?;
        socket::set_status_flags(socket.as_fd(), state.flags).during("F_SETFL", SUBJECT)?;
    }
    Ok(sockets)
}

fn bind(state: &UdpSocket) -> Result<OwnedFd, Error> {
    let fd = socket::open(state.family, libc::SOCK_DGRAM, libc::IPPROTO_UDP)
        .during("create", SUBJECT)?;
    let options = &state.socket_options;
    socket_options::apply(fd.as_fd(), options, Moment::BeforeBind, SUBJECT)?;
    set_reuse_address(fd.as_fd(), 1)?;
    if let Some(local) = &state.local {
        socket::bind(fd.as_fd(), local).during("bind", SUBJECT)?;
    }
    Ok(fd)
}

fn connect(socket: BorrowedFd<'_>, state: &UdpSocket) -> Result<(), Error> {
    set_reuse_address(socket, 0)?;
    if let Some(remote) = &state.remote {
        socket::connect(socket, remote).during("connect", SUBJECT)?;
    }
    let options = &state.socket_options;
    socket_options::apply(socket, options, Moment::AfterConnect, SUBJECT)?;
    socket_options::apply(socket, options, Moment::Last, SUBJECT)
}

fn set_reuse_address(socket: BorrowedFd<'_>, value: i32) -> Result<(), Error> {
    sockopt::set_i32(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, value)
        .during("set SO_REUSEADDR", SUBJECT)
}

fn shut_down(socket: BorrowedFd<'_>, shutdown: u8) -> Result<(), Error> {
    let how = match shutdown {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 => libc::SHUT_RDWR,
        _ => return Ok(()),
    };
    match socket::shutdown(socket, how) {
        // Without a peer it is done all the same (net/ipv4/af_inet.c, inet_shutdown).
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(()),
        other => other.during("shut down", SUBJECT),
    }
}

/// Sends a datagram as if from `source` to a socket of this namespace. A raw socket may name any
/// source, and what goes to a local address comes back over the loopback device with its route, so
/// no check of the source is made (net/ipv4/ip_input.c).
fn deliver(source: SocketAddr, local: SocketAddr, bytes: &[u8]) -> Result<(), Error> {
    let port = local.port();
    let source = SocketAddr::new(source.ip().to_canonical(), source.port());
    let (family, destination, packet) = match (source.ip(), local.ip().to_canonical()) {
        (IpAddr::V4(from), to) => {
            let to = match to {
                IpAddr::V4(to) if !to.is_unspecified() => to,
                _ => Ipv4Addr::LOCALHOST,
            };
            (
                libc::AF_INET,
                IpAddr::V4(to),
                packet_v4(from, source.port(), to, port, bytes),
            )
        }
        (IpAddr::V6(from), to) => {
            let to = match to {
                IpAddr::V6(to) if !to.is_unspecified() => to,
                _ => Ipv6Addr::LOCALHOST,
            };
            (
                libc::AF_INET6,
                IpAddr::V6(to),
                packet_v6(from, source.port(), to, port, bytes),
            )
        }
    };
    let raw = socket::open(family, libc::SOCK_RAW, libc::IPPROTO_RAW).during(
        "create a raw socket (needs CAP_NET_RAW) for an unread datagram",
        SUBJECT,
    )?;
    socket::connect(raw.as_fd(), &SocketAddr::new(destination, 0))
        .during("route an unread datagram", SUBJECT)?;
    socket::send(raw.as_fd(), &packet, 0).during("deliver an unread datagram", SUBJECT)?;
    Ok(())
}

/// The kernel fills in the length and the header's checksum (man 7 raw); UDP over IPv4 does
/// without one of its own.
fn packet_v4(from: Ipv4Addr, from_port: u16, to: Ipv4Addr, port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, libc::IPPROTO_UDP as u8, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(udp_header(from_port, port, bytes, 0));
    packet.extend(bytes);
    packet
}

fn packet_v6(from: Ipv6Addr, from_port: u16, to: Ipv6Addr, port: u16, bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() + 8) as u16;
    let pseudo = [
        &from.octets()[..],
        &to.octets(),
        &u32::from(length).to_be_bytes(),
    ]
    .concat();
    let sum = ones_sum(&pseudo)
        + u32::from(libc::IPPROTO_UDP as u16)
        + ones_sum(&udp_header(from_port, port, bytes, 0))
        + ones_sum(bytes);
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    // 0 would mean that there is none, which IPv6 does not allow (RFC 8200, 8.1).
    let checksum = if checksum == 0 { 0xffff } else { checksum };
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([libc::IPPROTO_UDP as u8, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(udp_header(from_port, port, bytes, checksum));
    packet.extend(bytes);
    packet
}

fn udp_header(from_port: u16, port: u16, bytes: &[u8], checksum: u16) -> [u8; 8] {
    let mut header = [0; 8];
    header[..2].copy_from_slice(&from_port.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[4..6].copy_from_slice(&((bytes.len() + 8) as u16).to_be_bytes());
    header[6..].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// The sum of big-endian words; at most 2^15 of them, so it cannot overflow.
fn ones_sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum()
}
