//! The packets that a restored connection needs from its node: one that brings the socket to its
//! phase, and what brings the client up to date.

use super::plan::{OwnFin, Plan};
use super::{SUBJECT, peer_fin_arrived};
use crate::{Context, Error};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use unbroken_image::object::TcpConnection;
use unbroken_sys::tcp::{self, negotiated};

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

/// The packet that brings `socket` to its phase, and the one that brings the client up to date.
pub(super) fn packets(
    socket: BorrowedFd<'_>,
    connection: &TcpConnection,
    plan: &Plan,
) -> Result<(Option<Inject>, Resend), Error> {
    let info = tcp::info(socket).during("read TCP_INFO", SUBJECT)?;
    let with_timestamps = connection.options & u32::from(negotiated::TIMESTAMPS) != 0;
    let clock = if with_timestamps {
        tcp::timestamp(socket).during("read TCP_TIMESTAMP", SUBJECT)?
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
        window: window_field(plan.client_window, connection.send_window_scale),
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
