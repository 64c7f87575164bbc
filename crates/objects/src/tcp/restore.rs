//! Building a connection in the replica's namespaces, in two steps: all sockets of a service must
//! stand, silent, before its network moves to them; only then may any of them speak.

use super::packets::{Inject, Resend, packets};
use super::plan::{OwnFin, Plan, View};
use super::queues::fill_queue;
use super::{SUBJECT, closed, is_inside, peer_fin_arrived};
use crate::socket_options::{self, Moment};
use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::{TcpConnection, TcpPhase};
use unbroken_sys::tcp::{self, Queue, Repair, RepairOption, RepairWindow, negotiated};
use unbroken_sys::{socket, sockopt};

/// Bounds of `TCP_MAXSEG` (include/net/tcp.h, TCP_MIN_MSS and MAX_TCP_WINDOW).
const MSS_RANGE: std::ops::RangeInclusive<u32> = 88..=32767;

/// A connection that stands in repair mode and has sent nothing. Dropping it makes it vanish
/// without a packet.
#[derive(Debug)]
pub struct Prepared {
    fd: OwnedFd,
    plan: Plan,
}

/// A connection that speaks, and the packets it needs to be where it was.
#[derive(Debug)]
pub struct Live {
    pub fd: OwnedFd,
    /// To inject into the service's device before anything of the client reaches it.
    pub inject: Option<Inject>,
    /// To send to the client. `None` for a connection that is still to be made, or is closed, or
    /// whose other end is in the same namespace.
    pub resend: Option<Resend>,
}

/// Builds `connection` on the calling thread's network namespace, which must have the local
/// address and a route to the peer. Sends nothing. Listeners must be restored before.
pub fn prepare(connection: &TcpConnection, view: View) -> Result<Prepared, Error> {
    let mut own_fin = OwnFin::of(connection);
    if is_inside(connection) && own_fin != OwnFin::None {
        // Nothing can be injected between two sockets of one namespace, and nothing needs to be:
        // each end shuts down once more and its FIN goes over the loopback device.
        own_fin = OwnFin::Unsent;
    }
    let mut plan = Plan {
        view,
        dropped_bytes: 0,
        client_window: connection.window.snd_wnd,
        own_fin,
        send_buffer_raised_from: None,
    };
    if connection.phase == TcpPhase::Closed {
        let fd = closed::restore(connection)?;
        return Ok(Prepared { fd, plan });
    }
    let fd = socket::open(connection.family, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        .during("create", SUBJECT)?;
    let socket = fd.as_fd();
    tcp::repair(socket, Repair::On)
        .during("enter TCP repair mode (needs CAP_NET_ADMIN)", SUBJECT)?;
    bind(socket, connection)?;
    if connection.phase == TcpPhase::SynSent {
        return Ok(Prepared { fd, plan });
    }
    plan.hear(connection);
    connect(socket, connection, &plan)?;
    let send_room = connection.send_queue.len() * 2;
    plan.send_buffer_raised_from = force_buffer(socket, libc::SO_SNDBUFFORCE, send_room)?;
    fill_queues(socket, connection, &plan)?;
    set_window(socket, connection, plan.client_window)?;
    socket_options::apply(
        socket,
        &connection.socket_options,
        Moment::AfterConnect,
        SUBJECT,
    )?;
    if connection.corked {
        sockopt::set_i32(socket, libc::IPPROTO_TCP, libc::TCP_CORK, 1)
            .during("set TCP_CORK", SUBJECT)?;
    }
    if matches!(plan.own_fin, OwnFin::Sent | OwnFin::Acknowledged) {
        // With the send queue selected the FIN counts as sent without a packet
        // (net/ipv4/tcp_output.c, tcp_write_xmit).
        tcp::select_queue(socket, Queue::Send).during("select send queue", SUBJECT)?;
        socket::shutdown(socket, libc::SHUT_WR).during("shut down writing", SUBJECT)?;
    }
    Ok(Prepared { fd, plan })
}

impl Prepared {
    /// Leaves repair mode and writes what had not been sent, which may go out at once.
    /// `connection` is the one that this was prepared from.
    pub fn go_live(self, connection: &TcpConnection) -> Result<Live, Error> {
        let Prepared { fd, plan } = self;
        let socket = fd.as_fd();
        if connection.phase == TcpPhase::Closed {
            return Ok(Live {
                fd,
                inject: None,
                resend: None,
            });
        }
        if connection.phase == TcpPhase::SynSent {
            connect_again(socket, connection)?;
            return Ok(Live {
                fd,
                inject: None,
                resend: None,
            });
        }
        tcp::repair(socket, Repair::OffSilently).during("leave TCP repair mode", SUBJECT)?;
        let unsent = &connection.send_queue[connection.sent_bytes as usize..];
        write_unsent(socket, unsent)?;
        if plan.own_fin == OwnFin::Unsent {
            socket::shutdown(socket, libc::SHUT_WR).during("shut down writing", SUBJECT)?;
        }
        if connection.receive_shut && !peer_fin_arrived(connection.phase) {
            socket::shutdown(socket, libc::SHUT_RD).during("shut down reading", SUBJECT)?;
        }
        settle(socket, connection, plan.send_buffer_raised_from)?;
        if is_inside(connection) {
            return Ok(Live {
                fd,
                inject: None,
                resend: None,
            });
        }
        let (inject, resend) = packets(socket, connection, &plan)?;
        Ok(Live {
            fd,
            inject,
            resend: Some(resend),
        })
    }
}

/// Binds beside the listener and the other connections of the port, which repair mode's forced
/// reuse allows.
fn bind(socket: BorrowedFd<'_>, connection: &TcpConnection) -> Result<(), Error> {
    socket_options::apply(
        socket,
        &connection.socket_options,
        Moment::BeforeBind,
        SUBJECT,
    )?;
    match socket::bind(socket, &connection.local) {
        // An IPv6 address may still be tentative. IPV6_FREEBIND is the same bit of the socket
        // (net/ipv6/ipv6_sockglue.c).
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            let free_bind = |value| {
                sockopt::set_i32(socket, libc::IPPROTO_IP, libc::IP_FREEBIND, value)
                    .during("set IP_FREEBIND", SUBJECT)
            };
            free_bind(1)?;
            socket::bind(socket, &connection.local).during("bind", SUBJECT)?;
            free_bind(0)
        }
        other => other.during("bind", SUBJECT),
    }
}

/// Sequence numbers and the connection itself, then what its handshake had negotiated.
fn connect(socket: BorrowedFd<'_>, connection: &TcpConnection, plan: &Plan) -> Result<(), Error> {
    // The segment size is computed in connect, from the clamp that TCP_MAXSEG sets. Set later, the
    // first writes would be cut to the default of 536.
    let segment = connection
        .mss_clamp
        .clamp(*MSS_RANGE.start(), *MSS_RANGE.end());
    sockopt::set_i32(
        socket,
        libc::IPPROTO_TCP,
        libc::TCP_MAXSEG,
        segment.cast_signed(),
    )
    .during("set TCP_MAXSEG", SUBJECT)?;
    // The window clamp is computed in connect from the buffer's size.
    force_buffer(socket, libc::SO_RCVBUFFORCE, receive_room_bytes(connection))?;
    for (queue, sequence) in [
        (Queue::Receive, connection.receive_sequence),
        (Queue::Send, plan.first_sequence(connection)),
    ] {
        tcp::select_queue(socket, queue).during("select a queue", SUBJECT)?;
        tcp::set_queue_sequence(socket, sequence).during("set TCP_QUEUE_SEQ", SUBJECT)?;
    }
    socket::connect(socket, &connection.remote).during("connect under repair", SUBJECT)?;
    set_negotiated(socket, connection, plan.view.clock_offset_ns)
}

fn set_negotiated(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    clock_offset_ns: i64,
) -> Result<(), Error> {
    let has = |bit: u8| connection.options & u32::from(bit) != 0;
    let clamp = connection.mss_clamp.min(u32::from(u16::MAX)) as u16;
    let mut options = [RepairOption::MaximumSegment(clamp); 4];
    let mut count = 1;
    let scales = RepairOption::WindowScale {
        send: connection.send_window_scale,
        receive: connection.receive_window_scale,
    };
    for (bit, option) in [
        (negotiated::WINDOW_SCALE, scales),
        (negotiated::SACK, RepairOption::SackPermitted),
        (negotiated::TIMESTAMPS, RepairOption::Timestamps),
    ] {
        if has(bit) {
            options[count] = option;
            count += 1;
        }
    }
    tcp::set_repair_options(socket, &options[..count]).during("set TCP_REPAIR_OPTIONS", SUBJECT)?;
    if has(negotiated::TIMESTAMPS) {
        let now_ns = tcp::clock_ns().wrapping_add_signed(clock_offset_ns);
        tcp::set_timestamp(socket, timestamp_at(connection, now_ns))
            .during("set TCP_TIMESTAMP", SUBJECT)?;
    }
    Ok(())
}

/// The connection's timestamp clock at `now_ns`. Two ticks ahead, for what two roundings and the
/// missing lowest bit can take away: a value that went back would make the peer drop everything
/// (PAWS).
fn timestamp_at(connection: &TcpConnection, now_ns: u64) -> u32 {
    let elapsed_ns = now_ns.saturating_sub(connection.timestamp_read_at_ns);
    let microseconds = connection.options & u32::from(negotiated::MICROSECOND_TIMESTAMPS) != 0;
    let ticks = elapsed_ns / if microseconds { 1_000 } else { 1_000_000 } + 2;
    let now = connection.timestamp.wrapping_add(ticks as u32);
    // The lowest bit is the kernel's mark for microseconds.
    if microseconds {
        now | 1
    } else {
        now.wrapping_add(1) & !1
    }
}

/// Everything that the peer was told to have been received, and everything that was sent.
fn fill_queues(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    plan: &Plan,
) -> Result<(), Error> {
    let sent = &connection.send_queue[plan.dropped_bytes..connection.sent_bytes as usize];
    for (queue, bytes) in [
        (Queue::Receive, connection.receive_queue.as_slice()),
        (Queue::Send, sent),
    ] {
        if !bytes.is_empty() {
            tcp::select_queue(socket, queue).during("select a queue", SUBJECT)?;
            fill_queue(socket, bytes)?;
        }
    }
    Ok(())
}

fn set_window(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    client_window: u32,
) -> Result<(), Error> {
    let receive_next = connection
        .receive_sequence
        .wrapping_add(connection.receive_queue.len() as u32);
    let window = &connection.window;
    // A FIN to come takes one number out of the window that it had been received in.
    let fin = u32::from(peer_fin_arrived(connection.phase));
    let earlier = |sequence: u32| {
        let beyond = sequence.wrapping_sub(receive_next).cast_signed() > 0;
        if beyond { receive_next } else { sequence }
    };
    let window = RepairWindow {
        snd_wl1: earlier(window.snd_wl1),
        snd_wnd: client_window,
        max_window: window.max_window.max(client_window),
        rcv_wnd: window.rcv_wnd.saturating_add(fin),
        rcv_wup: earlier(window.rcv_wup.wrapping_sub(fin)),
    };
    tcp::set_repair_window(socket, &window).during("set TCP_REPAIR_WINDOW", SUBJECT)
}

/// Receive buffer that holds the queue and the offered window with room for the kernel's own
/// bookkeeping. With less, segments inside the window are dropped, the peer's acknowledgements
/// among them, and two writing sides wait for ever.
fn receive_room_bytes(connection: &TcpConnection) -> usize {
    2 * (connection.receive_queue.len() + connection.window.rcv_wnd as usize)
}

/// Raises a buffer to at least twice `bytes`, the kernel's measure of room for `bytes`. Returns
/// what `SO_SNDBUF` or `SO_RCVBUF` read before, when it was too small.
fn force_buffer(socket: BorrowedFd<'_>, name: i32, bytes: usize) -> Result<Option<i32>, Error> {
    let (read, operation) = if name == libc::SO_RCVBUFFORCE {
        (libc::SO_RCVBUF, "raise SO_RCVBUF")
    } else {
        (libc::SO_SNDBUF, "raise SO_SNDBUF")
    };
    let current = sockopt::get_i32(socket, libc::SOL_SOCKET, read).during(operation, SUBJECT)?;
    let wanted = i32::try_from(bytes)
        .unwrap_or(i32::MAX / 2)
        .min(i32::MAX / 2);
    if current / 2 >= wanted {
        return Ok(None);
    }
    sockopt::set_i32(socket, libc::SOL_SOCKET, name, wanted).during(operation, SUBJECT)?;
    Ok(Some(current))
}

fn write_unsent(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Error> {
    while !bytes.is_empty() {
        // The send buffer was forced large enough in fill_queues.
        let written = socket::send(socket, bytes, libc::MSG_DONTWAIT)
            .during("write the unsent part of the send queue", SUBJECT)?;
        bytes = &bytes[written..];
    }
    Ok(())
}

/// Puts back what the restore had needed otherwise.
fn settle(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    send_buffer_raised_from: Option<i32>,
) -> Result<(), Error> {
    let options = &connection.socket_options;
    if let Some(doubled_bytes) = send_buffer_raised_from {
        sockopt::set_i32(
            socket,
            libc::SOL_SOCKET,
            libc::SO_SNDBUFFORCE,
            doubled_bytes / 2,
        )
        .during("put SO_SNDBUF back", SUBJECT)?;
    }
    socket_options::apply(socket, options, Moment::Last, SUBJECT)?;
    let locked =
        |name, bit| socket_options::find(options, libc::SOL_SOCKET, name).map_or(0, |_| bit);
    let send_lock = locked(libc::SO_SNDBUFFORCE, sockopt::SEND_BUFFER_LOCKED);
    let receive_lock = locked(libc::SO_RCVBUFFORCE, sockopt::RECEIVE_BUFFER_LOCKED);
    if receive_lock != 0 {
        // Room for the queue and the window even where the service had locked less.
        force_buffer(socket, libc::SO_RCVBUFFORCE, receive_room_bytes(connection))?;
    }
    let lock = send_lock | receive_lock;
    sockopt::set_i32(socket, libc::SOL_SOCKET, sockopt::SO_BUF_LOCK, lock)
        .during("put SO_BUF_LOCK back", SUBJECT)?;
    socket::set_status_flags(socket, connection.flags).during("F_SETFL", SUBJECT)
}

/// A handshake that was under way starts again with the same first sequence number, so that an
/// answer to the first SYN still fits.
fn connect_again(socket: BorrowedFd<'_>, connection: &TcpConnection) -> Result<(), Error> {
    tcp::select_queue(socket, Queue::Send).during("select send queue", SUBJECT)?;
    tcp::set_queue_sequence(socket, connection.send_sequence)
        .during("set TCP_QUEUE_SEQ", SUBJECT)?;
    tcp::repair(socket, Repair::OffSilently).during("leave TCP repair mode", SUBJECT)?;
    let options = &connection.socket_options;
    socket_options::apply(socket, options, Moment::AfterConnect, SUBJECT)?;
    socket_options::apply(socket, options, Moment::Last, SUBJECT)?;
    socket::set_status_flags(socket, connection.flags | libc::O_NONBLOCK)
        .during("F_SETFL", SUBJECT)?;
    match socket::connect(socket, &connection.remote) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
            return Err(error).during("connect again", SUBJECT);
        }
        _ => {}
    }
    socket::set_status_flags(socket, connection.flags).during("F_SETFL", SUBJECT)
}
