//! Slots: where a call with a shorter timeout is made ([`remote_code::slot`]).

use super::call::Argument;
use super::look::Look;
use unbroken_sys::remote_code::{
    SLOTS,
    slot::{self, COUNT, LENGTH_BYTES, NUMBER, TIME, USED_BYTES},
};

/// A slot of the blob. One number is given to one thread of the tree, whatever its process:
/// processes may share their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotNumber(u16);

impl SlotNumber {
    /// The slot whose code or data is at `address`.
    pub fn containing(address: u64) -> Option<SlotNumber> {
        let number = address.checked_sub(SLOTS)? / LENGTH_BYTES;
        (number < COUNT as u64).then_some(SlotNumber(number as u16))
    }

    pub fn address(self) -> u64 {
        SLOTS + u64::from(self.0) * LENGTH_BYTES
    }

    pub fn time_address(self) -> u64 {
        self.address() + TIME as u64
    }
}

/// Which slots are given to a thread.
pub(crate) struct SlotsInUse([u64; COUNT / 64]);

impl Default for SlotsInUse {
    fn default() -> Self {
        SlotsInUse([0; COUNT / 64])
    }
}

impl SlotsInUse {
    pub fn clear(&mut self) {
        self.0.fill(0);
    }

    pub fn add(&mut self, slot: SlotNumber) {
        self.0[usize::from(slot.0) / 64] |= 1 << (slot.0 % 64);
    }

    /// Takes a free one, if there is one.
    pub fn take(&mut self) -> Option<SlotNumber> {
        let position = self.0.iter().position(|word| *word != u64::MAX)?;
        let slot = SlotNumber((position * 64) as u16 + self.0[position].trailing_ones() as u16);
        self.add(slot);
        Some(slot)
    }
}

/// What a slot holds. It says all of the call, so that another tracer can take it over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Content {
    /// The one register that is not the program's during the call, and its value.
    pub argument: Argument,
    pub value: u64,
    pub return_to: u64,
    pub number: u64,
    pub time: [u8; 16],
}

impl Content {
    pub fn bytes(&self) -> [u8; USED_BYTES] {
        let mut bytes = [0; USED_BYTES];
        let code = slot::code(self.argument.load(), self.value, self.return_to);
        bytes[..NUMBER].copy_from_slice(&code);
        bytes[NUMBER..TIME].copy_from_slice(&self.number.to_le_bytes());
        bytes[TIME..].copy_from_slice(&self.time);
        bytes
    }

    pub fn read(slot: SlotNumber, look: &mut impl Look) -> Option<Content> {
        let mut bytes = [0; USED_BYTES];
        if !look.read(slot.address(), &mut bytes) {
            return None;
        }
        let (load, value, return_to) = slot::parse(&bytes[..NUMBER])?;
        let number = u64::from_le_bytes(bytes[NUMBER..TIME].try_into().ok()?);
        Some(Content {
            argument: Argument::of_load(load)?,
            value,
            return_to,
            number,
            time: bytes[TIME..].try_into().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_found_by_what_they_contain() {
        let mut in_use = SlotsInUse::default();
        let slots: Vec<SlotNumber> = (0..COUNT).map_while(|_| in_use.take()).collect();
        assert_eq!(slots.len(), COUNT);
        assert_eq!(in_use.take(), None);
        for slot in [slots[0], slots[1], slots[COUNT - 1]] {
            assert_eq!(SlotNumber::containing(slot.address()), Some(slot));
            assert_eq!(SlotNumber::containing(slot.address() + 23), Some(slot));
        }
        assert_eq!(SlotNumber::containing(SLOTS - 1), None);
        let end = slots[COUNT - 1].address() + LENGTH_BYTES;
        assert_eq!(SlotNumber::containing(end), None);
        assert_eq!(SlotNumber::containing(u64::MAX), None);
    }
}
