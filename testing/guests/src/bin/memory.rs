//! Private anonymous memory in every state that a page can be in: written, untouched, given back,
//! moved, replaced, unreadable with content, read-only, guarded, huge, locked.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use unbroken_guests::area::{Area, PAGE, READ_WRITE};
use unbroken_guests::{Guest, Place, main as run, pattern, same, same_bytes};

/// Pages of the huge area: enough that an aligned 2 MB fits in.
const HUGE_PAGES: usize = 1024;
/// Of the area of which every part is treated differently.
const PAGES: usize = 64;
const MADV_GUARD_INSTALL: i32 = 102;

/// Which pages of the area are what.
const UNREADABLE: usize = 0;
const READ_ONLY: usize = 8;
const GIVEN_BACK: usize = 16;
const RENEWED: usize = 24;
const UNTOUCHED: usize = 32;
const GUARDED: usize = 40;
const WRITTEN: usize = 48;
const EACH: usize = 4;

struct Memory {
    round: u64,
    area: Area,
    moved: Area,
    huge: Area,
    locked: Area,
    /// Locked, and not to be read any more: none of its pages can be brought.
    hidden: Area,
    /// Locked as its pages come, of which there are few.
    sparse: Area,
    /// Not for children, but for a page that is mapped anew in every round.
    replaced: Area,
    guards: bool,
}

impl Guest for Memory {
    fn set_up(_: &Place) -> Result<Self> {
        let huge = Area::private(HUGE_PAGES)?;
        huge.advise(0, HUGE_PAGES, libc::MADV_HUGEPAGE)?;
        let locked = Area::private(4)?;
        locked.lock()?;
        let hidden = Area::private(4)?;
        hidden.lock()?;
        hidden.protect(0, 4, libc::PROT_NONE)?;
        let sparse = Area::private(HUGE_PAGES)?;
        sparse.lock_on_fault()?;
        let replaced = Area::private(6)?;
        replaced.advise(0, 6, libc::MADV_DONTFORK)?;
        let moved = Area::private(10)?;
        let mut memory = Self {
            round: 0,
            area: Area::private(PAGES)?,
            moved,
            huge,
            locked,
            hidden,
            sparse,
            replaced,
            guards: false,
        };
        memory.arm()?;
        Ok(memory)
    }

    fn check(&mut self) -> Result<()> {
        self.parts().context("parts")?;
        let moved = self.moved.read(0, self.moved.pages() * PAGE);
        let (old, grown) = moved.split_at(10 * PAGE);
        same_bytes("moved pages", old, &self.content(9, 10 * PAGE))?;
        ensure!(
            grown.iter().all(|byte| *byte == 0),
            "grown pages are not empty"
        );
        for page in (0..HUGE_PAGES).step_by(3) {
            let expected = self.content(page as u64 + 100, 32);
            same_bytes(
                "a piece of the huge area",
                &self.huge.read(page * PAGE, 32),
                &expected,
            )?;
        }
        let flags = self.huge.smaps(0, "VmFlags")?;
        ensure!(
            flags.split(' ').any(|flag| flag == "hg"),
            "no huge pages wanted: {flags}"
        );
        let flags = self.locked.smaps(0, "VmFlags")?;
        ensure!(
            flags.split(' ').any(|flag| flag == "lo"),
            "no longer locked: {flags}"
        );
        for (area, wanted) in [(&self.hidden, "lo"), (&self.sparse, "lf")] {
            let flags = area.smaps(0, "VmFlags")?;
            ensure!(flags.split(' ').any(|flag| flag == wanted), "{flags}");
        }
        let resident = self.sparse.smaps(0, "Rss")?;
        ensure!(resident == "0 kB", "pages were brought: {resident}");
        same_bytes("locked", &self.locked.read(0, PAGE), &self.content(5, PAGE))?;
        if self.round > 0 {
            for (page, expected) in [(0, true), (2, false), (5, true)] {
                let flags = self.replaced.smaps(page, "VmFlags")?;
                let found = flags.split(' ').any(|flag| flag == "dc");
                same(&format!("page {page} not for children"), found, expected)?;
            }
        }
        self.round += 1;
        // In an epoch of its own: what was advised before is known by then.
        self.replaced.renew(2, 1)?;
        self.arm()
    }
}

impl Memory {
    fn content(&self, which: u64, length: usize) -> Vec<u8> {
        pattern(self.round * 10_007 + which, length)
    }

    fn fill(&self, first: usize) {
        self.area
            .write(first * PAGE, &self.content(first as u64, EACH * PAGE));
    }

    /// New content everywhere, then each part becomes what it is to be.
    fn arm(&mut self) -> Result<()> {
        let area = Area::private(PAGES)?;
        self.area = area;
        for first in [UNREADABLE, READ_ONLY, GIVEN_BACK, RENEWED, WRITTEN] {
            self.fill(first);
        }
        self.area.protect(UNREADABLE, EACH, libc::PROT_NONE)?;
        self.area.protect(READ_ONLY, EACH, libc::PROT_READ)?;
        self.area.advise(GIVEN_BACK, EACH, libc::MADV_DONTNEED)?;
        self.area.renew(RENEWED, EACH)?;
        // Since Linux 6.13; without it there is nothing to keep.
        self.guards = self.area.advise(GUARDED, EACH, MADV_GUARD_INSTALL).is_ok();
        self.moved = Area::private(10)?;
        self.moved.write(0, &self.content(9, 10 * PAGE));
        self.moved.remap(10, true)?;
        self.moved.remap(30, false)?;
        for page in (0..HUGE_PAGES).step_by(3) {
            self.huge
                .write(page * PAGE, &self.content(page as u64 + 100, 32));
        }
        self.locked.write(0, &self.content(5, PAGE));
        Ok(())
    }

    fn parts(&self) -> Result<()> {
        let length = EACH * PAGE;
        let read = |first: usize| self.area.read(first * PAGE, length);
        for (name, first, permissions) in [
            ("unreadable", UNREADABLE, "---p"),
            ("read-only", READ_ONLY, "r--p"),
            ("written", WRITTEN, "rw-p"),
        ] {
            same(name, self.area.permissions(first)?, permissions.to_string())?;
            self.area.protect(first, EACH, READ_WRITE)?;
            same_bytes(name, &read(first), &self.content(first as u64, length))?;
        }
        for (name, first) in [
            ("given back", GIVEN_BACK),
            ("renewed", RENEWED),
            ("untouched", UNTOUCHED),
        ] {
            same_bytes(name, &read(first), &vec![0; length])?;
        }
        if self.guards {
            for page in GUARDED..GUARDED + EACH {
                ensure!(!self.area.can_be_read(page), "a guard page can be read");
            }
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Memory>()
}
