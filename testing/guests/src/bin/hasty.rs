//! Says all it has to say to whoever connects and closes at once, long before the client has heard
//! it: such a connection comes and goes between two looks at the descriptor table.

use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;

use anyhow::Result;
use unbroken_guests::raw::set_option;
use unbroken_guests::{Guest, Place, main as run, pattern};

/// More than a client's window takes before it reads.
const WORDS_BYTES: usize = 400_000;

struct Hasty;

impl Guest for Hasty {
    fn set_up(place: &Place) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, place.port + 1))?;
        // Room for everything, so that nothing waits for the client; connections inherit it.
        set_option(&listener, libc::SOL_SOCKET, libc::SO_SNDBUF, 1 << 20)?;
        let words = pattern(5, WORDS_BYTES);
        std::thread::spawn(move || serve(&listener, &words));
        Ok(Self)
    }

    fn check(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Clients that it cannot serve miss what they expect, and say so.
fn serve(listener: &TcpListener, words: &[u8]) -> io::Result<()> {
    for stream in listener.incoming() {
        stream?.write_all(words)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    run::<Hasty>()
}
