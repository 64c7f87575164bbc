//! Reading a connection from our own duplicate of its descriptor, while the service is stopped and
//! its input held.

use super::fingerprint::{Fingerprint, Seen, fingerprint_from};
use super::known::{Known, Sent};
use super::queues::{peek_inline, peek_send_queue, peek_stream};
use super::{SUBJECT, own_fin_is_open, peer_fin_arrived, phase_of};
use crate::socket_options;
use crate::{Context, Error};
use std::os::fd::BorrowedFd;
use std::time::Duration;
use unbroken_image::object::{SocketOption, TcpConnection, TcpPhase, TcpWindow};
use unbroken_sys::bpf::Record;
use unbroken_sys::tcp::{self, Info, Queue, Repair, negotiated, state};
use unbroken_sys::{socket, sockopt};

/// What the primary remembers of one connection between captures. It belongs to one kernel socket
/// and means nothing for another.
#[derive(Clone, Debug)]
pub struct Tracker {
    /// `snd_una - bytes_acked` and `rcv_nxt - bytes_received`: the kernel moves each pair together
    /// (net/ipv4/tcp_input.c, tcp_snd_una_update and tcp_rcv_nxt_update), so one reading of the
    /// sequence numbers serves for good.
    send_base: u32,
    receive_base: u32,
    max_window: u32,
    /// The numbers above are those that the handshake chose.
    handshake_done: bool,
    fingerprint: Fingerprint,
    /// Since when no look has shown anything new.
    pub(super) calm_since_ns: u64,
}

/// Reads a connection whole, options included. Uses repair mode for a moment, which sends nothing
/// and is undone; a socket found in repair mode, left so by a node that died, is taken out of it.
///
/// `Refused` for kTLS and MPTCP. The socket must not listen.
pub fn capture(fd: BorrowedFd<'_>) -> Result<(TcpConnection, Tracker), Error> {
    capture_known(fd, &Known::NOTHING)
}

/// [`capture`] that takes `options` for those of the connection.
pub(super) fn capture_with_options(
    fd: BorrowedFd<'_>,
    options: Vec<SocketOption>,
) -> Result<(TcpConnection, Tracker), Error> {
    undisturbed(|| capture_once(fd, Some(&options), &Known::NOTHING))
}

/// [`capture`] of a connection of which something is known already. Where that suffices the socket
/// is not put into repair mode: a service that runs on when whoever holds it is killed finds its
/// calls refused by a socket left there, and its client gets a reset.
pub fn capture_known(
    fd: BorrowedFd<'_>,
    known: &Known<'_>,
) -> Result<(TcpConnection, Tracker), Error> {
    undisturbed(|| capture_once(fd, None, known))
}

fn capture_once(
    fd: BorrowedFd<'_>,
    options: Option<&[SocketOption]>,
    known: &Known<'_>,
) -> Result<(TcpConnection, Tracker), Error> {
    let info = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
    let phase = phase_of(info.state).ok_or_else(|| {
        Error::refused(
            "a listening socket captured as a connection",
            "it has no peer; capture it as a listener",
        )
    })?;
    let family = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)
        .during("read SO_DOMAIN", SUBJECT)?;
    let mut connection = TcpConnection {
        family,
        flags: 0,
        phase,
        local: socket::local_address(fd).during("getsockname", SUBJECT)?,
        remote: socket::peer_address(fd).during("read SO_PEERNAME", SUBJECT)?,
        send_sequence: 0,
        send_queue: Vec::new(),
        sent_bytes: 0,
        fin_sent: false,
        receive_sequence: 0,
        receive_queue: Vec::new(),
        window: TcpWindow::default(),
        options: u32::from(info.options),
        mss_clamp: 0,
        send_window_scale: info.send_scale(),
        receive_window_scale: info.receive_scale(),
        timestamp: 0,
        timestamp_read_at_ns: 0,
        error: 0,
        corked: false,
        receive_shut: false,
        socket_options: Vec::new(),
    };
    let fingerprint = fingerprint_from(fd, &info)?;
    let mut tracker = Tracker {
        send_base: 0,
        receive_base: 0,
        max_window: 0,
        handshake_done: is_connected(phase) && info.state != state::SYN_RECEIVED,
        fingerprint,
        calm_since_ns: tcp::clock_ns(),
    };
    match options {
        None => read_attributes(fd, &mut connection)?,
        Some(options) => {
            connection.flags = socket::status_flags(fd).during("F_GETFL", SUBJECT)?;
            connection.socket_options.extend_from_slice(options);
        }
    }
    match known.record {
        _ if phase == TcpPhase::Closed => {}
        Some(record) if tracker.handshake_done && !is_in_repair(fd)? => {
            tracker.synchronise_by(record, &mut connection);
            read_clock(fd, &info, &mut connection)?;
        }
        _ => tracker.synchronise(fd, &info, &mut connection)?,
    }
    tracker.read(fd, &info, &mut connection, known)?;
    expect_unmoved(fd, &info)?;
    Ok((connection, tracker))
}

/// Reads anew until nothing moved meanwhile. Packets that the wire gave before a stop may still
/// wait for the kernel (ksoftirqd), and of a connection that is being closed the peer speaks on.
fn undisturbed<T>(mut read: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    const TRIES: usize = 32;
    for _ in 1..TRIES {
        match read() {
            Err(Error::Changed { .. }) => {}
            result => return result,
        }
    }
    read()
}

fn is_connected(phase: TcpPhase) -> bool {
    !matches!(phase, TcpPhase::SynSent | TcpPhase::Closed)
}

/// What was read belongs together if no packet came in between, and of a connection that is being
/// closed nothing was written: queues and sequence numbers are read one after the other.
fn expect_unmoved(fd: BorrowedFd<'_>, before: &Info) -> Result<(), Error> {
    let now = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
    let numbers = |info: &Info| {
        let sent = info.bytes_sent.wrapping_sub(info.bytes_retransmitted);
        let written = sent.wrapping_add(u64::from(info.not_sent_bytes));
        (info.state, info.bytes_acked, info.bytes_received, written)
    };
    if numbers(&now) == numbers(before) {
        return Ok(());
    }
    Err(Error::Changed {
        what: "sequence numbers of a TCP connection",
        expected_bytes: (before.bytes_acked + before.bytes_received) as usize,
        found_bytes: (now.bytes_acked + now.bytes_received) as usize,
    })
}

impl Tracker {
    /// Reads again what packets, reads and writes may have changed since the last capture of the
    /// same socket into the same `connection`, whose buffers are used again. Flags, options and a
    /// shut reading side are read only when `attributes_changed`: the calls that change them
    /// (`setsockopt`, `fcntl`, `ioctl`, `shutdown`) are announced.
    pub fn capture_into(
        &mut self,
        fd: BorrowedFd<'_>,
        connection: &mut TcpConnection,
        attributes_changed: bool,
    ) -> Result<(), Error> {
        undisturbed(|| {
            let info = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
            let fingerprint = fingerprint_from(fd, &info)?;
            let known = &Known::NOTHING;
            self.take(
                fd,
                &info,
                fingerprint,
                connection,
                attributes_changed,
                known,
            )
        })
    }

    /// As [`Tracker::capture_into`] without attributes, if anything moved; says whether it did.
    pub fn look(
        &mut self,
        fd: BorrowedFd<'_>,
        connection: &mut TcpConnection,
        known: &Known<'_>,
    ) -> Result<bool, Error> {
        let info = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
        let fingerprint = fingerprint_from(fd, &info)?;
        if fingerprint == self.fingerprint {
            return super::closed::error_was_taken(fd, connection);
        }
        // A FIN in flight may hide what was acknowledged beside it, and an urgent byte what lies
        // behind it.
        let is_plain =
            !phase_of(info.state).is_some_and(own_fin_is_open) && !is_at_mark(fd, known)?;
        if is_plain && self.take_from_outside(fingerprint, info.unacked, connection, known.sent) {
            return Ok(true);
        }
        match self.take(fd, &info, fingerprint, connection, false, known) {
            Err(Error::Changed { .. }) => self.capture_into(fd, connection, false)?,
            result => result?,
        }
        Ok(true)
    }

    /// As [`Tracker::look`] without a descriptor, from what a pass over all sockets said of this
    /// one; `Unclear` when the socket itself has to be asked.
    pub fn look_at(
        &mut self,
        record: &Record,
        connection: &mut TcpConnection,
        sent: Sent<'_>,
    ) -> Seen {
        // Another number base is another connection: the socket was connected anew.
        let is_known = bases(record) == (self.send_base, self.receive_base);
        if !is_known || !record.is_settled() || record.has_urgent_data() {
            return Seen::Unclear;
        }
        let fingerprint = Fingerprint::from(record);
        if fingerprint == self.fingerprint {
            // An error may have been taken, which no number shows.
            return match connection.error {
                0 => Seen::Unchanged,
                _ => Seen::Unclear,
            };
        }
        match self.take_from_outside(fingerprint, record.packets_out, connection, sent) {
            true => Seen::Moved,
            false => Seen::Unclear,
        }
    }

    /// Takes in what moved without another look at the socket; false when that cannot be done.
    ///
    /// Read by calls, the lengths of the queues come after the rest, and a packet may have come in
    /// between. It shows: bytes that arrived are unread, and bytes that were acknowledged make the
    /// send queue end before the last byte that was sent.
    fn take_from_outside(
        &mut self,
        fingerprint: Fingerprint,
        packets_out: u32,
        connection: &mut TcpConnection,
        sent: Sent<'_>,
    ) -> bool {
        let Some(phase) = phase_of(fingerprint.state) else {
            return false;
        };
        let settled = self.handshake_done && is_connected(phase);
        if !settled || fingerprint.not_sent_bytes != 0 || fingerprint.unread_bytes != 0 {
            return false;
        }
        let fin = u32::from(own_fin_is_open(phase));
        let Some(queued) = fingerprint.unacknowledged_bytes.checked_sub(fin) else {
            return false;
        };
        let first = self.send_base.wrapping_add(fingerprint.bytes_acked as u32);
        let known = match queued {
            0 => packets_out == fin,
            _ => {
                let ends = (connection.local, connection.remote);
                sent(ends, first, queued as usize, &mut connection.send_queue)
            }
        };
        if !known {
            return false;
        }
        if queued == 0 {
            connection.send_queue.clear();
        }
        connection.phase = phase;
        connection.fin_sent = fin == 1;
        connection.sent_bytes = queued;
        connection.receive_queue.clear();
        self.fingerprint = fingerprint;
        self.read_sequences(connection);
        true
    }

    fn take(
        &mut self,
        fd: BorrowedFd<'_>,
        info: &Info,
        fingerprint: Fingerprint,
        connection: &mut TcpConnection,
        attributes_changed: bool,
        known: &Known<'_>,
    ) -> Result<(), Error> {
        let phase = phase_of(info.state).ok_or_else(|| {
            Error::refused(
                "a connection that became a listener",
                "it is another kind of object now; capture it as a listener",
            )
        })?;
        if attributes_changed {
            read_attributes(fd, connection)?;
        }
        connection.phase = phase;
        let shook_hands = is_connected(phase) && info.state != state::SYN_RECEIVED;
        let completes = !self.handshake_done && shook_hands;
        if completes {
            // The handshake chose sequence numbers and options.
            connection.options = u32::from(info.options);
            connection.send_window_scale = info.send_scale();
            connection.receive_window_scale = info.receive_scale();
            self.synchronise(fd, info, connection)?;
        }
        self.fingerprint = fingerprint;
        self.read(fd, info, connection, known)?;
        expect_unmoved(fd, info)?;
        self.handshake_done |= completes;
        Ok(())
    }

    /// The fingerprint at the last capture: while [`fingerprint`] gives an equal one, another
    /// capture would read the same.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Reads what does not change, or moves in step with `TCP_INFO`.
    fn synchronise(
        &mut self,
        fd: BorrowedFd<'_>,
        info: &Info,
        connection: &mut TcpConnection,
    ) -> Result<(), Error> {
        let reuse = reuses_address(connection);
        let numbers = in_repair(fd, reuse, || {
            tcp::select_queue(fd, Queue::Receive).during("select receive queue", SUBJECT)?;
            let receive_next = tcp::queue_sequence(fd).during("read rcv_nxt", SUBJECT)?;
            tcp::select_queue(fd, Queue::Send).during("select send queue", SUBJECT)?;
            let write_sequence = tcp::queue_sequence(fd).during("read write_seq", SUBJECT)?;
            let window = tcp::repair_window(fd).during("read TCP_REPAIR_WINDOW", SUBJECT)?;
            // In repair mode TCP_MAXSEG shows the clamp instead of the current size.
            let mss_clamp = sockopt::get_i32(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG)
                .during("read TCP_MAXSEG", SUBJECT)?;
            Ok((receive_next, write_sequence, window, mss_clamp))
        })?;
        let (receive_next, write_sequence, window, mss_clamp) = numbers;
        let unacknowledged = socket::unacknowledged_bytes(fd).during("read SIOCOUTQ", SUBJECT)?;
        let first = write_sequence.wrapping_sub(unacknowledged);
        self.send_base = first.wrapping_sub(info.bytes_acked as u32);
        self.receive_base = receive_next.wrapping_sub(info.bytes_received as u32);
        self.max_window = window.max_window;
        connection.mss_clamp = mss_clamp.cast_unsigned();
        read_clock(fd, info, connection)
    }

    /// The same from a record of the socket, which need not be put into repair mode then.
    fn synchronise_by(&mut self, record: &Record, connection: &mut TcpConnection) {
        (self.send_base, self.receive_base) = bases(record);
        self.max_window = record.max_window;
        connection.mss_clamp = record.mss_clamp;
    }

    fn read(
        &mut self,
        fd: BorrowedFd<'_>,
        info: &Info,
        connection: &mut TcpConnection,
        known: &Known<'_>,
    ) -> Result<(), Error> {
        self.read_receive_queue(fd, connection, known)?;
        match connection.phase {
            TcpPhase::Closed => {
                connection.send_queue.clear();
                connection.sent_bytes = 0;
                connection.fin_sent = false;
                let failed = ready(fd, 0)? & libc::POLLERR != 0;
                connection.error = if failed { libc::ECONNRESET } else { 0 };
                return Ok(());
            }
            TcpPhase::SynSent => {
                // SIOCOUTQ reads 0 here; write_seq is behind the SYN (synchronise).
                connection.send_queue.clear();
                connection.sent_bytes = 0;
                let sequence = self.send_base.wrapping_add(info.bytes_acked as u32);
                connection.send_sequence = sequence.wrapping_sub(1);
                return Ok(());
            }
            _ => {}
        }
        self.read_send_queue(fd, info, connection, known)?;
        self.read_sequences(connection);
        Ok(())
    }

    fn read_sequences(&mut self, connection: &mut TcpConnection) {
        let now = self.fingerprint;
        connection.send_sequence = self.send_base.wrapping_add(now.bytes_acked as u32);
        let receive_next = self.receive_base.wrapping_add(now.bytes_received as u32);
        let fin = u32::from(peer_fin_arrived(connection.phase));
        connection.receive_sequence = receive_next
            .wrapping_sub(fin)
            .wrapping_sub(connection.receive_queue.len() as u32);
        self.max_window = self.max_window.max(now.send_window);
        // snd_wl1 may lie past a hole, where TCP_REPAIR_WINDOW refuses it, and rcv_wup needs
        // repair mode to read. At rcv_nxt both are legal: the peer's next segment may update the
        // window, and the offered window ends at most one unsent acknowledgement further right.
        connection.window = TcpWindow {
            snd_wl1: receive_next,
            snd_wnd: now.send_window,
            max_window: self.max_window,
            rcv_wnd: now.receive_window,
            rcv_wup: receive_next,
        };
    }

    fn read_receive_queue(
        &mut self,
        fd: BorrowedFd<'_>,
        connection: &mut TcpConnection,
        known: &Known<'_>,
    ) -> Result<(), Error> {
        connection.receive_queue.clear();
        let unread_bytes = self.fingerprint.unread_bytes as usize;
        if unread_bytes == 0 && !is_at_mark(fd, known)? {
            return Ok(());
        }
        if !known.may_be_urgent() {
            return peek_stream(fd, &mut connection.receive_queue, unread_bytes);
        }
        peek_inline(fd, &mut connection.receive_queue)?;
        // What was counted ends at an urgent byte: reading past it would not show.
        self.fingerprint.unread_bytes = connection.receive_queue.len() as u32;
        Ok(())
    }

    fn read_send_queue(
        &self,
        fd: BorrowedFd<'_>,
        info: &Info,
        connection: &mut TcpConnection,
        known: &Known<'_>,
    ) -> Result<(), Error> {
        connection.send_queue.clear();
        let fin = u32::from(own_fin_is_open(connection.phase));
        let queued = self.fingerprint.unacknowledged_bytes.saturating_sub(fin) as usize;
        // The FIN is the last to be sent, so nothing unsent means that it went out too.
        connection.fin_sent = fin == 1 && info.not_sent_bytes == 0;
        let not_sent = if info.not_sent_bytes == 0 {
            0
        } else {
            info.not_sent_bytes - fin
        };
        connection.sent_bytes = (queued as u32).saturating_sub(not_sent);
        let first = self.send_base.wrapping_add(info.bytes_acked as u32);
        let ends = (connection.local, connection.remote);
        if queued == 0 || (known.sent)(ends, first, queued, &mut connection.send_queue) {
            return Ok(());
        }
        let reuse = reuses_address(connection);
        in_repair(fd, reuse, || {
            tcp::select_queue(fd, Queue::Send).during("select send queue", SUBJECT)?;
            peek_send_queue(fd, &mut connection.send_queue, queued)
        })
    }
}

/// What `poll` says at once.
fn ready(fd: BorrowedFd<'_>, events: i16) -> Result<i16, Error> {
    socket::poll(fd, events, Duration::ZERO).during("poll", SUBJECT)
}

/// Whether the next byte is an urgent one, as far as there may be any.
fn is_at_mark(fd: BorrowedFd<'_>, known: &Known<'_>) -> Result<bool, Error> {
    Ok(known.may_be_urgent() && socket::is_at_mark(fd).during("read SIOCATMARK", SUBJECT)?)
}

/// As a node leaves a socket that is killed in the wrong moment.
fn is_in_repair(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    tcp::is_in_repair(fd).during("read TCP_REPAIR", SUBJECT)
}

/// The sequence numbers from which `TCP_INFO` counts bytes: sent, received.
fn bases(record: &Record) -> (u32, u32) {
    let (sent, received) = (record.bytes_acked as u32, record.bytes_received as u32);
    (
        record.send_unacknowledged.wrapping_sub(sent),
        record.receive_next.wrapping_sub(received),
    )
}

/// In this order a preemption in between makes a restored clock run ahead, which the peer accepts,
/// and never back, which it does not.
fn read_clock(
    fd: BorrowedFd<'_>,
    info: &Info,
    connection: &mut TcpConnection,
) -> Result<(), Error> {
    if info.options & negotiated::TIMESTAMPS != 0 {
        connection.timestamp_read_at_ns = tcp::clock_ns();
        connection.timestamp = tcp::timestamp(fd).during("read TCP_TIMESTAMP", SUBJECT)?;
    }
    Ok(())
}

/// Reads what only announced calls of the service change.
fn read_attributes(fd: BorrowedFd<'_>, connection: &mut TcpConnection) -> Result<(), Error> {
    refuse_layers(fd)?;
    connection.flags = socket::status_flags(fd).during("F_GETFL", SUBJECT)?;
    connection.receive_shut = ready(fd, libc::POLLRDHUP)? & libc::POLLRDHUP != 0;
    connection.corked = sockopt::get_i32(fd, libc::IPPROTO_TCP, libc::TCP_CORK)
        .during("read TCP_CORK", SUBJECT)?
        != 0;
    connection.socket_options = socket_options::capture(fd, connection.family, libc::SOCK_STREAM)?;
    Ok(())
}

fn reuses_address(connection: &TcpConnection) -> bool {
    socket_options::find(
        &connection.socket_options,
        libc::SOL_SOCKET,
        libc::SO_REUSEADDR,
    )
    .is_some_and(|value| value != 0)
}

/// Runs `work` in repair mode. `SO_REUSEADDR`, which repair mode overwrites both ways, becomes
/// `reuse` again.
fn in_repair<T>(
    fd: BorrowedFd<'_>,
    reuse: bool,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    tcp::repair(fd, Repair::On).during("enter TCP repair mode (needs CAP_NET_ADMIN)", SUBJECT)?;
    let result = work();
    tcp::repair(fd, Repair::OffSilently).during("leave TCP repair mode", SUBJECT)?;
    if reuse {
        sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)
            .during("put SO_REUSEADDR back", SUBJECT)?;
    }
    result
}

/// Layers over or under TCP whose state no interface gives out.
fn refuse_layers(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let protocol = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)
        .during("read SO_PROTOCOL", SUBJECT)?;
    if protocol != libc::IPPROTO_TCP {
        return Err(Error::refused(
            "a stream socket of a protocol other than TCP (as MPTCP or SCTP)",
            "the kernel has no repair mode for it",
        ));
    }
    let mut name = [0; 16];
    // TCP_ULP answers no bytes when there is none, and fails on a kernel without them.
    if sockopt::get(fd, libc::IPPROTO_TCP, libc::TCP_ULP, &mut name).is_ok_and(|length| length > 0)
    {
        return Err(Error::refused(
            "a TCP connection with an upper layer protocol (kernel TLS)",
            "its keys and record state cannot be read back",
        ));
    }
    Ok(())
}
