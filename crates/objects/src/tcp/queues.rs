//! Reading the queues of a socket without taking anything out.

use super::SUBJECT;
use crate::socket::{Context, SocketError};
use std::os::fd::BorrowedFd;
use unbroken_sys::{socket, sockopt};

/// The most that a segment can hold of a queue's front that is acknowledged already.
const LARGEST_SEGMENT_BYTES: usize = 65536;

/// Peeks the whole receive queue into `buffer`.
///
/// `SIOCINQ` and a read end at an urgent byte, also at one that has been read, which nothing else
/// shows. Inline, the byte is one of the stream: its sequence number must be covered, and that it
/// was urgent is lost.
pub(super) fn peek_inline(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> Result<(), SocketError> {
    let inline = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE)
        .context("read SO_OOBINLINE", SUBJECT)?;
    set_inline(fd, 1)?;
    let result = socket::unread_bytes(fd)
        .context("read SIOCINQ", SUBJECT)
        .and_then(|bytes| peek_stream(fd, buffer, bytes as usize));
    set_inline(fd, inline)?;
    result
}

fn set_inline(fd: BorrowedFd<'_>, inline: i32) -> Result<(), SocketError> {
    sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, inline)
        .context("set SO_OOBINLINE", SUBJECT)
}

/// Peeks `expected` bytes of the receive queue into `buffer`, and notices one byte more.
pub(super) fn peek_stream(
    fd: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    expected: usize,
) -> Result<(), SocketError> {
    if expected == 0 {
        return Ok(());
    }
    // A peek offset that the service set (SO_PEEK_OFF; TCP has it since Linux 6.10) would start
    // the peek there, and move. One that is off reads -1, one that is unknown fails.
    let offset = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    if offset >= 0 {
        set_peek_offset(fd, 0)?;
    }
    let mut peeked = peek(fd, buffer, expected + 1);
    let mut short = offset;
    // A peek ends at an urgent byte even when bytes follow it.
    while let Ok(1..) = peeked
        && buffer.len() < expected
    {
        short = 0;
        set_peek_offset(fd, buffer.len() as i32)?;
        peeked = peek(fd, buffer, expected + 1 - buffer.len());
    }
    if offset >= 0 || short >= 0 {
        set_peek_offset(fd, offset)?;
    }
    peeked.context("peek at the receive queue", SUBJECT)?;
    if buffer.len() != expected {
        return Err(SocketError::Changed {
            what: "receive queue of a TCP connection",
            expected_bytes: expected,
            found_bytes: buffer.len(),
        });
    }
    Ok(())
}

fn peek(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>, limit: usize) -> std::io::Result<usize> {
    socket::receive_into(fd, buffer, limit, libc::MSG_PEEK | libc::MSG_DONTWAIT)
}

fn set_peek_offset(fd: BorrowedFd<'_>, offset: i32) -> Result<(), SocketError> {
    sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
        .context("set SO_PEEK_OFF", SUBJECT)
}

/// Peeks the selected send queue into `buffer`. The kernel copies whole segments, whose first may
/// begin with bytes that are acknowledged already, and fails when they do not fit.
pub(super) fn peek_send_queue(
    fd: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    expected: usize,
) -> Result<(), SocketError> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let found = match socket::receive_into(fd, buffer, expected, flags) {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
            socket::receive_into(fd, buffer, expected + LARGEST_SEGMENT_BYTES, flags)
        }
        other => other,
    }
    .context("peek at the send queue", SUBJECT)?;
    if found < expected {
        return Err(SocketError::Changed {
            what: "send queue of a TCP connection",
            expected_bytes: expected,
            found_bytes: found,
        });
    }
    buffer.drain(..found - expected);
    Ok(())
}
