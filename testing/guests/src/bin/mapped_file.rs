//! Mapped files: private with some pages copied on write, shared and written through, and one that
//! is mapped but may not be written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use std::os::fd::AsFd;
use unbroken_guests::area::{Area, PAGE, READ_WRITE};
use unbroken_guests::{Guest, Place, main as run, pattern, same, same_bytes};

const PAGES: usize = 40;

struct Mapped {
    round: u64,
    file: File,
    private: Area,
    shared: Area,
    read_only: Area,
    /// Mapped with an offset, its descriptor closed.
    closed: Area,
    shared_content: Vec<u8>,
}

impl Guest for Mapped {
    fn set_up(place: &Place) -> Result<Self> {
        let new = |name: &str, seed| {
            let path = place.directory.join(name);
            std::fs::write(&path, pattern(seed, PAGES * PAGE))?;
            OpenOptions::new().read(true).write(true).open(path)
        };
        let (behind_private, file) = (new("private", 1)?, new("shared", 2)?);
        let map = |file: &File, protection, flags, offset: usize| {
            let pages = PAGES - offset;
            Area::map(
                pages,
                protection,
                flags,
                Some(file.as_fd()),
                (offset * PAGE) as i64,
            )
        };
        let mapped = Self {
            round: 0,
            private: map(&behind_private, READ_WRITE, libc::MAP_PRIVATE, 0)?,
            shared: map(&file, READ_WRITE, libc::MAP_SHARED, 0)?,
            read_only: map(
                &File::open(place.directory.join("shared"))?,
                libc::PROT_READ,
                libc::MAP_SHARED,
                0,
            )?,
            closed: map(&new("closed", 3)?, READ_WRITE, libc::MAP_SHARED, 5)?,
            file,
            shared_content: pattern(2, PAGES * PAGE),
        };
        let mut mapped = mapped;
        mapped.arm();
        Ok(mapped)
    }

    fn check(&mut self) -> Result<()> {
        let original = pattern(1, PAGES * PAGE);
        for page in 0..PAGES {
            let found = self.private.read(page * PAGE, PAGE);
            let expected = if page % 3 == 0 {
                self.content(page)
            } else {
                original[page * PAGE..][..PAGE].to_vec()
            };
            same_bytes(&format!("private page {page}"), &found, &expected)?;
        }
        same_bytes(
            "shared pages",
            &self.shared.read(0, PAGES * PAGE),
            &self.shared_content,
        )?;
        same_bytes(
            "read-only pages",
            &self.read_only.read(0, PAGES * PAGE),
            &self.shared_content,
        )?;
        let mut file = vec![0; PAGES * PAGE];
        self.file.read_exact_at(&mut file, 0)?;
        same_bytes("the file itself", &file, &self.shared_content)?;
        // All of them still are the same pages of the same file.
        self.file.write_all_at(b"through the file", 77)?;
        self.shared_content[77..93].copy_from_slice(b"through the file");
        same_bytes(
            "what came through",
            &self.shared.read(77, 16),
            b"through the file",
        )?;
        same_bytes(
            "what came through to the other",
            &self.read_only.read(77, 16),
            b"through the file",
        )?;
        same(
            "permissions",
            self.read_only.permissions(0)?,
            "r--s".to_string(),
        )?;
        ensure!(
            self.read_only.protect(0, 1, READ_WRITE).is_err(),
            "a file that was opened to read became writable"
        );
        let expected = &pattern(3, PAGES * PAGE)[5 * PAGE..];
        same_bytes(
            "mapped at an offset",
            &self.closed.read(PAGE, PAGE),
            &expected[PAGE..2 * PAGE],
        )?;
        same_bytes(
            "written at an offset",
            &self.closed.read(0, PAGE),
            &self.content(1000),
        )?;
        self.round += 1;
        self.arm();
        Ok(())
    }
}

impl Mapped {
    fn content(&self, page: usize) -> Vec<u8> {
        pattern(self.round * 999 + page as u64, PAGE)
    }

    fn arm(&mut self) {
        for page in (0..PAGES).step_by(3) {
            self.private.write(page * PAGE, &self.content(page));
        }
        for page in (1..PAGES).step_by(5) {
            self.shared.write(page * PAGE, &self.content(page));
            let content = self.content(page);
            self.shared_content[page * PAGE..][..PAGE].copy_from_slice(&content);
        }
        self.closed.write(0, &self.content(1000));
    }
}

fn main() -> ExitCode {
    run::<Mapped>()
}
