//! Guests whose objects have another end at the host's side, which plays its part here.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use unbroken_guests::raw::set_option;
use unbroken_guests::{pattern, same, same_bytes};
use unbroken_harness::{PATIENCE, wait_until};

use super::Guest;

/// As the guest `tcp` has it.
const UNREAD_BYTES: usize = 50_000;
const FLOOD_BYTES: usize = 1 << 20;

/// What connections the guest `tcp` knows.
const KINDS: [&str; 8] = [
    "idle",
    "unread",
    "queue",
    "client closed",
    "client closed, queue",
    "server closed",
    "both closed",
    "options",
];

/// The host's end of a connection.
struct Client {
    kind: &'static str,
    stream: TcpStream,
}

impl Client {
    fn open(kind: &'static str, address: SocketAddr) -> Result<Self> {
        let mut stream = connect(address)?;
        if kind.ends_with("queue") {
            // Little room here, so that the guest's queue fills and stays full.
            set_option(&stream, libc::SOL_SOCKET, libc::SO_RCVBUF, 30_000)?;
        }
        stream.write_all(format!("{kind}\n").as_bytes())?;
        Ok(Self { kind, stream })
    }

    /// The guest has accepted it and done its part.
    fn act(&mut self) -> Result<()> {
        if matches!(self.kind, "unread" | "client closed") {
            self.stream.write_all(&pattern(3, UNREAD_BYTES))?;
        }
        if self.kind.starts_with("client closed") || self.kind == "both closed" {
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// What comes to a connection only after the move.
    fn act_late(&mut self) -> Result<()> {
        if self.kind == "server closed" {
            self.stream.write_all(b"late\n")?;
        }
        Ok(())
    }

    fn look(&mut self) -> Result<()> {
        let expected = match self.kind {
            "queue" | "client closed, queue" => pattern(5, FLOOD_BYTES),
            "server closed" | "both closed" => Vec::new(),
            kind => format!("{kind} done\n").into_bytes(),
        };
        if self.kind.ends_with("queue") {
            // A window of less than two segments would let each wait for a delayed answer.
            set_option(&self.stream, libc::SOL_SOCKET, libc::SO_RCVBUF, 4 << 20)?;
        }
        let mut found = Vec::new();
        // The guest ends every connection, in order.
        self.stream.read_to_end(&mut found)?;
        same_bytes("what the client heard", &found, &expected)
    }
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The same from a port of our choice.
fn connect_from(port: u16, address: SocketAddr) -> Result<TcpStream> {
    use rustix::io::Errno;
    use rustix::net::{
        AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt,
    };
    let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC);
    let end = socket_with(AddressFamily::INET, kind, flags, None)?;
    sockopt::set_socket_reuseaddr(&end, true)?;
    bind(&end, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    // The one before it from that port may still wait for its last acknowledgement.
    wait_until("the port is free", PATIENCE, || {
        match connect(&end, &address) {
            Err(Errno::ADDRNOTAVAIL) => Ok(None),
            result => Ok(Some(result?)),
        }
    })?;
    let stream = TcpStream::from(end);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One connection of each kind, moved so often.
fn connections(guest: &mut Guest, address: IpAddr, moves: usize) -> Result<()> {
    let address = SocketAddr::new(address, guest.address().port() + 1);
    let open = |kind: &&'static str| Client::open(kind, address).context(*kind);
    let mut clients: Vec<Client> = KINDS.iter().map(open).collect::<Result<_>>()?;
    guest.tell(&format!("hold {}", clients.len()))?;
    for client in &mut clients {
        client.act().context(client.kind)?;
    }
    guest.tell("settled")?;
    for _ in 0..moves {
        guest.move_on()?;
    }
    for client in &mut clients {
        client.act_late().context(client.kind)?;
    }
    guest.tell("check")?;
    for client in &mut clients {
        client.look().context(client.kind)?;
    }
    Ok(())
}

fn tcp(program_options: &[&str], version_6: bool) -> Result<()> {
    let mut guest = Guest::start("tcp", program_options)?;
    guest.tell("set up")?;
    let address = if version_6 {
        guest.address_v6()?
    } else {
        guest.address().ip()
    };
    for moves in 0..=2 {
        let moved = connections(&mut guest, address, moves);
        moved.with_context(|| format!("with {moves} kills"))?;
    }
    guest.stop()
}

#[test]
fn connections_in_every_state_go_on() -> Result<()> {
    tcp(&[], false)
}

#[test]
fn connections_of_ip_version_6_go_on() -> Result<()> {
    tcp(&[], true)
}

#[test]
fn connections_that_wait_are_accepted_after_the_move() -> Result<()> {
    let mut guest = Guest::start("listener", &[])?;
    guest.tell("set up")?;
    let port = guest.address().port();
    let pending = SocketAddr::new(guest.address().ip(), port + 1);
    let served = SocketAddr::new(guest.address().ip(), port + 2);
    for moves in 0..=2 {
        let mut clients = Vec::new();
        for kind in ["d", "x", "d", "x", ""] {
            let mut stream = connect(pending)?;
            stream.write_all(kind.as_bytes())?;
            if kind == "d" {
                stream.write_all(&pattern(9, 3000))?;
            }
            clients.push((kind, stream));
        }
        guest.tell(&format!("waiting {}", clients.len()))?;
        let end = Arc::new(AtomicBool::new(false));
        // Somebody connects all the time, so that the kill meets half-open connections.
        let callers: Vec<_> = (0..3).map(|_| call_all_the_time(served, &end)).collect();
        for _ in 0..moves {
            guest.move_on()?;
        }
        end.store(true, Ordering::SeqCst);
        for caller in callers {
            let calls = caller
                .join()
                .map_err(|_| anyhow::anyhow!("a caller panicked"))??;
            ensure!(calls > 0, "nobody called");
        }
        for (kind, stream) in &mut clients {
            if kind.is_empty() {
                stream.write_all(b"x")?;
            }
        }
        guest
            .tell("check")
            .with_context(|| format!("after {moves} kills"))?;
        for (kind, stream) in &mut clients {
            let mut heard = String::new();
            stream
                .read_to_string(&mut heard)
                .with_context(|| format!("client {kind:?}"))?;
            same("answer", heard.as_str(), "accepted\n")?;
        }
    }
    guest.stop()
}

/// A connection that waits to be accepted, from the port of one that the service closed first and
/// whose TIME_WAIT its kernel still has. (Found by torture: a kernel gives such a connection no cookie,
/// and the replica's reset it.)
#[test]
fn a_client_that_comes_back_from_its_port_is_accepted_after_the_move() -> Result<()> {
    const PORT: u16 = 20_000;
    let mut guest = Guest::start("listener", &[])?;
    guest.tell("set up")?;
    let address = SocketAddr::new(guest.address().ip(), guest.address().port() + 1);
    for moves in [0, 1, 0, 2] {
        let mut client = connect_from(PORT, address)?;
        client.write_all(b"x")?;
        guest.tell("waiting 1")?;
        for _ in 0..moves {
            guest.move_on()?;
        }
        guest.tell("check")?;
        // To its end, which comes from the guest.
        let mut heard = String::new();
        client
            .read_to_string(&mut heard)
            .with_context(|| format!("after {moves} kills"))?;
        same("answer", heard.as_str(), "accepted\n")?;
    }
    guest.stop()
}

/// A handshake whose last packet is lost, with a kill before it comes again: the client has been told
/// that it is connected, and no kernel of the service knows of it (KERNEL.md, Syncookies).
#[test]
fn a_half_open_connection_is_served_by_the_replica() -> Result<()> {
    let mut guest = Guest::start("listener", &[])?;
    guest.tell("set up")?;
    let address = SocketAddr::new(guest.address().ip(), guest.address().port() + 2);
    for moves in 1..=2 {
        let losing = Losing::begin(address)?;
        let mut clients: Vec<TcpStream> =
            (0..4).map(|_| connect(address)).collect::<Result<_>>()?;
        for _ in 0..moves {
            guest.move_on()?;
        }
        losing.end()?;
        for client in &mut clients {
            client.write_all(b"x")?;
            let mut heard = [0; 7];
            client
                .read_exact(&mut heard)
                .with_context(|| format!("half open through {moves} kills"))?;
            same_bytes("what the client heard", &heard, b"served\n")?;
        }
    }
    guest.stop()
}

/// While it lasts, whatever clients send to one port is lost, but for the first packets of their
/// handshakes.
struct Losing;

impl Losing {
    const TABLE: &str = "inet lossy";

    fn begin(address: SocketAddr) -> Result<Self> {
        let table = Self::TABLE;
        let port = address.port();
        let chain = "type filter hook output priority 0;";
        nft(&format!(
            "add table {table}; add chain {table} out {{ {chain} }}; \
             add rule {table} out tcp dport {port} tcp flags & (syn | ack) == ack drop"
        ))?;
        Ok(Self)
    }

    fn end(self) -> Result<()> {
        nft(&format!("delete table {}", Self::TABLE))
    }
}

fn nft(rules: &str) -> Result<()> {
    let ran = std::process::Command::new("nft").arg(rules).output()?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(ran.status.success(), "nft {rules:?}: {said}");
    Ok(())
}

/// A connection that was accepted, used and closed between two captures stands in none, and yet its
/// client is owed the rest (I4): one that reads nothing before the kills are over, and one that reads
/// all the time, so that the service's kernel goes on sending after the close.
#[test]
fn what_was_said_before_a_close_is_heard() -> Result<()> {
    let mut guest = Guest::start("hasty", &[])?;
    guest.tell("set up")?;
    let address = SocketAddr::new(guest.address().ip(), guest.address().port() + 1);
    for moves in 0..=2 {
        let waiting: Vec<TcpStream> = (0..8).map(|_| connect(address)).collect::<Result<_>>()?;
        let reading: Vec<TcpStream> = (0..4).map(|_| connect(address)).collect::<Result<_>>()?;
        let start = |client, pause| std::thread::spawn(move || hear_all(client, pause));
        let reading: Vec<_> = reading
            .into_iter()
            .map(|client| start(client, PAUSE))
            .collect();
        for _ in 0..moves {
            guest.move_on()?;
        }
        let waiting: Vec<_> = waiting
            .into_iter()
            .map(|client| start(client, Duration::ZERO))
            .collect();
        for (what, clients) in [("waiting", waiting), ("reading", reading)] {
            for client in clients {
                let heard = client
                    .join()
                    .map_err(|_| anyhow::anyhow!("a client panicked"))?;
                heard.with_context(|| format!("{what} through {moves} kills"))?;
            }
        }
    }
    guest.stop()
}

/// Between two reads of a client that is slower than the service.
const PAUSE: Duration = Duration::from_millis(10);

/// Reads what the guest `hasty` says, to its orderly end.
fn hear_all(mut client: TcpStream, pause: Duration) -> Result<()> {
    /// As the guest has it.
    const WORDS_BYTES: usize = 400_000;
    let mut heard = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let read = client.read(&mut piece);
        let length = read.with_context(|| format!("{} bytes heard", heard.len()))?;
        if length == 0 {
            return same_bytes("what was said", &heard, &pattern(5, WORDS_BYTES));
        }
        heard.extend_from_slice(&piece[..length]);
        std::thread::sleep(pause);
    }
}

/// Connections one after the other until `end`, each served to its end; how many.
fn call_all_the_time(
    address: SocketAddr,
    end: &Arc<AtomicBool>,
) -> std::thread::JoinHandle<Result<u32>> {
    let end = Arc::clone(end);
    std::thread::spawn(move || {
        let mut calls = 0;
        loop {
            let mut heard = String::new();
            let call =
                connect(address).and_then(|mut stream| Ok(stream.read_to_string(&mut heard)?));
            call.with_context(|| format!("call {calls}"))?;
            same("served", heard.as_str(), "served\n")?;
            calls += 1;
            if end.load(Ordering::SeqCst) {
                return Ok(calls);
            }
        }
    })
}

#[test]
fn connections_to_outside_go_on() -> Result<()> {
    let guest = Guest::start("outward", &[])?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, guest.address().port() + 1))?;
    // It ends with the test's process; every connection has a thread of its own.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || echo(stream));
        }
    });
    guest.go_through_all()
}

fn echo(stream: std::io::Result<TcpStream>) -> std::io::Result<u64> {
    let mut stream = stream?;
    std::io::copy(&mut stream.try_clone()?, &mut stream)
}

#[test]
fn unix_sockets_keep_their_queues_and_names() -> Result<()> {
    let mut guest = Guest::start("unix", &[])?;
    let log = UnixDatagram::bind(guest.directory().join("log"))?;
    log.set_read_timeout(Some(PATIENCE))?;
    let checks = guest.set_up_and_check()?;
    let mut buffer = [0; 100];
    for number in 0..checks {
        let count = log.recv(&mut buffer)?;
        let expected = format!("line {number}");
        same_bytes("a line of the log", &buffer[..count], expected.as_bytes())?;
    }
    log.set_nonblocking(true)?;
    ensure!(log.recv(&mut buffer).is_err(), "a line came twice");
    guest.stop()
}
