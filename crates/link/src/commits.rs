//! Which epochs are safe, as the primary's main thread hears it.

use unbroken_core::epoch::{Committed, Publication};

/// Turns what was published into commits, when the standby has it whoever dies.
///
/// On one machine that is at once: the journal is shared memory that outlives the primary, and the
/// standby that has it mapped reads whatever was published before the primary died. Whoever drives
/// this does not know that: an epoch is handed in by [`published`](Self::published), and its commit
/// comes out of [`next_commit`](Self::next_commit) then or later.
#[derive(Debug, Default)]
pub struct Commits {
    published: Option<Publication>,
}

impl Commits {
    /// Hands an epoch in; epochs come in their order.
    pub fn published(&mut self, publication: Publication) {
        // A commit is one of all epochs before it, too.
        self.published = Some(publication);
    }

    /// The newest commit that has not been told.
    pub fn next_commit(&mut self) -> Option<Committed> {
        self.published.take().map(Publication::into_committed)
    }
}
