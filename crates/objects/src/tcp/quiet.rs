//! When a connection need not be looked at until a packet or an announced call concerns it.

use super::{SUBJECT, is_inside};
use crate::{Context, Error};
use std::os::fd::BorrowedFd;
use std::time::Duration;
use unbroken_image::object::{TcpConnection, TcpPhase};
use unbroken_sys::socket;

/// Congestion controls that send when packets arrive and not by timers of their own. The default
/// of the stage's namespace is one of them.
const UNPACED: [&[u8]; 2] = [b"cubic", b"reno"];

/// Whether nothing can move on the connection without a packet that the wire sees: both queues are
/// empty, so reads change nothing, and whatever is written goes out at once (KERNEL.md, Quiet
/// connections). The caller has just read `connection`, or found it as it was.
pub fn is_quiet(fd: BorrowedFd<'_>, connection: &TcpConnection) -> Result<bool, Error> {
    if !may_be_quiet(connection) {
        return Ok(false);
    }
    // Urgent data, an error: read without a packet.
    let ready = socket::poll(fd, libc::POLLPRI, Duration::ZERO).during("poll", SUBJECT)?;
    Ok(ready & (libc::POLLPRI | libc::POLLERR) == 0)
}

/// The part of [`is_quiet`] that needs no descriptor: false here is false there.
pub fn may_be_quiet(connection: &TcpConnection) -> bool {
    matches!(
        connection.phase,
        TcpPhase::Established | TcpPhase::CloseWait | TcpPhase::FinWait2
    ) && connection.send_queue.is_empty()
        && connection.receive_queue.is_empty()
        && connection.window.snd_wnd >= connection.mss_clamp
        && !connection.corked
        && is_unpaced(connection)
        && !is_inside(connection)
}

/// Options are captured where they differ from their default.
fn is_unpaced(connection: &TcpConnection) -> bool {
    let paces = |level, name, value: &[u8]| match (level, name) {
        (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE) => true,
        (libc::IPPROTO_TCP, libc::TCP_CONGESTION) => {
            let end = value.iter().position(|byte| *byte == 0);
            !UNPACED.contains(&&value[..end.unwrap_or(value.len())])
        }
        _ => false,
    };
    let mut options = connection.socket_options.iter();
    !options.any(|option| paces(option.level, option.name, &option.value))
}
