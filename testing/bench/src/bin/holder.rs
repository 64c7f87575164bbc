//! `holder PORT [--megabytes N] [--pages-per-ms N] [--threads N]`: an echo server for sweeps. It
//! holds so much memory, writes so many pages of it each millisecond, and serves its connections
//! in turn from so many threads, each of which waits in an epoll of its own.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

const PAGE_WORDS: usize = 4096 / 8;
const PIECE_BYTES: usize = 64 * 1024;
const EVENTS: usize = 256;
const TICK: Duration = Duration::from_millis(1);
/// A writer that was kept from its core makes up for at most so many ticks.
const TICKS_OWED_MAX: u32 = 5;

#[derive(Debug, Default)]
struct Wanted {
    port: u16,
    megabytes: usize,
    pages_per_ms: usize,
    threads: usize,
}

/// One thread's connections.
#[derive(Debug)]
struct Worker {
    epoll: Epoll,
    /// The acceptor puts them in, the worker takes them out.
    streams: Mutex<HashMap<RawFd, TcpStream>>,
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(|wanted| serve(&wanted)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("holder: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Wanted> {
    let port = words.next().context("give the port to serve on")?;
    let mut wanted = Wanted {
        port: port.parse().context("the port is no number")?,
        threads: 1,
        ..Wanted::default()
    };
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} of what?"))?;
        let value: usize = value.parse().with_context(|| format!("{word} {value}"))?;
        match word.as_str() {
            "--megabytes" => wanted.megabytes = value,
            "--pages-per-ms" => wanted.pages_per_ms = value,
            "--threads" => wanted.threads = value.max(1),
            _ => bail!("there is no {word}"),
        }
    }
    Ok(wanted)
}

fn serve(wanted: &Wanted) -> Result<()> {
    let memory = filled(wanted.megabytes);
    if wanted.pages_per_ms > 0 && !memory.is_empty() {
        let memory = Arc::clone(&memory);
        let pages = wanted.pages_per_ms;
        std::thread::Builder::new().spawn(move || keep_writing(&memory, pages))?;
    }
    let mut workers = Vec::new();
    for _ in 0..wanted.threads {
        workers.push(Arc::new(Worker {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            streams: Mutex::default(),
        }));
    }
    for worker in &workers[1..] {
        let worker = Arc::clone(worker);
        std::thread::Builder::new().spawn(move || worker.work(None))?;
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, wanted.port))?;
    listener.set_nonblocking(true)?;
    let watched = EpollEvent::new(EpollFlags::EPOLLIN, listener.as_raw_fd() as u64);
    workers[0].epoll.add(&listener, watched)?;
    workers[0].work(Some((&listener, &workers)))
}

/// Memory with content that no two pages share.
fn filled(megabytes: usize) -> Arc<Vec<AtomicU64>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let word = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        AtomicU64::new(state)
    };
    Arc::new((0..megabytes << 17).map(word).collect())
}

/// Writes one word in each of so many pages a tick, all over the memory in turn.
fn keep_writing(memory: &[AtomicU64], pages: usize) {
    let all = memory.len() / PAGE_WORDS;
    // A stride without a common factor reaches every page and leaves no runs.
    let stride = (all / 3) | 1;
    let (mut page, mut due) = (0, Instant::now());
    loop {
        for _ in 0..pages {
            memory[page * PAGE_WORDS].fetch_add(1, Ordering::Relaxed);
            page = (page + stride) % all;
        }
        let now = Instant::now();
        due = (due + TICK).max(now.checked_sub(TICK * TICKS_OWED_MAX).unwrap_or(now));
        std::thread::sleep(due.saturating_duration_since(now));
    }
}

impl Worker {
    /// Serves for ever; the first worker also accepts, for all of them in turn.
    fn work(&self, acceptor: Option<(&TcpListener, &[Arc<Worker>])>) -> Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut buffer = vec![0; PIECE_BYTES];
        let mut accepted = 0;
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for event in &events[..count] {
                let descriptor = event.data() as RawFd;
                match acceptor {
                    Some((listener, workers)) if listener.as_raw_fd() == descriptor => {
                        accept_all(listener, workers, &mut accepted)?;
                    }
                    _ => self.echo(descriptor, &mut buffer),
                }
            }
        }
    }

    fn echo(&self, descriptor: RawFd, buffer: &mut [u8]) {
        let Ok(mut streams) = self.streams.lock() else {
            return;
        };
        let Some(stream) = streams.get_mut(&descriptor) else {
            return;
        };
        let lives = match stream.read(buffer) {
            Ok(0) => false,
            // Small answers to clients that read them fit into the socket's buffer.
            Ok(length) => stream.write_all(&buffer[..length]).is_ok(),
            Err(cause) => matches!(cause.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        };
        if !lives {
            streams.remove(&descriptor);
        }
    }
}

fn accept_all(listener: &TcpListener, workers: &[Arc<Worker>], accepted: &mut usize) -> Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(cause) if cause.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(cause) if cause.kind() == ErrorKind::Interrupted => continue,
            Err(cause) => return Err(cause).context("cannot accept"),
        };
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let worker = &workers[*accepted % workers.len()];
        *accepted += 1;
        let descriptor = stream.as_raw_fd();
        let Ok(mut streams) = worker.streams.lock() else {
            bail!("a worker has panicked");
        };
        let watched = EpollEvent::new(EpollFlags::EPOLLIN, descriptor as u64);
        worker.epoll.add(&stream, watched)?;
        streams.insert(descriptor, stream);
    }
}
