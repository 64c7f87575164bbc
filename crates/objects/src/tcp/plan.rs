//! What a connection is made from: its last state, and what its client has said since.

use super::own_fin_is_open;
use unbroken_image::object::{TcpConnection, TcpPhase};

/// What the wire knows about the client beyond the committed epoch.
#[derive(Clone, Copy, Debug, Default)]
pub struct View {
    /// The client's newest acknowledgement, if it has spoken.
    pub heard: Option<Heard>,
    /// The client's latest timestamp value; 0 when it is not known.
    pub client_timestamp: u32,
    /// The service's `CLOCK_MONOTONIC` minus ours: not 0 when the service lives in a time
    /// namespace of its own.
    pub clock_offset_ns: i64,
}

/// What the header of one of the client's packets says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// It may cover bytes that the committed state still holds as unacknowledged; one beyond what
    /// was sent is ignored, as the kernel does.
    pub acknowledgement: u32,
    /// Scaled down.
    pub window: u16,
}

/// What leaving repair mode still has to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) view: View,
    /// Bytes at the front of the queue that the client has acknowledged.
    pub(super) dropped_bytes: usize,
    /// What the client takes beyond those.
    pub(super) client_window: u32,
    pub(super) own_fin: OwnFin,
    /// The send buffer to put back, as the kernel chose it (doubled), when it had to be raised.
    pub(super) send_buffer_raised_from: Option<i32>,
}

/// This side's FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OwnFin {
    None,
    Unsent,
    Sent,
    Acknowledged,
}

impl Heard {
    pub(super) fn window_bytes(&self, connection: &TcpConnection) -> u32 {
        u32::from(self.window) << connection.send_window_scale
    }
}

impl Plan {
    /// Sending again what the client has acknowledged would stall: its acknowledgements would lie
    /// beyond the replica's `snd_nxt` and be dropped. Sending beyond its window would wait for a
    /// timer: what it cannot take counts as on its way.
    pub(super) fn hear(&mut self, connection: &TcpConnection) {
        let Some(heard) = self.view.heard else {
            return;
        };
        let ahead = heard.acknowledgement.wrapping_sub(connection.send_sequence) as usize;
        let sent = connection.sent_bytes as usize;
        if ahead <= sent {
            self.dropped_bytes = ahead;
        } else if ahead == sent + 1 && self.own_fin == OwnFin::Sent {
            self.dropped_bytes = sent;
            self.own_fin = OwnFin::Acknowledged;
        } else {
            return;
        }
        self.client_window = heard.window_bytes(connection);
    }

    /// Sequence number of the first byte that the restored send queue holds.
    pub(super) fn first_sequence(&self, connection: &TcpConnection) -> u32 {
        // In FIN_WAIT2 snd_una is behind the FIN, which the restored socket goes through again.
        let fin = u32::from(connection.phase == TcpPhase::FinWait2);
        connection
            .send_sequence
            .wrapping_sub(fin)
            .wrapping_add(self.dropped_bytes as u32)
    }

    /// What the client has acknowledged as far as this side may show it.
    pub(super) fn acknowledged(&self, connection: &TcpConnection) -> u32 {
        let fin = u32::from(self.own_fin == OwnFin::Acknowledged);
        self.first_sequence(connection).wrapping_add(fin)
    }
}

impl OwnFin {
    pub(super) fn of(connection: &TcpConnection) -> OwnFin {
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
}
