//! Guests: one tiny server a kind of kernel object. Each sets its objects up, is moved to the
//! replica by a kill, and checks from the inside that it has what it had.
//!
//! A guest is started as `GUEST PORT DIRECTORY`, listens on the port, and obeys one line at a
//! time: `set up` makes the objects, `check` verifies them, uses them, and leaves them ready for
//! another check; some guests know more words. It answers `ok`, or `wrong: ` and what differs.
//! Everything is said over connections that a takeover must keep, so the harness sees a hang or a
//! reset of those too.

pub mod announced;
pub mod area;
pub mod raw;
pub mod registers;
pub mod robust;
pub mod signals;
pub mod text;
pub mod timer;

use std::fmt::Debug;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// How long a guest waits for what must happen. Reached only by something that was lost.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Where a guest finds itself.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its own port; the ones after it are free for it too.
    pub port: u16,
    /// A directory of its own.
    pub directory: PathBuf,
    /// The host's end of the connection that told it to set up.
    pub host: SocketAddr,
    /// Its own end.
    pub own: IpAddr,
}

/// A program that keeps kernel objects through takeovers.
pub trait Guest: Sized {
    /// Makes the objects and leaves them ready for a check.
    fn set_up(place: &Place) -> Result<Self>;

    /// Fails with what differs; uses the objects; leaves them ready for another check.
    fn check(&mut self) -> Result<()>;

    /// A step that needs the host to do something before or after it.
    fn step(&mut self, words: &str) -> Result<()> {
        bail!("this guest does not know {words:?}")
    }
}

/// The program of a guest.
pub fn main<G: Guest>() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // What follows is the guest's own.
    let [port, directory, ..] = arguments.as_slice() else {
        eprintln!("usage: give the port to serve on and a directory to use");
        return ExitCode::from(2);
    };
    match serve::<G>(port, directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("{cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve<G: Guest>(port: &str, directory: &str) -> Result<()> {
    let port: u16 = port.parse().context("the port is no number")?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    let mut guest: Option<G> = None;
    loop {
        let (stream, host) = listener.accept()?;
        let place = Place {
            port,
            directory: directory.into(),
            host,
            own: stream.local_addr()?.ip(),
        };
        // A harness that goes away ends its connection, not the guest.
        if let Err(cause) = converse(&mut guest, &stream, &place) {
            eprintln!("connection of {host}: {cause:#}");
        }
    }
}

fn converse<G: Guest>(guest: &mut Option<G>, stream: &TcpStream, place: &Place) -> io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next().transpose()? {
        let answer = match obey(guest, line.trim(), place) {
            Ok(()) => "ok".to_string(),
            Err(cause) => format!("wrong: {}", format!("{cause:#}").replace('\n', "; ")),
        };
        (&*stream).write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

fn obey<G: Guest>(guest: &mut Option<G>, words: &str, place: &Place) -> Result<()> {
    match (words, guest) {
        ("set up", slot) => {
            *slot = Some(G::set_up(place)?);
            Ok(())
        }
        (_, None) => bail!("nothing is set up"),
        ("check", Some(guest)) => guest.check(),
        (words, Some(guest)) => guest.step(words),
    }
}

/// Fails unless both are equal, and says what they are.
pub fn same<T: PartialEq + Debug>(what: &str, found: T, expected: T) -> Result<()> {
    ensure!(
        found == expected,
        "{what}: {found:?} instead of {expected:?}"
    );
    Ok(())
}

/// Fails unless both are equal, and says where they differ: for content.
pub fn same_bytes(what: &str, found: &[u8], expected: &[u8]) -> Result<()> {
    same(&format!("length of {what}"), found.len(), expected.len())?;
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(at) = differs {
        bail!(
            "{what}: byte {at} is {:#04x} instead of {:#04x}",
            found[at],
            expected[at]
        );
    }
    Ok(())
}

/// Fails unless the call failed with this errno.
pub fn refused<T: Debug, E: Into<io::Error>>(
    what: &str,
    result: Result<T, E>,
    errno: i32,
) -> Result<()> {
    let code = match result {
        Ok(value) => bail!("{what} worked and gave {value:?}"),
        Err(cause) => cause.into().raw_os_error(),
    };
    same(&format!("errno of {what}"), code, Some(errno))
}

/// Bytes that repeat nowhere nearby and differ by `seed`.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64: its low bits are good enough for content.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Waits until `condition` holds; the error names what was waited for.
pub fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = std::time::Instant::now();
    while !condition()? {
        ensure!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
