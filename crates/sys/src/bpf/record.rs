//! What one pass says of one socket.

use crate::tcp::state;

/// Counters that move with every packet and timer of a connection, and its lock. Read before and
/// after the numbers between them: when nothing moved, they belong together.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Guard {
    pub lock: u32,
    pub owned: u32,
    pub segments_in: u32,
    pub segments_out: u32,
}

/// A connection's numbers as they stand in the kernel (`struct tcp_sock`), and which descriptor of
/// the process names it. Every number has its full width and there is no padding: the kernel's
/// program fills all of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    pub bytes_acked: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub bytes_retransmitted: u64,
    pub(super) flags: u64,
    pub(super) before: Guard,
    pub(super) descriptor: u32,
    pub(super) state: u32,
    /// The largest window that the peer ever offered.
    pub max_window: u32,
    /// The size of a segment that the handshake agreed on, without options.
    pub mss_clamp: u32,
    pub send_unacknowledged: u32,
    pub send_next: u32,
    pub write_sequence: u32,
    pub receive_next: u32,
    pub(super) copied_sequence: u32,
    /// The peer's window.
    pub send_window: u32,
    /// The window last offered to the peer.
    pub receive_window: u32,
    /// Segments in flight.
    pub packets_out: u32,
    pub(super) urgent: u32,
    pub(super) urgent_sequence: u32,
    pub(super) after: Guard,
}

/// `enum sock_flags` of include/net/sock.h.
const SOCK_DONE: u64 = 1 << 1;
const SOCK_URGINLINE: u64 = 1 << 2;

impl Record {
    /// Stands behind the last socket of a pass. No socket has this state.
    pub(super) fn is_end(&self) -> bool {
        self.state == 0
    }

    /// Whether nothing changed the socket while it was read. Otherwise its numbers may be of
    /// different moments, and the socket has to be asked itself.
    pub fn is_settled(&self) -> bool {
        self.before == self.after && self.before.lock == 0 && self.before.owned == 0
    }

    /// The number of the descriptor in the process.
    pub fn descriptor(&self) -> i32 {
        self.descriptor.cast_signed()
    }

    /// As `tcpi_state`.
    pub fn state(&self) -> u8 {
        self.state as u8
    }

    fn is_opening(&self) -> bool {
        matches!(self.state(), state::SYN_SENT | state::SYN_RECEIVED)
    }

    /// As `tcpi_notsent_bytes`: an unsent FIN counts as one.
    pub fn not_sent_bytes(&self) -> u32 {
        not_negative(self.write_sequence.wrapping_sub(self.send_next))
    }

    /// As `SIOCOUTQ`: a FIN that is not acknowledged counts as one.
    pub fn unacknowledged_bytes(&self) -> u32 {
        if self.is_opening() {
            return 0;
        }
        not_negative(self.write_sequence.wrapping_sub(self.send_unacknowledged))
    }

    /// As `SIOCINQ` (include/net/tcp.h, `tcp_inq`): a FIN is not counted, and what lies behind an
    /// urgent byte that is not inline is not counted either.
    pub fn unread_bytes(&self) -> u32 {
        if self.is_opening() {
            return 0;
        }
        let all = self.receive_next.wrapping_sub(self.copied_sequence);
        let before_urgent = self.urgent_sequence.wrapping_sub(self.copied_sequence);
        let is_ahead = is_before(self.urgent_sequence, self.receive_next)
            && !is_before(self.urgent_sequence, self.copied_sequence);
        if self.flags & SOCK_URGINLINE == 0 && self.has_urgent_data() && is_ahead {
            return not_negative(before_urgent);
        }
        let fin = all != 0 && self.flags & SOCK_DONE != 0;
        not_negative(all.wrapping_sub(u32::from(fin)))
    }

    /// There is an urgent byte that was not read, or one was announced.
    pub fn has_urgent_data(&self) -> bool {
        self.urgent != 0
    }
}

/// The kernel gives these lengths out as an `int`, and never below zero.
fn not_negative(length: u32) -> u32 {
    u32::try_from(length.cast_signed()).unwrap_or(0)
}

/// Whether sequence number `a` comes before `b`.
fn is_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn established() -> Record {
        Record {
            state: u32::from(state::ESTABLISHED),
            ..Record::default()
        }
    }

    #[test]
    fn lengths_of_queues_cross_the_end_of_the_numbers() {
        let record = Record {
            send_unacknowledged: u32::MAX - 9,
            send_next: 5,
            write_sequence: 20,
            copied_sequence: u32::MAX,
            receive_next: 3,
            ..established()
        };
        assert_eq!(record.unacknowledged_bytes(), 30);
        assert_eq!(record.not_sent_bytes(), 15);
        assert_eq!(record.unread_bytes(), 4);
    }

    #[test]
    fn an_urgent_byte_ends_what_can_be_read() {
        let mut record = Record {
            copied_sequence: 10,
            receive_next: 30,
            urgent: 0x100,
            urgent_sequence: 17,
            ..established()
        };
        assert_eq!(record.unread_bytes(), 7);
        record.flags = SOCK_URGINLINE;
        assert_eq!(record.unread_bytes(), 20);
        record.flags = SOCK_DONE;
        record.urgent_sequence = 9;
        assert_eq!(record.unread_bytes(), 19);
    }

    #[test]
    fn a_socket_that_moves_is_not_settled() {
        let mut record = established();
        assert!(record.is_settled());
        record.after.segments_in = 1;
        assert!(!record.is_settled());
        record.before.segments_in = 1;
        assert!(record.is_settled());
        (record.before.lock, record.after.lock) = (1, 1);
        assert!(!record.is_settled());
    }
}
