//! The heap by brk: grown, shrunk, grown again. Pages that were given back come back as zeros, and
//! the break stands where it stood, so that growth goes on there.

use std::process::ExitCode;

use anyhow::Result;
use unbroken_guests::area::{Break, PAGE};
use unbroken_guests::{Guest, Place, main as run, pattern, same, same_bytes};

const GROWN: usize = 300;
const KEPT: usize = 120;

struct Heap {
    start: usize,
    round: u64,
    /// What the allocator gave: small pieces in the old part of the heap.
    pieces: Vec<Vec<u8>>,
}

impl Guest for Heap {
    fn set_up(_: &Place) -> Result<Self> {
        // The allocator must not move the break between our calls.
        Break::leave_to_us();
        let start = Break::now()?.next_multiple_of(PAGE);
        let heap = Self {
            start,
            round: 0,
            pieces: (0..500).map(piece).collect(),
        };
        heap.arm()?;
        Ok(heap)
    }

    fn check(&mut self) -> Result<()> {
        let end = self.start + KEPT * PAGE;
        same("the break", Break::now()?, end)?;
        let expected = pattern(self.round, KEPT * PAGE);
        same_bytes(
            "kept pages",
            &Break::read(self.start, KEPT * PAGE)?,
            &expected,
        )?;
        Break::set(self.start + GROWN * PAGE)?;
        let again = Break::read(end, (GROWN - KEPT) * PAGE)?;
        same_bytes("pages that were given back", &again, &vec![0; again.len()])?;
        for (number, found) in self.pieces.iter().enumerate() {
            same_bytes("an allocation", found, &piece(number))?;
        }
        self.round += 1;
        self.arm()
    }
}

impl Heap {
    fn arm(&self) -> Result<()> {
        Break::set(self.start + GROWN * PAGE)?;
        Break::write(self.start, &pattern(self.round, GROWN * PAGE))?;
        Break::set(self.start + KEPT * PAGE)
    }
}

fn piece(number: usize) -> Vec<u8> {
    pattern(number as u64, 10 + 7 * number)
}

fn main() -> ExitCode {
    run::<Heap>()
}
