//! TCP connections: every socket of `SOCK_STREAM` over IP that does not listen and is not fresh.
//!
//! [`capture`] reads a connection whole, [`Tracker::capture_into`] reads it again at the price of
//! what is queued. [`prepare`] builds it in the replica's namespace without a packet, and
//! [`Prepared::go_live`] lets it speak. [`capture_orphan`] reads one that is about to lose its last
//! descriptor.

pub(crate) mod capture;
mod closed;
mod difference;
mod fingerprint;
pub(crate) mod known;
mod methods;
mod orphan;
pub(crate) mod packets;
pub(crate) mod plan;
mod queues;
mod quiet;
pub(crate) mod restore;

pub use capture::{Tracker, capture, capture_known};
pub use difference::difference;
pub use fingerprint::{Fingerprint, Seen, fingerprint};
pub use known::{Ends, Known, Sent};
pub(crate) use methods::METHODS;
pub use orphan::{capture_orphan, has_unfinished_orphan};
pub use packets::{Inject, Resend};
pub use plan::{Heard, View};
pub use quiet::{is_quiet, may_be_quiet};
pub use restore::{Live, Prepared, prepare};

use unbroken_image::object::{TcpConnection, TcpPhase};
use unbroken_sys::tcp::state;

/// How errors call a socket of this module.
const SUBJECT: &str = "on a TCP connection";

/// The phase of a socket in `state` (`TCP_INFO`); `None` for one that listens. A descriptor whose
/// connection is in TIME_WAIT shows `CLOSE`: the kernel keeps that state apart from the socket.
fn phase_of(state: u8) -> Option<TcpPhase> {
    Some(match state {
        state::ESTABLISHED | state::SYN_RECEIVED => TcpPhase::Established,
        state::SYN_SENT => TcpPhase::SynSent,
        state::FIN_WAIT1 => TcpPhase::FinWait1,
        state::FIN_WAIT2 => TcpPhase::FinWait2,
        state::CLOSE_WAIT => TcpPhase::CloseWait,
        state::LAST_ACK => TcpPhase::LastAck,
        state::CLOSING => TcpPhase::Closing,
        state::CLOSE | state::TIME_WAIT => TcpPhase::Closed,
        _ => return None,
    })
}

/// This side has sent or queued a FIN that the peer has not acknowledged. It counts as one byte in
/// `SIOCOUTQ` and in `tcpi_notsent_bytes`.
fn own_fin_is_open(phase: TcpPhase) -> bool {
    matches!(
        phase,
        TcpPhase::FinWait1 | TcpPhase::LastAck | TcpPhase::Closing
    )
}

/// The peer's FIN has arrived; it counts as one sequence number in `rcv_nxt`.
fn peer_fin_arrived(phase: TcpPhase) -> bool {
    matches!(
        phase,
        TcpPhase::CloseWait | TcpPhase::LastAck | TcpPhase::Closing
    )
}

/// Both ends are in the service's namespace: their packets do not cross the wire.
fn is_inside(connection: &TcpConnection) -> bool {
    let remote = connection.remote.ip().to_canonical();
    remote.is_loopback() || remote == connection.local.ip().to_canonical()
}
