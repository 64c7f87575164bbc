//! Pipes: what is in them, packet borders, capacity, the flags of each end, ends that are closed,
//! and threads that wait in a full and in an empty one when the service dies.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use rustix::io::{read, write};
use unbroken_guests::raw::{fcntl, unread};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, pattern, refused, same, same_bytes};

const CAPACITY: i32 = 256 * 1024;
const CONTENT_BYTES: usize = 150_000;
const PACKETS: [usize; 3] = [5, 4096, 1];
/// More than the default capacity, so that the writer is in the middle of it.
const LARGE_BYTES: usize = 200_000;

struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

struct Pipes {
    round: u64,
    stream: Ends,
    packets: Ends,
    no_reader: OwnedFd,
    no_writer: OwnedFd,
    full: (std::fs::File, Receiver<usize>),
    empty: (std::fs::File, Receiver<Vec<u8>>),
}

impl Guest for Pipes {
    fn set_up(_: &Place) -> Result<Self> {
        let (stream, packets) = (ends(OFlag::O_CLOEXEC)?, ends(OFlag::O_DIRECT)?);
        fcntl(&stream.write, libc::F_SETPIPE_SZ, CAPACITY)?;
        fcntl(
            &stream.write,
            libc::F_SETFL,
            libc::O_WRONLY | libc::O_NONBLOCK,
        )?;
        fcntl(
            &packets.read,
            libc::F_SETFL,
            libc::O_RDONLY | libc::O_DIRECT | libc::O_NONBLOCK,
        )?;
        let no_writer = ends(OFlag::O_NONBLOCK)?;
        write(&no_writer.write, b"last words")?;
        let mut pipes = Self {
            round: 0,
            stream,
            packets,
            no_reader: ends(OFlag::O_NONBLOCK)?.write,
            no_writer: no_writer.read,
            full: waiting_writer(0)?,
            empty: waiting_reader()?,
        };
        pipes.fill()?;
        Ok(pipes)
    }

    fn check(&mut self) -> Result<()> {
        self.stream().context("stream")?;
        self.packet_mode().context("packets")?;
        refused(
            "a write without a reader",
            write(&self.no_reader, b"x"),
            libc::EPIPE,
        )?;
        let mut bytes = [0; 100];
        if self.round == 0 {
            let count = read(&self.no_writer, &mut bytes)?;
            same_bytes("last words", &bytes[..count], b"last words")?;
        }
        same("bytes after the end", read(&self.no_writer, &mut bytes)?, 0)?;
        self.waiting().context("threads that wait")?;
        self.round += 1;
        self.fill()
    }
}

impl Pipes {
    fn fill(&mut self) -> Result<()> {
        same(
            "bytes written",
            write(&self.stream.write, &self.content())?,
            CONTENT_BYTES,
        )?;
        for length in PACKETS {
            let packet = pattern(self.round + length as u64, length);
            same(
                "bytes of a packet",
                write(&self.packets.write, &packet)?,
                length,
            )?;
        }
        Ok(())
    }

    fn content(&self) -> Vec<u8> {
        pattern(self.round + 7, CONTENT_BYTES)
    }

    fn stream(&self) -> Result<()> {
        same(
            "capacity",
            fcntl(&self.stream.read, libc::F_GETPIPE_SZ, 0)?,
            CAPACITY,
        )?;
        same(
            "flags of the reading end",
            fcntl(&self.stream.read, libc::F_GETFL, 0)?,
            0,
        )?;
        let flags = fcntl(&self.stream.write, libc::F_GETFL, 0)?;
        same(
            "flags of the writing end",
            flags,
            libc::O_WRONLY | libc::O_NONBLOCK,
        )?;
        same(
            "close-on-exec",
            fcntl(&self.stream.read, libc::F_GETFD, 0)?,
            libc::FD_CLOEXEC,
        )?;
        same("bytes in it", unread(&self.stream.read)?, CONTENT_BYTES)?;
        let mut found = vec![0; CONTENT_BYTES];
        let mut filled = 0;
        while filled < CONTENT_BYTES {
            filled += read(&self.stream.read, &mut found[filled..])?;
        }
        same_bytes("content", &found, &self.content())?;
        // The capacity is real: it takes as much as it says and no more.
        let mut taken = 0;
        while let Ok(count) = write(&self.stream.write, &[1; 4096]) {
            taken += count;
        }
        same("bytes until it is full", taken, CAPACITY as usize)?;
        while unread(&self.stream.read)? > 0 {
            read(&self.stream.read, &mut found[..])?;
        }
        Ok(())
    }

    fn packet_mode(&self) -> Result<()> {
        let mut bytes = vec![0; 10_000];
        for length in PACKETS {
            let count = read(&self.packets.read, &mut bytes)?;
            same_bytes(
                "a packet",
                &bytes[..count],
                &pattern(self.round + length as u64, length),
            )?;
        }
        refused(
            "another packet",
            read(&self.packets.read, &mut bytes),
            libc::EAGAIN,
        )?;
        same(
            "close-on-exec",
            fcntl(&self.packets.read, libc::F_GETFD, 0)?,
            0,
        )
    }

    fn waiting(&mut self) -> Result<()> {
        let mut found = vec![0; LARGE_BYTES];
        self.full.0.read_exact(&mut found)?;
        same_bytes(
            "what the writer wrote",
            &found,
            &pattern(self.round, LARGE_BYTES),
        )?;
        same(
            "bytes of the writer",
            self.full.1.recv_timeout(PATIENCE)?,
            LARGE_BYTES,
        )?;
        let words = pattern(self.round, 60);
        self.empty.0.write_all(&words)?;
        same_bytes(
            "what the reader read",
            &self.empty.1.recv_timeout(PATIENCE)?,
            &words,
        )?;
        self.full = waiting_writer(self.round + 1)?;
        self.empty = waiting_reader()?;
        Ok(())
    }
}

fn ends(flags: OFlag) -> Result<Ends> {
    let (read, write) = pipe2(flags)?;
    Ok(Ends { read, write })
}

/// A thread that is stuck in a write; gives the reading end and what the write will return.
fn waiting_writer(seed: u64) -> Result<(std::fs::File, Receiver<usize>)> {
    let Ends { read, write } = ends(OFlag::O_CLOEXEC)?;
    let (tell, told) = channel();
    std::thread::spawn(move || {
        // A stop makes a write that is under way return early with what it has written, as any
        // signal would; the writer goes on from there, as programs do.
        let (bytes, mut written) = (pattern(seed, LARGE_BYTES), 0);
        while written < LARGE_BYTES {
            match rustix::io::write(&write, &bytes[written..]) {
                Ok(count) => written += count,
                Err(errno) => panic!("a waiting write gave {errno}"),
            }
        }
        tell.send(written)
    });
    unbroken_guests::eventually("a full pipe", || Ok(unread(&read)? == 65536))?;
    Ok((read.into(), told))
}

fn waiting_reader() -> Result<(std::fs::File, Receiver<Vec<u8>>)> {
    let Ends { read, write } = ends(OFlag::O_CLOEXEC)?;
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let mut bytes = vec![0; 100];
        let count = rustix::io::read(&read, &mut bytes).unwrap_or(0);
        bytes.truncate(count);
        tell.send(bytes)
    });
    Ok((write.into(), told))
}

fn main() -> ExitCode {
    run::<Pipes>()
}
