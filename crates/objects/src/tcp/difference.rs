//! What is known of a connection against the kernel (invariant I7).

use super::capture::{Tracker, capture};
use crate::Error;
use std::os::fd::BorrowedFd;
use unbroken_image::object::{TcpConnection, TcpPhase, TcpWindow};

/// I7: what is wrong with a connection that a capture, or several of the quick ways, brought up to
/// date: reads it anew, and compares what packets, reads and writes move.
pub fn difference(
    fd: BorrowedFd<'_>,
    connection: &TcpConnection,
    tracker: &Tracker,
) -> Result<Option<String>, Error> {
    let (found, fresh) = capture(fd)?;
    if fresh.fingerprint() != tracker.fingerprint() {
        // A packet that was given before the stop came to the socket only now.
        return Ok(None);
    }
    let numbers = |of: &TcpConnection| {
        let TcpWindow {
            snd_wnd, rcv_wnd, ..
        } = of.window;
        (
            (of.phase, of.fin_sent, of.sent_bytes, of.send_sequence),
            (of.receive_sequence, snd_wnd, rcv_wnd),
            (of.send_queue.len(), of.receive_queue.len()),
        )
    };
    let (known, now) = (numbers(connection), numbers(&found));
    // A closed connection keeps the numbers of before, and no one asks for them again.
    let both_closed = connection.phase == TcpPhase::Closed && found.phase == TcpPhase::Closed;
    if known != now && !both_closed {
        return Ok(Some(format!("{known:?}, kernel {now:?}")));
    }
    let queues = |of: &TcpConnection| (of.send_queue.clone(), of.receive_queue.clone());
    if queues(connection) != queues(&found) {
        return Ok(Some("its queues hold other bytes".to_owned()));
    }
    Ok(None)
}
