//! Orphaned connections. After its last close the kernel goes on with a connection that no
//! descriptor reaches any more: it brings the rest of the data and the FIN to the client. A replica
//! must do the same, so what the orphan will have to send is read before that close.

use super::capture::capture_with_options;
use super::plan::Heard;
use super::{SUBJECT, is_inside, own_fin_is_open};
use crate::{Context, Error};
use std::os::fd::BorrowedFd;
use unbroken_image::object::{SocketOption, TcpConnection, TcpPhase};
use unbroken_sys::sockopt;
use unbroken_sys::tcp::{self, state};

/// Reads the connection behind `fd` if its close leaves an orphan; `None` for every other
/// descriptor. Uses repair mode for a moment, as [`super::capture`] does.
pub fn capture_orphan(fd: BorrowedFd<'_>) -> Result<Option<TcpConnection>, Error> {
    let protocol = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL);
    if protocol.ok() != Some(libc::IPPROTO_TCP) {
        return Ok(None);
    }
    let info = tcp::info(fd).during("read TCP_INFO", SUBJECT)?;
    if !has_unfinished_orphan(info.state) {
        return Ok(None);
    }
    let (connection, _) = capture_with_options(fd, options(fd)?)?;
    if is_inside(&connection) {
        // The other end is the service's own and has everything already.
        return Ok(None);
    }
    Ok(Some(connection))
}

/// Whether an orphaned connection in this state (`TCP_INFO`) still has data or a FIN to bring to
/// its peer, or will have when it is closed.
pub fn has_unfinished_orphan(connection_state: u8) -> bool {
    matches!(
        connection_state,
        state::ESTABLISHED
            | state::CLOSE_WAIT
            | state::FIN_WAIT1
            | state::CLOSING
            | state::LAST_ACK
    )
}

/// The options that matter at the end: with `SO_LINGER` on and no time, close resets; and
/// `SO_REUSEADDR`, which leaving repair mode would change, in case this is not the last close.
fn options(fd: BorrowedFd<'_>) -> Result<Vec<SocketOption>, Error> {
    let option = |name, value| SocketOption {
        level: libc::SOL_SOCKET,
        name,
        value,
    };
    let reuse = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)
        .during("read SO_REUSEADDR", SUBJECT)?;
    let mut options = vec![option(libc::SO_REUSEADDR, reuse.to_ne_bytes().to_vec())];
    let mut linger = [0; 8];
    sockopt::get(fd, libc::SOL_SOCKET, libc::SO_LINGER, &mut linger)
        .during("read SO_LINGER", SUBJECT)?;
    if linger[..4] != [0; 4] && linger[4..] == [0; 4] {
        options.push(option(libc::SO_LINGER, linger.to_vec()));
    }
    Ok(options)
}

/// Whether an orphan is at its end, now that its client has acknowledged everything before
/// `acknowledged`.
pub(super) fn is_finished(connection: &TcpConnection, acknowledged: u32) -> bool {
    let queued = connection.send_queue.len() as u32;
    // The FIN has the number after the last byte.
    let end = connection
        .send_sequence
        .wrapping_add(queued)
        .wrapping_add(1);
    connection.phase != TcpPhase::FinWait2 && acknowledged.wrapping_sub(end).cast_signed() >= 0
}

/// The orphan as it may stand by now. The kernel went on sending after the close: by what the
/// client has acknowledged, and as far as its window reached. Where it got to nobody saw, so all of
/// that counts as sent. A client that had less takes it for the first time; but one that had it
/// would be ignored if it acknowledged what counts as unsent, for ever.
pub(super) fn advanced(connection: &TcpConnection, heard: Option<Heard>) -> TcpConnection {
    let mut now = connection.clone();
    // The FIN, if it is queued, comes after the last byte.
    let fin = u32::from(own_fin_is_open(connection.phase));
    let end = connection.send_queue.len() as u32 + fin;
    let mut sent = connection.sent_bytes + u32::from(connection.fin_sent);
    let mut window_end = connection.window.snd_wnd;
    if let Some(heard) = heard {
        let ahead = heard.acknowledgement.wrapping_sub(connection.send_sequence);
        if ahead <= end {
            sent = sent.max(ahead);
            window_end = window_end.max(ahead.saturating_add(heard.window_bytes(connection)));
        }
    }
    // A rest of the window that is less than a segment counts, too: the kernel fills it up when a
    // whole segment comes before it.
    let sent = sent.max(window_end.min(end));
    now.fin_sent = fin == 1 && sent == end;
    now.sent_bytes = sent - u32::from(now.fin_sent);
    now
}
