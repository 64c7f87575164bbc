//! TCP connections in every state that a server meets, made by the host's side: unread data, a
//! send queue that the client does not take, half-closed by either side or by both, options, and
//! connections over IPv4 and IPv6 alike.
//!
//! The host makes connections and says what each is to become in its first line; `hold` waits
//! until all stand as they should, and `check` looks, after a move, at what was read and sent.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use unbroken_guests::raw::{
    ioctl_integer, option, option_bytes, set_option, set_option_bytes, unread,
};
use unbroken_guests::{Guest, PATIENCE, Place, eventually, main as run, pattern, same, same_bytes};

const UNREAD_BYTES: usize = 50_000;
/// More than any queue takes: the writer is cut off when the queue is full.
const FLOOD_BYTES: usize = 1 << 20;
/// Refused writes, 5 ms apart.
const FULL_AFTER: u32 = 40;
const SIOCOUTQ: u64 = libc::TIOCOUTQ;

struct Connections {
    listener: TcpListener,
    held: Vec<Held>,
}

struct Held {
    kind: String,
    stream: TcpStream,
    /// Bytes that were sent and are still in the queue at `hold`, at least some.
    sent: usize,
}

impl Guest for Connections {
    fn set_up(place: &Place) -> Result<Self> {
        // Both families.
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, place.port + 1))?;
        Ok(Self {
            listener,
            held: Vec::new(),
        })
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words.split_once(' ') {
            Some(("hold", count)) => self.hold(count.parse()?),
            // What the host has sent has arrived, acknowledgements and ends too.
            _ if words == "settled" => self.settled(),
            _ => bail!("this guest does not know {words:?}"),
        }
    }

    fn check(&mut self) -> Result<()> {
        for held in &mut self.held {
            held.look().with_context(|| held.kind.clone())?;
        }
        for mut held in std::mem::take(&mut self.held) {
            held.use_it().with_context(|| held.kind.clone())?;
        }
        Ok(())
    }
}

impl Connections {
    /// Accepts so many connections and brings each into its state.
    fn hold(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let (mut stream, _) = self.listener.accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut line = Vec::new();
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte)?;
                line.extend_from_slice(&byte);
            }
            let kind = String::from_utf8(line)?.trim().to_string();
            let mut held = Held {
                kind,
                stream,
                sent: 0,
            };
            held.begin().with_context(|| held.kind.clone())?;
            self.held.push(held);
        }
        Ok(())
    }

    fn settled(&self) -> Result<()> {
        for held in &self.held {
            let what = format!("the end that the host sends: {}", held.kind);
            eventually(&what, || held.is_settled())?;
        }
        Ok(())
    }
}

/// `tcpi_state`, the first byte of `struct tcp_info`.
fn state(stream: &TcpStream) -> Result<u8> {
    let mut info = [0; 1];
    option_bytes(stream, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(info[0])
}

// net/tcp_states.h
const ESTABLISHED: u8 = 1;
const FIN_WAIT2: u8 = 5;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;

/// Options and the values that they are given: level, name, value.
const OPTIONS: [(&str, i32, i32, i32); 16] = [
    // It changes the priority, which is set after it.
    ("IP_TOS", libc::IPPROTO_IP, libc::IP_TOS, 0x10),
    ("TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    ("TCP_KEEPIDLE", libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
    ("TCP_KEEPINTVL", libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 13),
    ("TCP_KEEPCNT", libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
    (
        "TCP_USER_TIMEOUT",
        libc::IPPROTO_TCP,
        libc::TCP_USER_TIMEOUT,
        33_000,
    ),
    ("TCP_LINGER2", libc::IPPROTO_TCP, libc::TCP_LINGER2, 17),
    ("TCP_SYNCNT", libc::IPPROTO_TCP, libc::TCP_SYNCNT, 4),
    (
        "TCP_NOTSENT_LOWAT",
        libc::IPPROTO_TCP,
        libc::TCP_NOTSENT_LOWAT,
        32_768,
    ),
    ("SO_KEEPALIVE", libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    ("SO_OOBINLINE", libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
    ("SO_PRIORITY", libc::SOL_SOCKET, libc::SO_PRIORITY, 4),
    ("SO_RCVLOWAT", libc::SOL_SOCKET, libc::SO_RCVLOWAT, 3),
    ("SO_MARK", libc::SOL_SOCKET, libc::SO_MARK, 0x1234),
    ("IP_TTL", libc::IPPROTO_IP, libc::IP_TTL, 42),
    ("IPV6_TCLASS", libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20),
];
/// `struct linger`: on, 9 s; `struct timeval`: 3 s.
const LINGER: [u8; 8] = [1, 0, 0, 0, 9, 0, 0, 0];
const TIMEOUT: [u8; 16] = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

impl Held {
    fn begin(&mut self) -> Result<()> {
        match self.kind.as_str() {
            "unread" | "client closed" | "idle" => Ok(()),
            "queue" | "client closed, queue" => {
                self.stream.set_nonblocking(true)?;
                // Or the queue would take all there is.
                set_option(&self.stream, libc::SOL_SOCKET, libc::SO_SNDBUF, 150_000)?;
                let flood = pattern(5, FLOOD_BYTES);
                // Full is a queue that the other side does not empty any more.
                let mut refused_in_a_row = 0;
                while refused_in_a_row < FULL_AFTER {
                    match self.stream.write(&flood[self.sent..]) {
                        Ok(count) => (self.sent, refused_in_a_row) = (self.sent + count, 0),
                        Err(_) => {
                            refused_in_a_row += 1;
                            std::thread::sleep(std::time::Duration::from_millis(5));
                        }
                    }
                }
                ensure!(self.sent < FLOOD_BYTES, "the queue took everything");
                self.stream.set_nonblocking(false)?;
                Ok(())
            }
            "server closed" | "both closed" => Ok(self.stream.shutdown(Shutdown::Write)?),
            "options" => self.set_options(),
            other => bail!("no connection of kind {other:?}"),
        }
    }

    fn set_options(&self) -> Result<()> {
        for (name, level, option, value) in OPTIONS {
            set_option(&self.stream, level, option, value).context(name)?;
        }
        set_option_bytes(&self.stream, libc::SOL_SOCKET, libc::SO_LINGER, &LINGER)?;
        set_option_bytes(&self.stream, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &TIMEOUT)?;
        set_option_bytes(&self.stream, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &TIMEOUT)?;
        set_option_bytes(
            &self.stream,
            libc::IPPROTO_TCP,
            libc::TCP_CONGESTION,
            b"reno",
        )?;
        set_option(&self.stream, libc::SOL_SOCKET, libc::SO_SNDBUF, 100_000)?;
        set_option(&self.stream, libc::SOL_SOCKET, libc::SO_RCVBUF, 120_000)?;
        Ok(())
    }

    fn expected_state(&self) -> u8 {
        match self.kind.as_str() {
            "client closed" | "client closed, queue" => CLOSE_WAIT,
            "server closed" => FIN_WAIT2,
            "both closed" => CLOSE,
            _ => ESTABLISHED,
        }
    }

    fn is_settled(&self) -> Result<bool> {
        let bytes = match self.kind.as_str() {
            "unread" | "client closed" => UNREAD_BYTES,
            _ => 0,
        };
        Ok(state(&self.stream)? == self.expected_state() && unread(&self.stream)? == bytes)
    }

    /// Everything is as it was, seen without changing anything.
    fn look(&self) -> Result<()> {
        same("state", state(&self.stream)?, self.expected_state())?;
        match self.kind.as_str() {
            "unread" | "client closed" => same("bytes unread", unread(&self.stream)?, UNREAD_BYTES),
            "queue" | "client closed, queue" => {
                let queued = ioctl_integer(&self.stream, SIOCOUTQ)?;
                ensure!(queued > 0, "the send queue is empty");
                Ok(())
            }
            "options" => self.look_at_options(),
            _ => Ok(()),
        }
    }

    fn look_at_options(&self) -> Result<()> {
        for (name, level, number, value) in OPTIONS {
            same(name, option(&self.stream, level, number)?, value)?;
        }
        let bytes = |level, name, length: usize| -> Result<Vec<u8>> {
            let mut value = vec![0; length];
            let length = option_bytes(&self.stream, level, name, &mut value)?;
            value.truncate(length);
            Ok(value)
        };
        same(
            "SO_LINGER",
            bytes(libc::SOL_SOCKET, libc::SO_LINGER, 8)?,
            LINGER.to_vec(),
        )?;
        for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            // The kernel counts in ticks of its clock.
            let found = bytes(libc::SOL_SOCKET, name, 16)?;
            same(&format!("timeout {name}"), found, TIMEOUT.to_vec())?;
        }
        let mut name = bytes(libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16)?;
        name.retain(|byte| *byte != 0);
        same(
            "TCP_CONGESTION",
            String::from_utf8(name)?,
            "reno".to_string(),
        )?;
        same(
            "SO_SNDBUF",
            option(&self.stream, libc::SOL_SOCKET, libc::SO_SNDBUF)?,
            200_000,
        )?;
        // At least: the replica takes as much more as the window that the client was promised
        // needs, or what fits the promise would be dropped.
        let receive_buffer = option(&self.stream, libc::SOL_SOCKET, libc::SO_RCVBUF)?;
        ensure!(receive_buffer >= 240_000, "SO_RCVBUF is {receive_buffer}");
        Ok(())
    }

    /// Does to the end what can still be done with it.
    fn use_it(&mut self) -> Result<()> {
        match self.kind.as_str() {
            "unread" | "client closed" => {
                let mut found = vec![0; UNREAD_BYTES];
                self.stream.read_exact(&mut found)?;
                same_bytes("unread data", &found, &pattern(3, UNREAD_BYTES))?;
            }
            // From here on it is a thread's, which ends with the connection.
            "queue" | "client closed, queue" => {
                let (mut stream, sent) = (self.stream.try_clone()?, self.sent);
                std::thread::spawn(move || {
                    let rest = pattern(5, FLOOD_BYTES).split_off(sent);
                    let _ = stream
                        .write_all(&rest)
                        .and_then(|()| stream.shutdown(Shutdown::Write));
                });
                return Ok(());
            }
            "server closed" => {
                let mut line = [0; 5];
                self.stream.read_exact(&mut line)?;
                same_bytes("what came late", &line, b"late\n")?;
                ensure!(self.stream.write(b"x").is_err(), "it could be written to");
                return Ok(());
            }
            "both closed" => {
                same("bytes after the end", self.stream.read(&mut [0; 8])?, 0)?;
                return Ok(());
            }
            _ => {}
        }
        if self.kind.starts_with("client closed") {
            same("bytes after the end", self.stream.read(&mut [0; 8])?, 0)?;
        }
        self.stream
            .write_all(format!("{} done\n", self.kind).as_bytes())?;
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Connections>()
}
