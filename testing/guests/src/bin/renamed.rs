//! Open files whose names change behind the guest's back after an epoch knows them, as a rotation of
//! logs, an upgrade or a clean-up does it: first they are renamed, with others in their places, then
//! they are removed.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use unbroken_guests::area::{Area, PAGE, READ_WRITE};
use unbroken_guests::{Guest, Place, main as run, pattern, same, same_bytes};

const PAGES: usize = 8;
const NAMES: [&str; 6] = ["log", "data", "library", "shared", "directory", "fifo"];

struct Renamed {
    directory: PathBuf,
    checks: usize,
    log: File,
    data: File,
    /// Mapped as a library is: private, and most pages not looked at yet.
    library: Area,
    shared: Area,
    open_directory: File,
    fifo: [File; 2],
    /// Of what is open, in the order of `NAMES`; a mapping has none.
    inodes: Vec<u64>,
}

impl Guest for Renamed {
    fn set_up(place: &Place) -> Result<Self> {
        let directory = place.directory.clone();
        let path = |name: &str| directory.join(name);
        let rest = pattern(3, PAGES * PAGE);
        for name in ["data", "library", "shared"] {
            fs::write(path(name), &rest)?;
        }
        fs::create_dir(path("directory"))?;
        mkfifo(&path("fifo"), Mode::from_bits_truncate(0o600))?;
        let open = |name: &str| OpenOptions::new().read(true).write(true).open(path(name));
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path("log"))?;
        let library = File::open(path("library"))?;
        let library = Area::map(
            PAGES,
            READ_WRITE,
            libc::MAP_PRIVATE,
            Some(library.as_fd()),
            0,
        )?;
        let shared = Area::shared_file(open("shared")?, PAGES)?;
        let (data, open_directory) = (open("data")?, File::open(path("directory"))?);
        let both = open("fifo")?;
        let fifo = [
            File::open(path("fifo"))?,
            OpenOptions::new().write(true).open(path("fifo"))?,
        ];
        drop(both);
        let inodes = [&log, &data, &open_directory, &fifo[0]];
        let inodes = inodes.map(|file| Ok(file.metadata()?.ino()));
        let mut guest = Self {
            directory,
            checks: 0,
            log,
            data,
            library,
            shared,
            open_directory,
            fifo,
            inodes: inodes.into_iter().collect::<Result<_>>()?,
        };
        guest.use_all()?;
        Ok(guest)
    }

    fn check(&mut self) -> Result<()> {
        let rest = pattern(3, PAGES * PAGE);
        let files = [&self.log, &self.data, &self.open_directory, &self.fifo[0]];
        for (file, inode) in files.into_iter().zip(&self.inodes) {
            same("inode", file.metadata()?.ino(), *inode)?;
        }
        let written = self.checks as u8;
        let mut content = vec![0; PAGE];
        for (what, area) in [("library", &self.library), ("shared", &self.shared)] {
            same_bytes(what, &area.read(0, 1), &[written])?;
            // A page that was not touched before.
            let at = (self.checks + 1) * PAGE;
            same_bytes(what, &area.read(at, PAGE), &rest[at..at + PAGE])?;
        }
        self.data.read_exact_at(&mut content, PAGE as u64)?;
        same_bytes("data", &content, &rest[PAGE..2 * PAGE])?;
        let mut word = [0; 4];
        self.fifo[0].read_exact(&mut word)?;
        same_bytes("FIFO", &word, b"word")?;
        self.checks += 1;
        self.use_all().context("use")?;
        let path = |name: &str| self.directory.join(name);
        for name in NAMES {
            match self.checks {
                1 => {
                    fs::rename(path(name), path(&format!("{name}.old")))?;
                    fs::write(path(name), "another file")?;
                }
                2 if name == "directory" => fs::remove_dir(path("directory.old"))?,
                2 => fs::remove_file(path(&format!("{name}.old")))?,
                _ => same_bytes("the others", &fs::read(path(name))?, b"another file")?,
            }
        }
        Ok(())
    }
}

impl Renamed {
    fn use_all(&mut self) -> Result<()> {
        let length = self.log.metadata()?.len();
        self.log.write_all(b"line\n")?;
        same("length of the log", self.log.metadata()?.len(), length + 5)?;
        let written = self.checks as u8;
        self.library.write(0, &[written]);
        self.shared.write(0, &[written]);
        self.fifo[1].write_all(b"word")?;
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Renamed>()
}
