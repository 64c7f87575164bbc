//! A directory that is half read: the rest comes, each name once.

use std::collections::BTreeSet;
use std::fs::File;
use std::mem::MaybeUninit;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use rustix::fs::RawDir;
use unbroken_guests::raw::fcntl;
use unbroken_guests::{Guest, Place, main as run, same};

const NAMES: usize = 200;
/// Room for a few entries a call.
const BUFFER_BYTES: usize = 512;

struct Directory {
    open: File,
    expected: BTreeSet<String>,
    seen: BTreeSet<String>,
}

impl Guest for Directory {
    fn set_up(place: &Place) -> Result<Self> {
        let path = place.directory.join("names");
        std::fs::create_dir_all(&path)?;
        let name = |number| format!("file with a long name {number:05}");
        for number in 0..NAMES {
            File::create(path.join(name(number)))?;
        }
        let dots = [".", ".."].map(String::from);
        let mut directory = Self {
            open: File::open(&path)?,
            expected: (0..NAMES).map(name).chain(dots).collect(),
            seen: BTreeSet::new(),
        };
        directory.read_some(30)?;
        Ok(directory)
    }

    fn check(&mut self) -> Result<()> {
        ensure!(self.seen.len() < NAMES, "nothing was left to read");
        self.read_some(usize::MAX)?;
        same("names", self.seen.len(), self.expected.len())?;
        ensure!(self.seen == self.expected, "other names than before");
        same(
            "close-on-exec",
            fcntl(&self.open, libc::F_GETFD, 0)?,
            libc::FD_CLOEXEC,
        )?;
        self.seen.clear();
        rustix::fs::seek(&self.open, rustix::fs::SeekFrom::Start(0))?;
        self.read_some(60)
    }
}

impl Directory {
    /// Reads until it has at least this many names, a buffer at a time.
    fn read_some(&mut self, enough: usize) -> Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut entries = RawDir::new(&self.open, &mut buffer);
        while self.seen.len() < enough || !entries.is_buffer_empty() {
            let Some(entry) = entries.next() else { break };
            let name = entry?.file_name().to_string_lossy().into_owned();
            ensure!(self.seen.insert(name.clone()), "{name} came twice");
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Directory>()
}
