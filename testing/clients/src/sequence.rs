//! Exactly once and in order: what one receiver knows of one sender's numbered messages.

use std::collections::BTreeSet;

/// What the arrival of one number means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    InOrder,
    /// So many numbers were skipped just before this one.
    After {
        missing: u64,
    },
    /// It had been skipped before: it is late, not lost.
    Late,
    /// It was received already.
    Again,
}

/// The numbers received from one sender. They begin at zero.
#[derive(Debug, Default)]
pub(crate) struct Sequence {
    next: u64,
    missing: BTreeSet<u64>,
}

impl Sequence {
    pub(crate) fn arrive(&mut self, number: u64) -> Arrival {
        if number < self.next {
            let was_missing = self.missing.remove(&number);
            return if was_missing {
                Arrival::Late
            } else {
                Arrival::Again
            };
        }
        let missing = number - self.next;
        self.missing.extend(self.next..number);
        self.next = number + 1;
        if missing == 0 {
            Arrival::InOrder
        } else {
            Arrival::After { missing }
        }
    }

    /// The next number in order.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_told_apart() {
        let mut sequence = Sequence::default();
        assert_eq!(sequence.arrive(0), Arrival::InOrder);
        assert_eq!(sequence.arrive(3), Arrival::After { missing: 2 });
        assert_eq!(sequence.arrive(1), Arrival::Late);
        assert_eq!(sequence.arrive(1), Arrival::Again);
        assert_eq!(sequence.arrive(3), Arrival::Again);
        assert_eq!(sequence.arrive(4), Arrival::InOrder);
        assert_eq!(sequence.next(), 5);
    }
}
