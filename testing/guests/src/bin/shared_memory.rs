//! Shared anonymous memory and memfds: mapped once, mapped twice, never mapped; written through a
//! mapping and by write(); with holes, a position, seals.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use unbroken_guests::area::{Area, PAGE, READ_WRITE};
use unbroken_guests::raw::fcntl;
use unbroken_guests::{Guest, Place, main as run, pattern, refused, same, same_bytes};

const PAGES: usize = 20;
const LET_GO: usize = 7;
const REMOVED: usize = 9;

struct Shared {
    round: u64,
    anonymous: Area,
    mapped: File,
    one: Area,
    /// The second half of the same.
    other: Area,
    unmapped: File,
    /// Mapped, and its descriptor closed.
    closed: Area,
    sealed: File,
    /// Mapped for a moment only.
    passing: File,
}

impl Guest for Shared {
    fn set_up(_: &Place) -> Result<Self> {
        let memfd = |name: &str, flags| -> Result<File> {
            Ok(File::from(memfd_create(
                name,
                MFdFlags::MFD_CLOEXEC | flags,
            )?))
        };
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let anonymous = Area::map(PAGES, READ_WRITE, flags, None, 0)?;
        let mapped = memfd("mapped", MFdFlags::empty())?;
        mapped.set_len((PAGES * PAGE) as u64)?;
        let half = (PAGES / 2 * PAGE) as i64;
        let other = Area::map(
            PAGES / 2,
            READ_WRITE,
            libc::MAP_SHARED,
            Some(mapped.as_fd()),
            half,
        )?;
        let unmapped = memfd("unmapped", MFdFlags::empty())?;
        let hidden = memfd("closed", MFdFlags::empty())?;
        hidden.set_len((PAGES * PAGE) as u64)?;
        let passing = memfd("passing", MFdFlags::empty())?;
        passing.set_len(2 * PAGE as u64)?;
        let mut sealed = memfd("sealed", MFdFlags::MFD_ALLOW_SEALING)?;
        sealed.write_all(&pattern(50, 5000))?;
        fcntl(
            &sealed,
            libc::F_ADD_SEALS,
            libc::F_SEAL_GROW | libc::F_SEAL_WRITE,
        )?;
        let one = Area::shared_file(&mapped, PAGES)?;
        let closed = Area::shared_file(&hidden, PAGES)?;
        let mut shared = Self {
            round: 0,
            anonymous,
            mapped,
            one,
            other,
            unmapped,
            closed,
            sealed,
            passing,
        };
        // Every page has been seen through the mapping before it is written by write().
        shared.one.write(0, &vec![1; PAGES * PAGE]);
        shared.arm()?;
        Ok(shared)
    }

    fn check(&mut self) -> Result<()> {
        for page in 0..PAGES {
            let name = format!("anonymous page {page}");
            let expected = match page {
                REMOVED => vec![0; PAGE],
                page => self.content(page),
            };
            same_bytes(&name, &self.anonymous.read(page * PAGE, PAGE), &expected)?;
        }
        self.aliases()
            .context("one memfd, two mappings and a descriptor")?;
        self.by_descriptor().context("a memfd that is not mapped")?;
        same_bytes(
            "without a descriptor",
            &self.closed.read(3 * PAGE, PAGE),
            &self.content(30),
        )?;
        let mut found = vec![0; PAGE];
        self.passing.read_exact_at(&mut found, PAGE as u64)?;
        same_bytes(
            "written through a passing mapping",
            &found,
            &self.content(40),
        )?;
        let mut found = vec![0; 5000];
        self.sealed.read_exact_at(&mut found, 0)?;
        same_bytes("sealed content", &found, &pattern(50, 5000))?;
        let seals = fcntl(&self.sealed, libc::F_GET_SEALS, 0)?;
        same("seals", seals, libc::F_SEAL_GROW | libc::F_SEAL_WRITE)?;
        refused(
            "a write to sealed memory",
            self.sealed.write_at(b"x", 0),
            libc::EPERM,
        )?;
        self.round += 1;
        self.arm()
    }
}

impl Shared {
    fn content(&self, which: usize) -> Vec<u8> {
        pattern(self.round * 1013 + which as u64, PAGE)
    }

    fn aliases(&self) -> Result<()> {
        same(
            "its length",
            self.mapped.metadata()?.len(),
            (PAGES * PAGE) as u64,
        )?;
        same_bytes(
            "through the first",
            &self.one.read(2 * PAGE, PAGE),
            &self.content(2),
        )?;
        let last = (PAGES - 1) * PAGE;
        same_bytes(
            "through the first",
            &self.one.read(last, PAGE),
            &self.content(3),
        )?;
        self.other.write(0, b"seen by all");
        let middle = PAGES / 2 * PAGE;
        same_bytes("an alias", &self.one.read(middle, 11), b"seen by all")?;
        let mut found = [0; 11];
        self.mapped.read_exact_at(&mut found, middle as u64)?;
        same_bytes("the descriptor", &found, b"seen by all")?;
        let name = std::fs::read_link(format!("/proc/self/fd/{}", number(&self.mapped)))?;
        same(
            "its name",
            name.to_string_lossy().into_owned(),
            "/memfd:mapped (deleted)".into(),
        )
    }

    fn by_descriptor(&mut self) -> Result<()> {
        same("position", self.unmapped.stream_position()?, 7)?;
        same("length", self.unmapped.metadata()?.len(), 1_003_000)?;
        ensure!(self.unmapped.metadata_blocks() <= 64, "its hole is filled");
        let mut found = vec![0; PAGE];
        self.unmapped.read_exact_at(&mut found, 0)?;
        same_bytes("its beginning", &found, &self.content(20))?;
        self.unmapped.read_exact_at(&mut found, 500_000)?;
        same_bytes("its hole", &found, &[0; PAGE])?;
        let mut end = vec![0; 3000];
        self.unmapped.read_exact_at(&mut end, 1_000_000)?;
        same_bytes("its end", &end, &self.content(21)[..3000])?;
        let mut piece = [0; 10];
        self.unmapped.read_exact(&mut piece)?;
        same_bytes("at its position", &piece, &self.content(20)[7..17])
    }

    fn arm(&mut self) -> Result<()> {
        for page in 0..PAGES {
            self.anonymous.write(page * PAGE, &self.content(page));
        }
        // Shared memory keeps what a mapping lets go of, and loses what is removed.
        self.anonymous.advise(LET_GO, 1, libc::MADV_DONTNEED)?;
        self.anonymous.advise(REMOVED, 1, libc::MADV_REMOVE)?;
        self.one.write(2 * PAGE, &self.content(2));
        // Written through a mapping that is gone before anyone looks.
        let passing = Area::shared_file(&self.passing, 2)?;
        passing.write(PAGE, &self.content(40));
        drop(passing);
        let last = ((PAGES - 1) * PAGE) as u64;
        self.mapped.write_all_at(&self.content(3), last)?;
        self.unmapped.write_all_at(&self.content(20), 0)?;
        self.unmapped
            .write_all_at(&self.content(21)[..3000], 1_000_000)?;
        self.unmapped.seek(SeekFrom::Start(7))?;
        self.closed.write(3 * PAGE, &self.content(30));
        Ok(())
    }
}

trait Blocks {
    fn metadata_blocks(&self) -> u64;
}

impl Blocks for File {
    /// Blocks of 512 bytes that are really there.
    fn metadata_blocks(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.metadata()
            .map_or(u64::MAX, |metadata| metadata.blocks())
    }
}

fn number(file: &File) -> i32 {
    use std::os::fd::AsRawFd;
    file.as_raw_fd()
}

fn main() -> ExitCode {
    run::<Shared>()
}
