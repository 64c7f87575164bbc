//! Large transfers in both directions, checked byte for byte while they run.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::content::{Content, RunChecker};
use crate::icecast::count_break;
use crate::running::{ClientError, PATIENCE, Running};
use crate::tally::{Tally, Timeline};

const PIECE_BYTES: usize = 64 * 1024;

/// Which way the bytes go, seen from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Download,
    Upload,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Download => "download",
            Self::Upload => "upload",
        }
    }
}

/// Starts `connections` rows of transfers of `bytes` each, one after the other, until told to
/// finish.
pub fn start_endless(
    address: SocketAddr,
    direction: Direction,
    connections: usize,
    bytes: u64,
) -> Result<Running, ClientError> {
    let mut running = Running::new(direction.name());
    for index in 0..connections {
        running.spawn(move |tally, stop| {
            let mut timeline = Timeline::default();
            while !stop.asked() {
                if let Err(cause) =
                    transfer(address, direction, index, bytes, &tally, &mut timeline)
                {
                    tally.add_reconnect(|| format!("{} {index}: {cause}", direction.name()));
                    // A server that is gone must not be hammered: this run has failed anyway.
                    break;
                }
                timeline.heard(&tally);
            }
            vec![timeline]
        })?;
    }
    Ok(running)
}

fn transfer(
    address: SocketAddr,
    direction: Direction,
    index: usize,
    bytes: u64,
    tally: &Tally,
    timeline: &mut Timeline,
) -> io::Result<()> {
    let stream = connect(address)?;
    match direction {
        Direction::Download => download(stream, index, bytes, tally, timeline),
        Direction::Upload => upload(stream, index, bytes, tally),
    }
}

/// Starts `connections` transfers of `bytes` each against a [`crate::serve`] bulk server. They end
/// by themselves: see [`Running::wait`].
pub fn start(
    address: SocketAddr,
    direction: Direction,
    connections: usize,
    bytes: u64,
) -> Result<Running, ClientError> {
    let name = direction.name();
    let mut running = Running::new(name);
    for index in 0..connections {
        let stream = connect(address).map_err(|cause| ClientError::Connect { address, cause })?;
        running.spawn(move |tally, _| {
            let mut timeline = Timeline::default();
            let outcome = match direction {
                Direction::Download => download(stream, index, bytes, &tally, &mut timeline),
                Direction::Upload => upload(stream, index, bytes, &tally),
            };
            if let Err(cause) = outcome {
                tally.add_reconnect(|| format!("{name} {index}: {cause}"));
            }
            vec![timeline]
        })?;
    }
    Ok(running)
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn download(
    mut stream: TcpStream,
    index: usize,
    bytes: u64,
    tally: &Tally,
    timeline: &mut Timeline,
) -> io::Result<()> {
    stream.write_all(format!("GET {bytes} {index}\n").as_bytes())?;
    tally.add_sent(bytes);
    let mut checker = RunChecker::from(Content::new(index as u16), 0);
    let mut buffer = vec![0; PIECE_BYTES];
    let mut received = 0;
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            // A signal to this process, such as a child's end, interrupts a read with a timeout.
            Err(cause) if cause.kind() == ErrorKind::Interrupted => continue,
            Err(cause) => return Err(cause),
        };
        timeline.heard(tally);
        received += count as u64;
        tally.add_received(count as u64);
        checker.accept(&buffer[..count], |broken| {
            count_break(tally, index, &broken)
        });
    }
    if received < bytes {
        tally.add_lost(bytes - received, || {
            format!("download {index}: end after {received}")
        });
    } else if received > bytes {
        tally.add_doubled(received - bytes, || {
            format!("download {index}: {received} bytes")
        });
    }
    Ok(())
}

fn upload(mut stream: TcpStream, index: usize, bytes: u64, tally: &Tally) -> io::Result<()> {
    stream.write_all(format!("PUT {bytes} {index}\n").as_bytes())?;
    let content = Content::new(index as u16);
    let mut buffer = vec![0; PIECE_BYTES];
    let mut sent = 0;
    while sent < bytes {
        let count = (bytes - sent).min(PIECE_BYTES as u64);
        let piece = &mut buffer[..count as usize];
        content.fill(sent, piece);
        stream.write_all(piece)?;
        sent += count;
        tally.add_sent(count);
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer == format!("OK {bytes}\n") {
        tally.add_received(bytes);
        return Ok(());
    }
    Err(io::Error::new(
        ErrorKind::InvalidData,
        format!("the server found {answer:?}"),
    ))
}
