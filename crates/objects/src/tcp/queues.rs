//! The queues of a socket: read without taking anything out, and filled again.

use super::SUBJECT;
use crate::{Context, Error};
use std::os::fd::BorrowedFd;
use unbroken_sys::{socket, sockopt};

/// Largest piece for one write into a queue under repair; the kernel allocates it in one go.
const QUEUE_CHUNK_BYTES: usize = 64 * 1024;

/// The most that a segment can hold of a queue's front that is acknowledged already.
const LARGEST_SEGMENT_BYTES: usize = 65536;

/// Peeks the whole receive queue into `buffer`.
///
/// `SIOCINQ` and a read end at an urgent byte, also at one that has been read, which nothing else
/// shows. Inline, the byte is one of the stream: its sequence number must be covered, and that it
/// was urgent is lost.
pub(super) fn peek_inline(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> Result<(), Error> {
    let inline = sockopt::get_i32(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE)
        .during("read SO_OOBINLINE", SUBJECT)?;
    set_inline(fd, 1)?;
    let result = socket::unread_bytes(fd)
        .during("read SIOCINQ", SUBJECT)
        .and_then(|bytes| peek_stream(fd, buffer, bytes as usize));
    set_inline(fd, inline)?;
    result
}

fn set_inline(fd: BorrowedFd<'_>, inline: i32) -> Result<(), Error> {
    sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, inline)
        .during("set SO_OOBINLINE", SUBJECT)
}

/// Peeks `expected` bytes of the receive queue into `buffer`, and notices one byte more.
pub(super) fn peek_stream(
    fd: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    expected: usize,
) -> Result<(), Error> {
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
    peeked.during("peek at the receive queue", SUBJECT)?;
    if buffer.len() != expected {
        return Err(Error::Changed {
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

fn set_peek_offset(fd: BorrowedFd<'_>, offset: i32) -> Result<(), Error> {
    sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
        .during("set SO_PEEK_OFF", SUBJECT)
}

/// Peeks the selected send queue into `buffer`. The kernel copies whole segments, whose first may
/// begin with bytes that are acknowledged already, and fails when they do not fit.
pub(super) fn peek_send_queue(
    fd: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    expected: usize,
) -> Result<(), Error> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let found = match socket::receive_into(fd, buffer, expected, flags) {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
            socket::receive_into(fd, buffer, expected + LARGEST_SEGMENT_BYTES, flags)
        }
        other => other,
    }
    .during("peek at the send queue", SUBJECT)?;
    if found < expected {
        return Err(Error::Changed {
            what: "send queue of a TCP connection",
            expected_bytes: expected,
            found_bytes: found,
        });
    }
    buffer.drain(..found - expected);
    Ok(())
}

/// Writes bytes into the queue that is selected under repair.
pub(super) fn fill_queue(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Error> {
    let mut chunk = QUEUE_CHUNK_BYTES;
    while !bytes.is_empty() {
        match socket::send(socket, &bytes[..bytes.len().min(chunk)], libc::MSG_DONTWAIT) {
            Ok(written) => bytes = &bytes[written..],
            // One allocation holds the piece; a smaller one may still be had.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && chunk > 1024 => chunk /= 2,
            Err(source) => {
                return Err(source).during("write a queue under repair", SUBJECT);
            }
        }
    }
    Ok(())
}
