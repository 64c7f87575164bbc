//! Connections that the service opens itself, to a server of the host's: one that is answered
//! late, one that sends all the time, one whose connect is under way.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;

use anyhow::{Context, Result};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, same};

struct Outward {
    server: SocketAddr,
    /// Opened once, and asked again and again.
    lasting: TcpStream,
    local: SocketAddr,
    /// Has sent its question before the move and reads the answer after it.
    asked: TcpStream,
    round: u32,
}

impl Guest for Outward {
    fn set_up(place: &Place) -> Result<Self> {
        // The host serves on the port after the guest's own.
        let server = SocketAddr::new(place.host.ip(), place.port + 1);
        let lasting = connect(server)?;
        let local = lasting.local_addr()?;
        let mut outward = Self {
            server,
            lasting,
            local,
            asked: connect(server)?,
            round: 0,
        };
        outward.arm()?;
        Ok(outward)
    }

    fn check(&mut self) -> Result<()> {
        same("own address", self.lasting.local_addr()?, self.local)?;
        same(
            "the server's address",
            self.lasting.peer_addr()?,
            self.server,
        )?;
        let mut answer = [0; 5];
        self.asked
            .read_exact(&mut answer)
            .context("read the answer to a question of before")?;
        same("answer", answer, *b"echo\n")?;
        for _ in 0..3 {
            self.lasting.write_all(b"echo\n")?;
            self.lasting.read_exact(&mut answer).context("ask again")?;
            same("answer", answer, *b"echo\n")?;
        }
        self.round += 1;
        self.asked = connect(self.server).context("connect anew")?;
        self.arm()
    }
}

impl Outward {
    fn arm(&mut self) -> Result<()> {
        self.asked.write_all(b"echo\n")?;
        Ok(())
    }
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn main() -> ExitCode {
    run::<Outward>()
}
