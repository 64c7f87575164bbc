//! Descriptors made by dup share position and status flags; a file opened twice shares neither.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::Result;
use unbroken_guests::raw::fcntl;
use unbroken_guests::{Guest, Place, main as run, pattern, same};

struct Duplicates {
    first: File,
    twin: File,
    stranger: File,
    /// A high number of the same description as `first`.
    high: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
    pipe_twin: OwnedFd,
    position: u64,
    nonblocking: bool,
}

const HIGH: i32 = 700;

impl Guest for Duplicates {
    fn set_up(place: &Place) -> Result<Self> {
        let path = place.directory.join("file");
        std::fs::write(&path, pattern(3, 5000))?;
        let first = File::open(&path)?;
        let pipe = nix::unistd::pipe()?;
        let mut guest = Self {
            twin: first.try_clone()?,
            stranger: File::open(&path)?,
            high: rustix::io::fcntl_dupfd_cloexec(&first, HIGH)?,
            first,
            pipe_twin: pipe.1.try_clone()?,
            pipe,
            position: 0,
            nonblocking: false,
        };
        guest.change()?;
        Ok(guest)
    }

    fn check(&mut self) -> Result<()> {
        same("position", self.first.stream_position()?, self.position)?;
        same(
            "position of the twin",
            self.twin.stream_position()?,
            self.position,
        )?;
        same(
            "position of the stranger",
            self.stranger.stream_position()?,
            17,
        )?;
        let mut piece = [0; 10];
        self.twin.read_exact(&mut piece)?;
        self.position += 10;
        same(
            "position after the twin read",
            self.first.stream_position()?,
            self.position,
        )?;
        let of_high = rustix::fs::seek(&self.high, rustix::fs::SeekFrom::Current(0))?;
        same("position of the high number", of_high, self.position)?;
        same(
            "position of the stranger",
            self.stranger.stream_position()?,
            17,
        )?;
        let flag = if self.nonblocking {
            libc::O_NONBLOCK
        } else {
            0
        };
        for (name, end) in [("end", &self.pipe.1), ("its twin", &self.pipe_twin)] {
            same(name, fcntl(end, libc::F_GETFL, 0)?, libc::O_WRONLY | flag)?;
        }
        same(
            "the other end",
            fcntl(&self.pipe.0, libc::F_GETFL, 0)?,
            libc::O_RDONLY,
        )?;
        self.change()
    }
}

impl Duplicates {
    fn change(&mut self) -> Result<()> {
        self.position += 100;
        self.first.seek(SeekFrom::Start(self.position))?;
        self.stranger.seek(SeekFrom::Start(17))?;
        self.nonblocking = !self.nonblocking;
        let flag = if self.nonblocking {
            libc::O_NONBLOCK
        } else {
            0
        };
        fcntl(&self.pipe_twin, libc::F_SETFL, libc::O_WRONLY | flag)?;
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Duplicates>()
}
