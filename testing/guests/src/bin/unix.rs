//! Unix sockets: pairs with queued data and borders, listeners with a path, a relative path and an
//! abstract name, connections of its own to them, half-closed and abandoned ones, and a datagram
//! socket that talks to a log daemon outside, as syslog(3) does.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use unbroken_guests::raw::{fcntl, option, set_option, unread};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, pattern, refused, same, same_bytes};

const RELATIVE: &str = "relative listener";
const STREAM_BYTES: usize = 20_000;
const MESSAGES: [usize; 4] = [11, 3000, 1, 700];

struct Sockets {
    round: u64,
    stream: (UnixStream, UnixStream),
    datagram: (UnixDatagram, UnixDatagram),
    packets: (OwnedFd, OwnedFd),
    closed: UnixStream,
    half: (UnixStream, UnixStream),
    listener: UnixListener,
    path: std::path::PathBuf,
    named: UnixListener,
    name: SocketAddr,
    /// Its path is one from the working directory.
    relative: UnixListener,
    /// Connections of its own, both ends of them here.
    own: (UnixStream, UnixStream),
    own_relative: (UnixStream, UnixStream),
    /// Its peer is closed, and has left it a message.
    left: Option<UnixDatagram>,
    log: UnixDatagram,
}

impl Guest for Sockets {
    fn set_up(place: &Place) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let packets = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let path = place.directory.join("listener");
        let listener = UnixListener::bind(&path)?;
        let name = SocketAddr::from_abstract_name(format!("guest {}", place.directory.display()))?;
        let named = UnixListener::bind_addr(&name)?;
        let client = UnixStream::connect(&path)?;
        let (server, _) = listener.accept()?;
        std::env::set_current_dir(&place.directory)?;
        let relative = UnixListener::bind(RELATIVE)?;
        let own_relative = UnixStream::connect(RELATIVE)?;
        let own_relative = (own_relative, relative.accept()?.0);
        let (left, gone_too) = UnixDatagram::pair()?;
        gone_too.send(b"left")?;
        drop(gone_too);
        let log = UnixDatagram::unbound()?;
        log.connect(place.directory.join("log"))?;
        let (closed, gone) = UnixStream::pair()?;
        (&gone).write_all(b"last words")?;
        drop(gone);
        let half = UnixStream::pair()?;
        half.0.shutdown(Shutdown::Write)?;
        let stream = UnixStream::pair()?;
        stream.0.set_read_timeout(Some(PATIENCE / 2))?;
        set_option(&stream.1, libc::SOL_SOCKET, libc::SO_PASSCRED, 0)?;
        set_option(&stream.1, libc::SOL_SOCKET, libc::SO_SNDBUF, 70_000)?;
        let own = (client, server);
        let datagram = UnixDatagram::pair()?;
        let mut sockets = Self {
            round: 0,
            stream,
            datagram,
            packets,
            closed,
            half,
            listener,
            path,
            named,
            name,
            relative,
            own,
            own_relative,
            left: Some(left),
            log,
        };
        sockets.arm()?;
        Ok(sockets)
    }

    fn check(&mut self) -> Result<()> {
        self.streams().context("streams")?;
        self.messages().context("messages")?;
        self.listeners().context("listeners")?;
        self.log
            .send(format!("line {}", self.round).as_bytes())
            .context("the log")?;
        self.round += 1;
        self.arm()
    }
}

impl Sockets {
    fn content(&self, length: usize) -> Vec<u8> {
        pattern(self.round * 31 + length as u64, length)
    }

    fn arm(&mut self) -> Result<()> {
        self.stream.1.write_all(&self.content(STREAM_BYTES))?;
        self.own.0.write_all(&self.content(50))?;
        for length in MESSAGES {
            self.datagram.0.send(&self.content(length))?;
            rustix::io::write(&self.packets.0, &self.content(length))?;
        }
        Ok(())
    }

    fn streams(&mut self) -> Result<()> {
        same("bytes unread", unread(&self.stream.0)?, STREAM_BYTES)?;
        let mut found = vec![0; STREAM_BYTES];
        self.stream.0.read_exact(&mut found)?;
        same_bytes("a pair", &found, &self.content(STREAM_BYTES))?;
        same("timeout", self.stream.0.read_timeout()?, Some(PATIENCE / 2))?;
        let size = option(&self.stream.1, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
        same("SO_SNDBUF", size, 140_000)?;
        self.stream.0.write_all(b"back")?;
        let mut back = [0; 4];
        self.stream.1.read_exact(&mut back)?;
        same_bytes("the other way", &back, b"back")?;
        let mut found = vec![0; 50];
        self.own.1.read_exact(&mut found)?;
        same_bytes("a connection of its own", &found, &self.content(50))?;
        let local = self.own.1.local_addr()?;
        same("its name", local.as_pathname(), Some(self.path.as_path()))?;
        let mut words = [0; 100];
        if self.round == 0 {
            let count = self.closed.read(&mut words)?;
            same_bytes("last words", &words[..count], b"last words")?;
        }
        same("bytes after the end", self.closed.read(&mut words)?, 0)?;
        refused("a write to nobody", (&self.closed).write(b"x"), libc::EPIPE)?;
        same(
            "bytes from the half that is closed",
            self.half.1.read(&mut words)?,
            0,
        )?;
        refused("a write into it", (&self.half.0).write(b"x"), libc::EPIPE)?;
        self.half.1.write_all(b"open")?;
        self.half.0.read_exact(&mut back)?;
        same_bytes("the half that is open", &back, b"open")
    }

    fn messages(&mut self) -> Result<()> {
        let mut buffer = [0; 5000];
        for length in MESSAGES {
            let count = self.datagram.1.recv(&mut buffer)?;
            same_bytes("a datagram", &buffer[..count], &self.content(length))?;
            let count = rustix::io::read(&self.packets.1, &mut buffer)?;
            same_bytes("a packet", &buffer[..count], &self.content(length))?;
        }
        refused(
            "another packet",
            rustix::io::read(&self.packets.1, &mut buffer),
            libc::EAGAIN,
        )?;
        if self.round == 1 {
            // A send finds out that the peer is gone, and takes away what it left
            // (net/unix/af_unix.c, unix_dgram_disconnected): this can be looked at once.
            let left = self.left.take().context("a socket whose peer is gone")?;
            let count = left.recv(&mut buffer)?;
            same_bytes("what the peer left", &buffer[..count], b"left")?;
            refused("a message to nobody", left.send(b"x"), libc::ECONNREFUSED)?;
        }
        let flags = fcntl(&self.packets.1, libc::F_GETFL, 0)?;
        same("flags", flags, libc::O_RDWR | libc::O_NONBLOCK)
    }

    fn listeners(&self) -> Result<()> {
        let (connected, accepted) = &self.own_relative;
        for name in [connected.peer_addr()?, accepted.local_addr()?] {
            same(
                "a relative name",
                name.as_pathname(),
                Some(RELATIVE.as_ref()),
            )?;
        }
        for (what, listener) in [
            ("path", &self.listener),
            ("relative path", &self.relative),
            ("abstract name", &self.named),
        ] {
            let mut client = match what {
                "path" => UnixStream::connect(&self.path),
                "relative path" => UnixStream::connect(RELATIVE),
                _ => UnixStream::connect_addr(&self.name),
            }
            .context(what)?;
            let (mut server, _) = listener.accept()?;
            client.write_all(b"hello")?;
            let mut found = [0; 5];
            server.read_exact(&mut found)?;
            same_bytes(what, &found, b"hello")?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Sockets>()
}
