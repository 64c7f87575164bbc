//! The proof that an epoch is safe. Nobody can make one up: a [`Publication`] comes only from
//! [`crate::log::JournalWriter`], and a [`Committed`] only from a publication.

/// The name of one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EpochNumber {
    pub term: u64,
    pub sequence: u64,
}

/// An epoch stands whole in the journal. Moves, never copies: one publication, one commit.
#[derive(Debug)]
#[must_use = "the output of this epoch stays at the gate until it is committed"]
pub struct Publication {
    epoch: EpochNumber,
}

impl Publication {
    pub(crate) fn of(epoch: EpochNumber) -> Self {
        Self { epoch }
    }

    pub fn epoch(&self) -> EpochNumber {
        self.epoch
    }

    /// The commit on one machine: the journal is shared memory that outlives the primary, and the
    /// standby that has it mapped reads whatever was published before the primary died.
    pub fn committed_in_shared_memory(self) -> Committed {
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
