//! A program's text as a guest keeps it: a private mapping of a file that cannot be written to most
//! of the time, large enough to be left out of the looks at memory, with a copy of what must stand
//! in it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use anyhow::Result;

use crate::area::{Area, PAGE, READ_WRITE};
use crate::{Place, pattern, same_bytes};

/// Pages of the mapping: whatever part of it is opened, more than 16 in a row stay closed.
pub const PAGES: usize = 96;
/// The part that is opened to be written to.
const FIRST: usize = 40;
const OPENED: usize = 24;
const READ_EXECUTE: i32 = libc::PROT_READ | libc::PROT_EXEC;
/// Bytes of one change, across a border of pages.
const CHANGED: usize = 64;

/// The mapping, and what must stand in it.
#[derive(Debug)]
pub struct Text {
    area: Area,
    expected: Vec<u8>,
    changes: usize,
}

impl Text {
    /// Maps a new file in the guest's directory.
    pub fn map(place: &Place) -> Result<Self> {
        let path = place.directory.join("text");
        let expected = pattern(17, PAGES * PAGE);
        std::fs::write(&path, &expected)?;
        let file = File::open(&path)?;
        let flags = libc::MAP_PRIVATE;
        Ok(Self {
            area: Area::map(PAGES, READ_EXECUTE, flags, Some(file.as_fd()), 0)?,
            expected,
            changes: 0,
        })
    }

    pub fn area(&self) -> &Area {
        &self.area
    }

    /// Makes a part of it writable.
    pub fn open(&self) -> io::Result<()> {
        self.area.protect(FIRST, OPENED, READ_WRITE)
    }

    /// Makes that part what it was.
    pub fn close(&self) -> io::Result<()> {
        self.area.protect(FIRST, OPENED, READ_EXECUTE)
    }

    /// Where the next change will be.
    pub fn next(&self) -> usize {
        let page = FIRST + 1 + self.changes * 5 % (OPENED - 1);
        page * PAGE - CHANGED / 2
    }

    /// Has `write` put other bytes at an offset, which is inside the part that can be opened. It
    /// allocates nothing, so that no other call makes the whole memory be looked at.
    pub fn change<E>(
        &mut self,
        write: impl FnOnce(&Area, usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let offset = self.next();
        self.changes += 1;
        let mut bytes = [0; CHANGED];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = !self.expected[offset + index].wrapping_add(self.changes as u8);
        }
        write(&self.area, offset, &bytes)?;
        self.expected[offset..][..CHANGED].copy_from_slice(&bytes);
        Ok(())
    }

    /// Fails where something else stands than was written.
    pub fn compare(&self) -> Result<()> {
        same_bytes("text", &self.area.read(0, PAGES * PAGE), &self.expected)
    }
}
