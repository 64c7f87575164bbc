//! Clients that connect, exchange one line and close, as fast as they can: every connection must
//! come up, be answered rightly and end in order, whatever happens to the server meanwhile.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use crate::running::{ClientError, PATIENCE, Running};
use crate::tally::Tally;

const NAME: &str = "churn";
const AFTER_A_FAILURE: Duration = Duration::from_millis(50);

/// Who closes first; the server reads it off the first letter of the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    ServerFirst,
    ClientFirst,
    /// The client says all it has to say, ends its side, and then reads the answer.
    HalfClose,
}

const ORDERS: [Order; 3] = [Order::ServerFirst, Order::ClientFirst, Order::HalfClose];

/// Starts `clients` of them against a [`crate::serve`] churn server. Returns when one exchange has
/// succeeded.
pub fn start(address: SocketAddr, clients: usize) -> Result<Running, ClientError> {
    let mut running = Running::new(NAME);
    converse(address, Order::ServerFirst, "first")
        .map_err(|cause| ClientError::Connect { address, cause })?;
    for client in 0..clients {
        running.spawn(move |tally, stop| {
            let ear = tally.listen();
            let mut round = 0u64;
            while !stop.asked() {
                let order = ORDERS[(round % 3) as usize];
                one_round(address, order, client, round, &tally);
                ear.heard(&tally);
                round += 1;
            }
            Vec::new()
        })?;
    }
    Ok(running)
}

fn one_round(address: SocketAddr, order: Order, client: usize, round: u64, tally: &Tally) {
    let word = format!("{client}-{round}");
    tally.add_sent(1);
    match converse(address, order, &word) {
        Ok(()) => tally.add_received(1),
        Err(cause) if cause.kind() == ErrorKind::InvalidData => {
            tally.add_damaged(1, || format!("{order:?} {word}: {cause}"));
        }
        Err(cause) => {
            tally.add_reconnect(|| format!("{order:?} {word}: {cause}"));
            // A server that is gone must not be hammered: this run has failed anyway.
            std::thread::sleep(AFTER_A_FAILURE);
        }
    }
}

/// One connection from its start to its end.
fn converse(address: SocketAddr, order: Order, word: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)
        .map_err(|cause| during("connecting", &cause))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let letter = match order {
        Order::ServerFirst => 's',
        Order::ClientFirst => 'c',
        Order::HalfClose => 'h',
    };
    stream
        .write_all(format!("{letter} {word}\n").as_bytes())
        .map_err(|cause| during("sending", &cause))?;
    if order == Order::HalfClose {
        stream
            .shutdown(Shutdown::Write)
            .map_err(|cause| during("ending our side", &cause))?;
    }
    let expected = format!("{letter} {word} answered\n");
    let mut answer = vec![0; expected.len()];
    stream
        .read_exact(&mut answer)
        .map_err(|cause| during("reading the answer", &cause))?;
    if answer != expected.as_bytes() {
        let found = String::from_utf8_lossy(&answer).into_owned();
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("answered {found:?}"),
        ));
    }
    if order != Order::ClientFirst {
        let mut rest = Vec::new();
        stream
            .read_to_end(&mut rest)
            .map_err(|cause| during("waiting for the end", &cause))?;
        if !rest.is_empty() {
            let why = format!("{} bytes after the answer", rest.len());
            return Err(io::Error::new(ErrorKind::InvalidData, why));
        }
    }
    Ok(())
}

fn during(step: &str, cause: &io::Error) -> io::Error {
    io::Error::new(cause.kind(), format!("{step}: {cause}"))
}
