//! The numbers that tell whether anything moved on a connection.

use super::SUBJECT;
use crate::{Context, Error};
use std::os::fd::BorrowedFd;
use unbroken_sys::bpf::Record;
use unbroken_sys::socket;
use unbroken_sys::tcp::{self, Info};

/// What must be equal for a connection to be as it was: everything that packets, reads and writes
/// move. Options are not part of it; their changes are announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    pub(super) state: u8,
    pub(super) bytes_acked: u64,
    pub(super) bytes_received: u64,
    pub(super) bytes_sent: u64,
    pub(super) bytes_retransmitted: u64,
    pub(super) not_sent_bytes: u32,
    pub(super) send_window: u32,
    pub(super) receive_window: u32,
    pub(super) unread_bytes: u32,
    pub(super) unacknowledged_bytes: u32,
}

/// Reads a fingerprint without repair mode (about a microsecond).
pub fn fingerprint(fd: BorrowedFd<'_>) -> Result<Fingerprint, Error> {
    let info = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
    fingerprint_from(fd, &info)
}

pub(super) fn fingerprint_from(fd: BorrowedFd<'_>, info: &Info) -> Result<Fingerprint, Error> {
    Ok(Fingerprint {
        state: info.state,
        bytes_acked: info.bytes_acked,
        bytes_received: info.bytes_received,
        bytes_sent: info.bytes_sent,
        bytes_retransmitted: info.bytes_retransmitted,
        not_sent_bytes: info.not_sent_bytes,
        send_window: info.send_window,
        receive_window: info.receive_window,
        unread_bytes: socket::unread_bytes(fd).during("read SIOCINQ", SUBJECT)?,
        unacknowledged_bytes: socket::unacknowledged_bytes(fd).during("read SIOCOUTQ", SUBJECT)?,
    })
}

impl From<&Record> for Fingerprint {
    fn from(record: &Record) -> Fingerprint {
        Fingerprint {
            state: record.state(),
            bytes_acked: record.bytes_acked,
            bytes_received: record.bytes_received,
            bytes_sent: record.bytes_sent,
            bytes_retransmitted: record.bytes_retransmitted,
            not_sent_bytes: record.not_sent_bytes(),
            send_window: record.send_window,
            receive_window: record.receive_window,
            unread_bytes: record.unread_bytes(),
            unacknowledged_bytes: record.unacknowledged_bytes(),
        }
    }
}

/// What [`super::Tracker::look_at`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Unchanged,
    /// Something moved, and the connection has it.
    Moved,
    /// Nothing is known and nothing was done.
    Unclear,
}
