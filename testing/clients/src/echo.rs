//! Connections whose every byte must come back, in pieces of every size.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::content::Content;
use crate::running::{ClientError, PATIENCE, Running, Stop};
use crate::tally::{Tally, Timeline};

const NAME: &str = "echo";
/// Small enough that a whole piece always fits into the buffers on its way: the client writes it
/// all before it reads.
const LARGEST_PIECE_BYTES: u64 = 24 * 1024;

/// Starts `connections` against a [`crate::serve`] echo server. Returns when all are connected.
pub fn start(address: SocketAddr, connections: usize) -> Result<Running, ClientError> {
    let mut running = Running::new(NAME);
    for index in 0..connections {
        let stream = connect(address).map_err(|cause| ClientError::Connect { address, cause })?;
        running.spawn(move |tally, stop| {
            let mut timeline = Timeline::default();
            if let Err(cause) = exchange(stream, index, &tally, &stop, &mut timeline) {
                tally.add_reconnect(|| format!("connection {index}: {cause}"));
            }
            vec![timeline]
        })?;
    }
    Ok(running)
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn exchange(
    mut stream: TcpStream,
    index: usize,
    tally: &Tally,
    stop: &Stop,
    timeline: &mut Timeline,
) -> io::Result<()> {
    let content = Content::new(index as u16);
    let mut offset = 0;
    let mut round = 0u64;
    while !stop.asked() {
        let bytes = piece_bytes(index as u64, round);
        let mut sent = vec![0; bytes as usize];
        content.fill(offset, &mut sent);
        stream.write_all(&sent)?;
        tally.add_sent(bytes);
        let mut answer = vec![0; sent.len()];
        stream.read_exact(&mut answer)?;
        timeline.heard(tally);
        tally.add_received(bytes);
        if let Some(at) = content.first_difference(offset, &answer) {
            let wrong = format!("byte {} of piece {round} is wrong", offset + at as u64);
            tally.add_damaged(1, || format!("connection {index}: {wrong}"));
            // What follows would be out of place as well.
            return Err(io::Error::new(ErrorKind::InvalidData, wrong));
        }
        offset += bytes;
        round += 1;
    }
    Ok(())
}

/// From one byte to the largest piece, small ones as often as large ones.
fn piece_bytes(index: u64, round: u64) -> u64 {
    let mixed = (round ^ (index << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    let limit = 1u64 << (mixed % 16);
    1 + (mixed >> 8) % limit.min(LARGEST_PIECE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_small_and_large() {
        let sizes: Vec<u64> = (0..1000).map(|round| piece_bytes(3, round)).collect();
        assert!(
            sizes
                .iter()
                .all(|bytes| (1..=LARGEST_PIECE_BYTES).contains(bytes))
        );
        assert!(sizes.iter().any(|bytes| *bytes < 4) && sizes.iter().any(|bytes| *bytes > 10_000));
    }
}
