//! Building a connection in the replica's namespaces, in two steps: all sockets of a service must
//! stand, silent, before its network moves to them; only then may any of them speak.

use super::{SUBJECT, closed, own_fin_is_open, peer_fin_arrived};
use crate::socket::{Context, SocketError};
use crate::socket_options::{self, Moment};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::{TcpConnection, TcpPhase};
use unbroken_sys::tcp::{self, Queue, Repair, RepairOption, RepairWindow, negotiated};
use unbroken_sys::{socket, sockopt};

/// Bounds of `TCP_MAXSEG` (include/net/tcp.h, TCP_MIN_MSS and MAX_TCP_WINDOW).
const MSS_RANGE: std::ops::RangeInclusive<u32> = 88..=32767;

/// Largest piece for one write into a queue under repair; the kernel allocates it in one go.
const QUEUE_CHUNK_BYTES: usize = 64 * 1024;

/// What the wire knows about the client beyond the committed epoch.
#[derive(Clone, Copy, Debug, Default)]
pub struct View {
    /// The highest acknowledgement that the client sent. It may cover bytes that the committed
    /// state still holds as unacknowledged; one beyond what was sent is ignored, as the kernel
    /// does.
    pub client_acknowledged: Option<u32>,
    /// The client's latest timestamp value; 0 when it is not known.
    pub client_timestamp: u32,
    /// The service's `CLOCK_MONOTONIC` minus ours: not 0 when the service lives in a time
    /// namespace of its own.
    pub clock_offset_ns: i64,
}

/// What to send to the client at once in place of what may have been lost with the primary: the
/// kernel itself would wait for a long timer. Addresses and numbers are as on the wire, from the
/// service to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resend {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// Sequence number of the first byte of `bytes`, or of the FIN, or of the next byte.
    pub sequence: u32,
    /// The part of `TcpConnection::send_queue` to send. Empty: one bare acknowledgement is still
    /// worth sending, as the primary's last one may have died at the gate.
    pub bytes: Range<usize>,
    /// A FIN follows the bytes.
    pub fin: bool,
    pub acknowledgement: u32,
    /// The header's window field: scaled down already.
    pub window: u16,
    /// Timestamp value and echo, when negotiated.
    pub timestamps: Option<(u32, u32)>,
    /// Most payload bytes of one segment.
    pub segment_bytes: u32,
}

/// One packet without payload to inject into the service's device, from the client to the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inject {
    /// The client's address.
    pub source: SocketAddr,
    /// The service's address.
    pub destination: SocketAddr,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub window: u16,
    pub timestamps: Option<(u32, u32)>,
    /// FIN and ACK when set, ACK alone when not.
    pub fin: bool,
}

/// A connection that stands in repair mode and has sent nothing. Dropping it makes it vanish
/// without a packet.
#[derive(Debug)]
pub struct Prepared<'a> {
    fd: OwnedFd,
    connection: &'a TcpConnection,
    plan: Plan,
}

/// What leaving repair mode still has to do.
#[derive(Clone, Copy, Debug)]
struct Plan {
    view: View,
    /// Bytes at the front of the queue that the client has acknowledged.
    dropped_bytes: usize,
    own_fin: OwnFin,
    /// The send buffer to put back: as the kernel chose it (doubled).
    send_buffer_bytes: i32,
}

/// This side's FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnFin {
    None,
    Unsent,
    Sent,
    Acknowledged,
}

/// A connection that speaks, and the packets it needs to be where it was.
#[derive(Debug)]
pub struct Live {
    pub fd: OwnedFd,
    /// To inject into the service's device before anything of the client reaches it.
    pub inject: Option<Inject>,
    /// To send to the client. `None` for a connection that is still to be made, or is closed.
    pub resend: Option<Resend>,
}

/// Builds `connection` on the calling thread's network namespace, which must have the local
/// address and a route to the peer. Sends nothing. Listeners must be restored before.
pub fn prepare(connection: &TcpConnection, view: View) -> Result<Prepared<'_>, SocketError> {
    let own_fin = own_fin(connection);
    let mut plan = Plan {
        view,
        dropped_bytes: 0,
        own_fin,
        send_buffer_bytes: 0,
    };
    if connection.phase == TcpPhase::Closed {
        let fd = closed::restore(connection)?;
        return Ok(Prepared {
            fd,
            connection,
            plan,
        });
    }
    let fd = socket::open(connection.family, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        .context("create", SUBJECT)?;
    let socket = fd.as_fd();
    tcp::repair(socket, Repair::On)
        .context("enter TCP repair mode (needs CAP_NET_ADMIN)", SUBJECT)?;
    bind(socket, connection)?;
    if connection.phase == TcpPhase::SynSent {
        return Ok(Prepared {
            fd,
            connection,
            plan,
        });
    }
    plan.drop_acknowledged(connection);
    connect(socket, connection, &plan)?;
    plan.send_buffer_bytes = sockopt::get_i32(socket, libc::SOL_SOCKET, libc::SO_SNDBUF)
        .context("read SO_SNDBUF", SUBJECT)?;
    fill_queues(socket, connection, &plan)?;
    set_window(socket, connection)?;
    socket_options::apply(
        socket,
        &connection.socket_options,
        Moment::AfterConnect,
        SUBJECT,
    )?;
    if connection.corked {
        sockopt::set_i32(socket, libc::IPPROTO_TCP, libc::TCP_CORK, 1)
            .context("set TCP_CORK", SUBJECT)?;
    }
    if matches!(plan.own_fin, OwnFin::Sent | OwnFin::Acknowledged) {
        // With the send queue selected the FIN counts as sent without a packet
        // (net/ipv4/tcp_output.c, tcp_write_xmit).
        tcp::select_queue(socket, Queue::Send).context("select send queue", SUBJECT)?;
        socket::shutdown(socket, libc::SHUT_WR).context("shut down writing", SUBJECT)?;
    }
    Ok(Prepared {
        fd,
        connection,
        plan,
    })
}

impl Prepared<'_> {
    /// The socket, for what else must know it before it speaks.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Leaves repair mode and writes what had not been sent, which may go out at once.
    pub fn go_live(self) -> Result<Live, SocketError> {
        let Prepared {
            fd,
            connection,
            plan,
        } = self;
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
        tcp::repair(socket, Repair::OffSilently).context("leave TCP repair mode", SUBJECT)?;
        let unsent = &connection.send_queue[connection.sent_bytes as usize..];
        write_unsent(socket, unsent)?;
        if plan.own_fin == OwnFin::Unsent {
            socket::shutdown(socket, libc::SHUT_WR).context("shut down writing", SUBJECT)?;
        }
        if connection.receive_shut && !peer_fin_arrived(connection.phase) {
            socket::shutdown(socket, libc::SHUT_RD).context("shut down reading", SUBJECT)?;
        }
        settle(socket, connection, plan.send_buffer_bytes)?;
        let (inject, resend) = packets(socket, connection, &plan)?;
        Ok(Live {
            fd,
            inject,
            resend: Some(resend),
        })
    }
}

impl Plan {
    /// Sending again what the client has acknowledged would stall: its acknowledgements would lie
    /// beyond the replica's `snd_nxt` and be dropped.
    fn drop_acknowledged(&mut self, connection: &TcpConnection) {
        let Some(acknowledged) = self.view.client_acknowledged else {
            return;
        };
        let ahead = acknowledged.wrapping_sub(connection.send_sequence) as usize;
        let sent = connection.sent_bytes as usize;
        if ahead <= sent {
            self.dropped_bytes = ahead;
        } else if ahead == sent + 1 && self.own_fin == OwnFin::Sent {
            self.dropped_bytes = sent;
            self.own_fin = OwnFin::Acknowledged;
        }
    }

    /// Sequence number of the first byte that the restored send queue holds.
    fn first_sequence(&self, connection: &TcpConnection) -> u32 {
        // In FIN_WAIT2 snd_una is behind the FIN, which the restored socket goes through again.
        let fin = u32::from(connection.phase == TcpPhase::FinWait2);
        connection
            .send_sequence
            .wrapping_sub(fin)
            .wrapping_add(self.dropped_bytes as u32)
    }

    /// What the client has acknowledged as far as this side may show it.
    fn acknowledged(&self, connection: &TcpConnection) -> u32 {
        let fin = u32::from(self.own_fin == OwnFin::Acknowledged);
        self.first_sequence(connection).wrapping_add(fin)
    }
}

fn own_fin(connection: &TcpConnection) -> OwnFin {
    if connection.phase == TcpPhase::FinWait2 {
        OwnFin::Acknowledged
    } else if !own_fin_is_open(connection.phase) {
        OwnFin::None
    } else if connection.fin_sent {
        OwnFin::Sent
    } else {
        OwnFin::Unsent
    }
}

/// Binds beside the listener and the other connections of the port, which repair mode's forced
/// reuse allows.
pub(super) fn bind(socket: BorrowedFd<'_>, connection: &TcpConnection) -> Result<(), SocketError> {
    socket_options::apply(
        socket,
        &connection.socket_options,
        Moment::BeforeBind,
        SUBJECT,
    )?;
    // An IPv6 address may still be tentative.
    let transient = socket_options::find(
        &connection.socket_options,
        libc::IPPROTO_IP,
        libc::IP_FREEBIND,
    )
    .is_none();
    if transient {
        set_free_bind(socket, 1)?;
    }
    socket::bind(socket, &connection.local).context("bind", SUBJECT)?;
    if transient {
        set_free_bind(socket, 0)?;
    }
    Ok(())
}

fn set_free_bind(socket: BorrowedFd<'_>, value: i32) -> Result<(), SocketError> {
    // IPV6_FREEBIND is the same bit of the socket (net/ipv6/ipv6_sockglue.c).
    sockopt::set_i32(socket, libc::IPPROTO_IP, libc::IP_FREEBIND, value)
        .context("set IP_FREEBIND", SUBJECT)
}

/// Sequence numbers and the connection itself, then what its handshake had negotiated.
fn connect(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    plan: &Plan,
) -> Result<(), SocketError> {
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
    .context("set TCP_MAXSEG", SUBJECT)?;
    // The window clamp is computed in connect from the buffer's size.
    force_buffer(socket, libc::SO_RCVBUFFORCE, receive_room_bytes(connection))?;
    for (queue, sequence) in [
        (Queue::Receive, connection.receive_sequence),
        (Queue::Send, plan.first_sequence(connection)),
    ] {
        tcp::select_queue(socket, queue).context("select a queue", SUBJECT)?;
        tcp::set_queue_sequence(socket, sequence).context("set TCP_QUEUE_SEQ", SUBJECT)?;
    }
    socket::connect(socket, &connection.remote).context("connect under repair", SUBJECT)?;
    set_negotiated(socket, connection, plan.view.clock_offset_ns)
}

fn set_negotiated(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    clock_offset_ns: i64,
) -> Result<(), SocketError> {
    let has = |bit: u8| connection.options & u32::from(bit) != 0;
    let set =
        |option| tcp::set_repair_option(socket, option).context("set TCP_REPAIR_OPTIONS", SUBJECT);
    set(RepairOption::MaximumSegment(
        connection.mss_clamp.min(u32::from(u16::MAX)) as u16,
    ))?;
    if has(negotiated::WINDOW_SCALE) {
        set(RepairOption::WindowScale {
            send: connection.send_window_scale,
            receive: connection.receive_window_scale,
        })?;
    }
    if has(negotiated::SACK) {
        set(RepairOption::SackPermitted)?;
    }
    if has(negotiated::TIMESTAMPS) {
        set(RepairOption::Timestamps)?;
        let now_ns = tcp::clock_ns().wrapping_add_signed(clock_offset_ns);
        tcp::set_timestamp(socket, timestamp_at(connection, now_ns))
            .context("set TCP_TIMESTAMP", SUBJECT)?;
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
) -> Result<(), SocketError> {
    force_buffer(
        socket,
        libc::SO_SNDBUFFORCE,
        connection.send_queue.len() * 2,
    )?;
    let sent = &connection.send_queue[plan.dropped_bytes..connection.sent_bytes as usize];
    for (queue, bytes) in [
        (Queue::Receive, connection.receive_queue.as_slice()),
        (Queue::Send, sent),
    ] {
        tcp::select_queue(socket, queue).context("select a queue", SUBJECT)?;
        fill_queue(socket, bytes)?;
    }
    tcp::select_queue(socket, Queue::None).context("select no queue", SUBJECT)
}

pub(super) fn fill_queue(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), SocketError> {
    let mut chunk = QUEUE_CHUNK_BYTES;
    while !bytes.is_empty() {
        match socket::send(socket, &bytes[..bytes.len().min(chunk)], libc::MSG_DONTWAIT) {
            Ok(written) => bytes = &bytes[written..],
            // One allocation holds the piece; a smaller one may still be had.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && chunk > 1024 => chunk /= 2,
            Err(source) => {
                return Err(source).context("write a queue under repair", SUBJECT);
            }
        }
    }
    Ok(())
}

fn set_window(socket: BorrowedFd<'_>, connection: &TcpConnection) -> Result<(), SocketError> {
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
        snd_wnd: window.snd_wnd,
        max_window: window.max_window.max(window.snd_wnd),
        rcv_wnd: window.rcv_wnd.saturating_add(fin),
        rcv_wup: earlier(window.rcv_wup.wrapping_sub(fin)),
    };
    tcp::set_repair_window(socket, &window).context("set TCP_REPAIR_WINDOW", SUBJECT)
}

/// Receive buffer that holds the queue and the offered window with room for the kernel's own
/// bookkeeping. With less, segments inside the window are dropped, the peer's acknowledgements
/// among them, and two writing sides wait for ever.
fn receive_room_bytes(connection: &TcpConnection) -> usize {
    2 * (connection.receive_queue.len() + connection.window.rcv_wnd as usize)
}

/// Raises a buffer to at least twice `bytes`, the kernel's measure of room for `bytes`.
fn force_buffer(socket: BorrowedFd<'_>, name: i32, bytes: usize) -> Result<(), SocketError> {
    let (read, operation) = if name == libc::SO_RCVBUFFORCE {
        (libc::SO_RCVBUF, "raise SO_RCVBUF")
    } else {
        (libc::SO_SNDBUF, "raise SO_SNDBUF")
    };
    let current = sockopt::get_i32(socket, libc::SOL_SOCKET, read).context(operation, SUBJECT)?;
    let wanted = i32::try_from(bytes)
        .unwrap_or(i32::MAX / 2)
        .min(i32::MAX / 2);
    if current / 2 >= wanted {
        return Ok(());
    }
    sockopt::set_i32(socket, libc::SOL_SOCKET, name, wanted).context(operation, SUBJECT)
}

fn write_unsent(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), SocketError> {
    while !bytes.is_empty() {
        // The send buffer was forced large enough in fill_queues.
        let written = socket::send(socket, bytes, libc::MSG_DONTWAIT)
            .context("write the unsent part of the send queue", SUBJECT)?;
        bytes = &bytes[written..];
    }
    Ok(())
}

/// Puts back what the restore had needed otherwise.
fn settle(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    send_buffer_bytes: i32,
) -> Result<(), SocketError> {
    let options = &connection.socket_options;
    sockopt::set_i32(
        socket,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        send_buffer_bytes / 2,
    )
    .context("put SO_SNDBUF back", SUBJECT)?;
    socket_options::apply(socket, options, Moment::Last, SUBJECT)?;
    // Room for the queue and the window even where the service had locked less.
    force_buffer(socket, libc::SO_RCVBUFFORCE, receive_room_bytes(connection))?;
    let locked = |name, bit| {
        if socket_options::find(options, libc::SOL_SOCKET, name).is_some() {
            bit
        } else {
            0
        }
    };
    let lock = locked(libc::SO_SNDBUFFORCE, sockopt::SEND_BUFFER_LOCKED)
        | locked(libc::SO_RCVBUFFORCE, sockopt::RECEIVE_BUFFER_LOCKED);
    sockopt::set_i32(socket, libc::SOL_SOCKET, sockopt::SO_BUF_LOCK, lock)
        .context("put SO_BUF_LOCK back", SUBJECT)?;
    socket::set_status_flags(socket, connection.flags).context("F_SETFL", SUBJECT)
}

/// A handshake that was under way starts again with the same first sequence number, so that an
/// answer to the first SYN still fits.
fn connect_again(socket: BorrowedFd<'_>, connection: &TcpConnection) -> Result<(), SocketError> {
    tcp::select_queue(socket, Queue::Send).context("select send queue", SUBJECT)?;
    tcp::set_queue_sequence(socket, connection.send_sequence)
        .context("set TCP_QUEUE_SEQ", SUBJECT)?;
    tcp::repair(socket, Repair::OffSilently).context("leave TCP repair mode", SUBJECT)?;
    let options = &connection.socket_options;
    socket_options::apply(socket, options, Moment::AfterConnect, SUBJECT)?;
    socket_options::apply(socket, options, Moment::Last, SUBJECT)?;
    socket::set_status_flags(socket, connection.flags | libc::O_NONBLOCK)
        .context("F_SETFL", SUBJECT)?;
    match socket::connect(socket, &connection.remote) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
            return Err(error).context("connect again", SUBJECT);
        }
        _ => {}
    }
    socket::set_status_flags(socket, connection.flags).context("F_SETFL", SUBJECT)
}

/// The packet that brings the socket to its phase, and the one that brings the client up to date.
fn packets(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    plan: &Plan,
) -> Result<(Option<Inject>, Resend), SocketError> {
    let info = tcp::info(socket).context("read TCP_INFO", SUBJECT)?;
    let with_timestamps = connection.options & u32::from(negotiated::TIMESTAMPS) != 0;
    let clock = if with_timestamps {
        tcp::timestamp(socket).context("read TCP_TIMESTAMP", SUBJECT)?
    } else {
        0
    };
    // The peer drops a packet whose timestamps are missing, this side takes one; an invented value
    // of the client's clock could make it drop the client's real ones.
    let client = plan.view.client_timestamp;
    let peer_fin = peer_fin_arrived(connection.phase);
    let end = connection
        .receive_sequence
        .wrapping_add(connection.receive_queue.len() as u32);
    let window_field = |bytes: u32, scale: u8| (bytes >> scale).min(u32::from(u16::MAX)) as u16;
    let (local, remote) = (on_wire(connection.local), on_wire(connection.remote));

    let inject = (peer_fin || plan.own_fin == OwnFin::Acknowledged).then(|| Inject {
        source: remote,
        destination: local,
        sequence: end,
        acknowledgement: plan.acknowledged(connection),
        window: window_field(connection.window.snd_wnd, connection.send_window_scale),
        timestamps: (with_timestamps && client != 0).then_some((client, clock)),
        fin: peer_fin,
    });
    let timestamp_bytes = if with_timestamps { 12 } else { 0 };
    let resend = Resend {
        local,
        remote,
        sequence: plan.acknowledged(connection),
        bytes: plan.dropped_bytes..connection.sent_bytes as usize,
        fin: plan.own_fin == OwnFin::Sent,
        acknowledgement: end.wrapping_add(u32::from(peer_fin)),
        window: window_field(connection.window.rcv_wnd, connection.receive_window_scale),
        timestamps: with_timestamps.then_some((clock, client)),
        segment_bytes: info
            .send_mss
            .min(connection.mss_clamp.saturating_sub(timestamp_bytes))
            .max(1),
    };
    Ok((inject, resend))
}

/// A mapped address is IPv4 on the wire.
fn on_wire(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
