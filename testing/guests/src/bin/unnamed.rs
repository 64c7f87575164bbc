//! Files that have no name any more, or never had one, as databases, proxies and mail servers keep
//! them, a directory that was removed, and files that come and go between any two epochs.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use unbroken_guests::area::{Area, PAGE};
use unbroken_guests::{Guest, Place, main as run, pattern, same, same_bytes};

const PAGES: usize = 4;
/// More than a socket holds references to, if the limits allow so many.
const FILES: usize = 7000;
/// What our own processes may have open is no more, and they need some for each.
const SHARE: usize = 3;

struct Unnamed {
    directory: PathBuf,
    checks: usize,
    deleted: File,
    never_named: File,
    mapped: File,
    mapping: Area,
    removed: File,
    removed_inode: u64,
    many: Vec<File>,
}

impl Guest for Unnamed {
    fn set_up(place: &Place) -> Result<Self> {
        let directory = place.directory.clone();
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        let files = FILES.min(usize::try_from(most)? / SHARE);
        let scratch = |name: &str| -> Result<File> {
            let path = directory.join(name);
            let mut options = OpenOptions::new();
            let mut file = options.read(true).write(true).create(true).open(&path)?;
            file.write_all(&pattern(7, PAGES * PAGE))?;
            fs::remove_file(path)?;
            Ok(file)
        };
        let never_named = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(&directory)?;
        never_named.write_all_at(&pattern(8, PAGE), 0)?;
        let mapped = scratch("mapped")?;
        let gone = directory.join("gone");
        fs::create_dir(&gone)?;
        let removed = File::open(&gone)?;
        fs::remove_dir(&gone)?;
        Ok(Self {
            checks: 0,
            deleted: scratch("deleted")?,
            never_named,
            mapping: Area::shared_file(&mapped, PAGES)?,
            mapped,
            removed_inode: removed.metadata()?.ino(),
            removed,
            many: (0..files)
                .map(|number| scratch(&format!("many {number}")))
                .collect::<Result<_>>()?,
            directory,
        })
    }

    fn check(&mut self) -> Result<()> {
        let rest = pattern(7, PAGES * PAGE);
        let content = |file: &File, length: usize| -> Result<Vec<u8>> {
            let mut content = vec![0; length];
            file.read_exact_at(&mut content, 0)?;
            Ok(content)
        };
        same_bytes("deleted file", &content(&self.deleted, rest.len())?, &rest)?;
        let expected = pattern(8, PAGE);
        same_bytes(
            "file without a name",
            &content(&self.never_named, PAGE)?,
            &expected,
        )?;
        let at = self.checks * PAGE % (PAGES * PAGE);
        same_bytes(
            "mapping",
            &self.mapping.read(at, PAGE),
            &rest[at..at + PAGE],
        )?;
        for file in &self.many {
            same_bytes("one of many", &content(file, 10)?, &rest[..10])?;
        }
        for file in [&self.deleted, &self.never_named, &self.mapped] {
            same("names of the file", file.metadata()?.nlink(), 0)?;
        }
        same("inode", self.removed.metadata()?.ino(), self.removed_inode)?;
        ensure!(
            fs::read_dir(self.directory.join("gone")).is_err(),
            "it is there"
        );
        // The file and its mapping are one.
        self.mapped
            .write_all_at(b"through the file", PAGE as u64 / 2)?;
        let seen = self.mapping.read(PAGE / 2, 16);
        same_bytes("mapping", &seen, b"through the file")?;
        self.mapped
            .write_all_at(&rest[PAGE / 2..PAGE], PAGE as u64 / 2)?;
        self.checks += 1;
        self.come_and_go()
    }
}

impl Unnamed {
    /// Files and directories with names that nobody keeps.
    fn come_and_go(&mut self) -> Result<()> {
        for number in 0..200 {
            let (path, moved) = (self.directory.join("one"), self.directory.join("other"));
            let mut file = File::create(&path)?;
            write!(file, "{number}")?;
            fs::rename(&path, &moved)?;
            same("text", fs::read_to_string(&moved)?, number.to_string())?;
            fs::remove_file(&moved)?;
        }
        // Others take the places of some.
        let path = self.directory.join("new");
        fs::write(&path, pattern(7, PAGE))?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        fs::remove_file(path)?;
        let place = self.checks % self.many.len();
        self.many[place] = file;
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Unnamed>()
}
