//! UDP sockets: bound, connected, with options, and with datagrams that nobody has read.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::ExitCode;

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType};
use unbroken_guests::raw::{option, set_option, unread};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, pattern, refused, same, same_bytes};

/// Not among them: an empty one, which the kernel lets nobody peek at twice (net/core/datagram.c).
const SIZES: [usize; 3] = [7, 1200, 1];

struct Datagrams {
    bound: UdpSocket,
    connected: UdpSocket,
    peer: UdpSocket,
    /// Shut down for writing.
    silent: UdpSocket,
    /// Both on one address, which the first does not allow any more.
    sharing: (UdpSocket, UdpSocket),
    local: SocketAddr,
    round: u64,
}

impl Guest for Datagrams {
    fn set_up(place: &Place) -> Result<Self> {
        let bound = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, place.port + 1))?;
        let (connected, peer) = (
            UdpSocket::bind((place.own, 0))?,
            UdpSocket::bind((place.own, 0))?,
        );
        connected.connect(peer.local_addr()?)?;
        peer.connect(connected.local_addr()?)?;
        for socket in [&bound, &connected, &peer] {
            socket.set_read_timeout(Some(PATIENCE))?;
        }
        let silent = UdpSocket::bind((place.own, 0))?;
        silent.connect(peer.local_addr()?)?;
        rustix::net::shutdown(&silent, rustix::net::Shutdown::Write)?;
        let sharing = share(SocketAddr::new(place.own, place.port + 2))?;
        set_option(&bound, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)?;
        set_option(&bound, libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
        set_option(&bound, libc::IPPROTO_IP, libc::IP_TTL, 33)?;
        set_option(&bound, libc::SOL_SOCKET, libc::SO_RCVBUF, 90_000)?;
        let mut datagrams = Self {
            local: connected.local_addr()?,
            bound,
            connected,
            peer,
            silent,
            sharing,
            round: 0,
        };
        datagrams.arm()?;
        Ok(datagrams)
    }

    fn check(&mut self) -> Result<()> {
        same("own address", self.connected.local_addr()?, self.local)?;
        same("peer", self.connected.peer_addr()?, self.peer.local_addr()?)?;
        for (name, level, number, value) in [
            ("SO_BROADCAST", libc::SOL_SOCKET, libc::SO_BROADCAST, 1),
            ("SO_NO_CHECK", libc::SOL_SOCKET, libc::SO_NO_CHECK, 1),
            ("IP_TTL", libc::IPPROTO_IP, libc::IP_TTL, 33),
            ("SO_RCVBUF", libc::SOL_SOCKET, libc::SO_RCVBUF, 180_000),
        ] {
            same(name, option(&self.bound, level, number)?, value)?;
        }
        refused("a silent send", self.silent.send(b"x"), libc::EPIPE)?;
        for (socket, value) in [(&self.sharing.0, 0), (&self.sharing.1, 1)] {
            let reuse = option(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
            same("SO_REUSEADDR", reuse, value)?;
        }
        same(
            "bytes in the first datagram",
            unread(&self.connected)?,
            SIZES[0],
        )?;
        let mut buffer = [0; 2000];
        for (number, size) in SIZES.into_iter().enumerate() {
            let what = format!("unread datagram {number}");
            let count = self.connected.recv(&mut buffer).context(what.clone())?;
            same_bytes(&what, &buffer[..count], &self.content(size))?;
        }
        self.connected.send(b"back")?;
        let count = self
            .peer
            .recv(&mut buffer)
            .context("a datagram from the connected socket")?;
        same_bytes("the other way", &buffer[..count], b"back")?;
        self.round += 1;
        self.arm()
    }
}

impl Datagrams {
    fn content(&self, size: usize) -> Vec<u8> {
        pattern(self.round + 70 + size as u64, size)
    }

    fn arm(&mut self) -> Result<()> {
        for size in SIZES {
            self.peer.send(&self.content(size))?;
        }
        Ok(())
    }
}

fn share(address: SocketAddr) -> Result<(UdpSocket, UdpSocket)> {
    let open = || -> Result<UdpSocket> {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        rustix::net::bind(&socket, &address)?;
        Ok(socket.into())
    };
    let sharing = (open()?, open()?);
    set_option(&sharing.0, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0)?;
    Ok(sharing)
}

fn main() -> ExitCode {
    run::<Datagrams>()
}
