//! The numbers of epochs, and the proofs that one was published and that it is safe.
//!
//! What leaves the gate goes back to these: a [`Committed`] comes only from a [`Publication`], and
//! that only from [`EpochNumbers`], which the outbound end of a link keeps to itself and asks for
//! one in the same call that publishes an epoch. Published is not committed: where the standby is
//! elsewhere its answer lies between.

/// The name of one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EpochNumber {
    pub term: u64,
    pub sequence: u64,
}

/// Numbers the epochs of one link, from 1 on, under one term.
#[derive(Debug)]
pub struct EpochNumbers {
    next: EpochNumber,
}

impl EpochNumbers {
    pub fn of_term(term: u64) -> Self {
        let next = EpochNumber { term, sequence: 1 };
        Self { next }
    }

    /// The number of the next epoch.
    pub fn next(&self) -> EpochNumber {
        self.next
    }

    /// For the link alone, once the next epoch is whole where its standby reads.
    pub fn published(&mut self) -> Publication {
        let epoch = self.next;
        self.next.sequence += 1;
        Publication { epoch }
    }
}

/// An epoch is on its way to the standby, whole. Moves, never copies: one publication, one commit.
#[derive(Debug)]
#[must_use = "the output of this epoch stays at the gate until it is committed"]
pub struct Publication {
    epoch: EpochNumber,
}

impl Publication {
    pub fn epoch(&self) -> EpochNumber {
        self.epoch
    }

    /// For the link alone, which knows that the standby has the epoch whoever dies.
    pub fn into_committed(self) -> Committed {
        Committed { epoch: self.epoch }
    }
}

/// An epoch, and with it every one before it in its term, is safe with the standby.
#[derive(Debug)]
#[must_use = "the output of this epoch stays at the gate until it is released"]
pub struct Committed {
    epoch: EpochNumber,
}

impl Committed {
    pub fn epoch(&self) -> EpochNumber {
        self.epoch
    }
}
