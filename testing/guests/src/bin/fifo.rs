//! FIFOs: what is in one, one that its holder opened for both at once, and a thread that waits in an
//! empty one when the service dies.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use unbroken_guests::raw::{fcntl, unread};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, pattern, refused, same, same_bytes};

const CONTENT_BYTES: usize = 30_000;
const WORDS_BYTES: usize = 500;

struct Fifos {
    round: u64,
    path: PathBuf,
    read: File,
    write: File,
    both: File,
    awaited: File,
    waiting: Receiver<Vec<u8>>,
}

impl Guest for Fifos {
    fn set_up(place: &Place) -> Result<Self> {
        let make = |name: &str| -> Result<PathBuf> {
            let path = place.directory.join(name);
            mkfifo(&path, Mode::from_bits_truncate(0o600))?;
            Ok(path)
        };
        let path = make("content")?;
        let (read, write) = open(&path)?;
        let both = make("both")?;
        let both = OpenOptions::new().read(true).write(true).open(both)?;
        let (awaiting, awaited) = open(&make("awaited")?)?;
        fcntl(&awaiting, libc::F_SETFL, libc::O_RDONLY)?;
        let (sender, waiting) = channel();
        std::thread::spawn(move || wait_for_words(awaiting, &sender));
        let mut fifos = Self {
            round: 0,
            path,
            read,
            write,
            both,
            awaited,
            waiting,
        };
        fifos.fill()?;
        Ok(fifos)
    }

    fn check(&mut self) -> Result<()> {
        self.content().context("content")?;
        let mut words = vec![0; WORDS_BYTES];
        self.both.read_exact(&mut words).context("both at once")?;
        same_bytes(
            "both at once",
            &words,
            &pattern(self.round + 2, WORDS_BYTES),
        )?;
        let sent = pattern(self.round + 3, WORDS_BYTES);
        self.awaited.write_all(&sent)?;
        let heard = self.waiting.recv_timeout(PATIENCE).context("the waiter")?;
        same_bytes("what the waiter heard", &heard, &sent)?;
        self.round += 1;
        self.fill()
    }
}

impl Fifos {
    fn fill(&mut self) -> Result<()> {
        self.write
            .write_all(&pattern(self.round + 1, CONTENT_BYTES))?;
        self.both.write_all(&pattern(self.round + 2, WORDS_BYTES))?;
        Ok(())
    }

    fn content(&mut self) -> Result<()> {
        let on_disk = std::fs::metadata(&self.path)?.ino();
        for end in [&self.read, &self.write] {
            same("inode of an end", end.metadata()?.ino(), on_disk)?;
        }
        let flags = fcntl(self.read.as_fd(), libc::F_GETFL, 0)? & libc::O_NONBLOCK;
        same("O_NONBLOCK", flags, libc::O_NONBLOCK)?;
        same("bytes in it", unread(&self.read)?, CONTENT_BYTES)?;
        let mut found = vec![0; CONTENT_BYTES];
        self.read.read_exact(&mut found)?;
        same_bytes(
            "what was in it",
            &found,
            &pattern(self.round + 1, CONTENT_BYTES),
        )?;
        refused(
            "a read of nothing",
            self.read.read(&mut found),
            libc::EAGAIN,
        )
    }
}

/// Both ends; the reading one does not wait.
fn open(path: &Path) -> Result<(File, File)> {
    let read = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let write = OpenOptions::new().write(true).open(path)?;
    Ok((read, write))
}

fn wait_for_words(mut end: File, sender: &std::sync::mpsc::Sender<Vec<u8>>) {
    let mut words = vec![0; WORDS_BYTES];
    while end.read_exact(&mut words).is_ok() && sender.send(words.clone()).is_ok() {}
}

fn main() -> ExitCode {
    run::<Fifos>()
}
