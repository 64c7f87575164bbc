//! Listeners: their options and backlog, connections that wait to be accepted with data that came
//! already, and a thread that waits in accept.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rustix::net::{AddressFamily, SocketType};
use unbroken_guests::raw::{option, option_bytes, set_option};
use unbroken_guests::{Guest, PATIENCE, Place, eventually, main as run, pattern, same, same_bytes};

const BACKLOG: i32 = 77;
const UNREAD_BYTES: usize = 3000;

struct Listeners {
    pending: TcpListener,
    /// Both on one port, which the first does not allow any more.
    sharing: [TcpListener; 2],
    /// Corked before there is a connection.
    corked: OwnedFd,
}

impl Guest for Listeners {
    fn set_up(place: &Place) -> Result<Self> {
        let pending = TcpListener::bind((Ipv4Addr::UNSPECIFIED, place.port + 1))?;
        nix::sys::socket::listen(&pending, nix::sys::socket::Backlog::new(BACKLOG)?)?;
        set_option(&pending, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 0)?;
        set_option(&pending, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        set_option(&pending, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
        set_option(&pending, libc::SOL_SOCKET, libc::SO_RCVBUF, 150_000)?;
        // A listener that a thread waits on: its connections are served by that thread alone.
        let served = TcpListener::bind((Ipv4Addr::UNSPECIFIED, place.port + 2))?;
        std::thread::spawn(move || {
            for stream in served.incoming() {
                let _ = stream.and_then(|mut stream| stream.write_all(b"served\n"));
            }
        });
        let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, place.port + 3);
        let sharing = [share(address)?, share(address)?];
        set_option(&sharing[0], libc::SOL_SOCKET, libc::SO_REUSEPORT, 0)?;
        let corked = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
        set_option(&corked, libc::IPPROTO_TCP, libc::TCP_CORK, 1)?;
        Ok(Self {
            pending,
            sharing,
            corked,
        })
    }

    fn step(&mut self, words: &str) -> Result<()> {
        let Some(("waiting", count)) = words.split_once(' ') else {
            bail!("this guest does not know {words:?}");
        };
        let count: u32 = count.parse()?;
        eventually("connections in the queue", || Ok(self.queue()?.0 == count))
    }

    fn check(&mut self) -> Result<()> {
        let (waiting, backlog) = self.queue()?;
        same("backlog", backlog, BACKLOG as u32)?;
        for (name, level, number, value) in [
            ("SO_KEEPALIVE", libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            ("TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
            ("SO_RCVBUF", libc::SOL_SOCKET, libc::SO_RCVBUF, 300_000),
            ("SO_ACCEPTCONN", libc::SOL_SOCKET, libc::SO_ACCEPTCONN, 1),
            ("SO_REUSEADDR", libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
        ] {
            same(name, option(&self.pending, level, number)?, value)?;
        }
        for (listener, value) in self.sharing.iter().zip([0, 1]) {
            let shares = option(listener, libc::SOL_SOCKET, libc::SO_REUSEPORT)?;
            same("SO_REUSEPORT", shares, value)?;
        }
        self.serve_shared().context("a port of two listeners")?;
        let corked = option(&self.corked, libc::IPPROTO_TCP, libc::TCP_CORK)?;
        same("TCP_CORK", corked, 1)?;
        for number in 0..waiting {
            let (stream, _) = self.pending.accept()?;
            serve(stream).with_context(|| format!("connection {number}"))?;
        }
        same("connections left", self.queue()?.0, 0)
    }
}

impl Listeners {
    /// Connects until both listeners have had their share.
    fn serve_shared(&self) -> Result<()> {
        let port = self.sharing[0].local_addr()?.port();
        let mut served = [0; 2];
        eventually("connections to both listeners", || {
            let _client = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            for (listener, count) in self.sharing.iter().zip(&mut served) {
                listener.set_nonblocking(true)?;
                *count += usize::from(listener.accept().is_ok());
                listener.set_nonblocking(false)?;
            }
            Ok(served.iter().all(|count| *count > 0))
        })
    }

    /// Connections that wait, and how many may: `tcpi_unacked` and `tcpi_sacked` of a listener.
    fn queue(&self) -> Result<(u32, u32)> {
        let mut info = [0; 32];
        option_bytes(&self.pending, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
        let word =
            |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        Ok((word(24), word(28)))
    }
}

fn share(address: SocketAddrV4) -> Result<TcpListener> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket.into())
}

/// Answers what the connection sent before anyone accepted it.
fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut first = [0; 1];
    stream.read_exact(&mut first)?;
    if first == *b"d" {
        let mut found = vec![0; UNREAD_BYTES];
        stream.read_exact(&mut found)?;
        same_bytes(
            "data that came before the accept",
            &found,
            &pattern(9, UNREAD_BYTES),
        )?;
    }
    same(
        "inherited TCP_NODELAY",
        option(&stream, libc::IPPROTO_TCP, libc::TCP_NODELAY)?,
        1,
    )?;
    stream.write_all(b"accepted\n")?;
    Ok(())
}

fn main() -> ExitCode {
    run::<Listeners>()
}
