//! Where everything stands on the status page, in 64-bit words. A change here is a change of `VERSION`.

use super::histogram;
use crate::steps::EPOCH_STEPS;

/// `unbroken`, as it reads in a dump of the file.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"unbroken");
/// Raised with every change of this file: a status page of another version is refused, not guessed at.
pub(super) const VERSION: u64 = 3;

/// Single words, by index.
#[derive(Clone, Copy)]
#[repr(usize)]
pub(super) enum Word {
    Magic,
    Version,
    /// Words of the whole status page.
    Length,
    State,
    Term,
    Epoch,
    FrontPid,
    PrimaryPid,
    StandbyPid,
    Takeovers,
    LastTakeoverUs,
    Epochs,
    DirtyPages,
    Bytes,
    /// `CLOCK_MONOTONIC`; 0 while protected.
    UnprotectedSinceNs,
    /// Of the unprotected times that have ended.
    UnprotectedTotalNs,
    /// 0 while the service runs, else `EXITED | code`.
    Exit,
}

/// Room for single words, so that new ones need not move what follows.
const SINGLE_WORDS: usize = 32;
const _: () = assert!((Word::Exit as usize) < SINGLE_WORDS);

/// Set in `Word::Exit` when there is a code.
pub(super) const EXITED: u64 = 1 << 32;

/// A text of at most `bytes` bytes, kept twice.
#[derive(Clone, Copy)]
pub(super) struct TextPlace {
    pub(super) at: usize,
    pub(super) bytes: usize,
}

impl TextPlace {
    /// One copy: its length, then its bytes.
    pub(super) const fn slot_words(self) -> usize {
        1 + self.bytes / 8
    }

    const fn end(self) -> usize {
        self.at + 1 + 2 * self.slot_words()
    }
}

pub(super) const NAME: TextPlace = TextPlace {
    at: SINGLE_WORDS,
    bytes: 32,
};
pub(super) const COMMAND: TextPlace = TextPlace {
    at: NAME.end(),
    bytes: 1024,
};
pub(super) const ADDRESS: TextPlace = TextPlace {
    at: COMMAND.end(),
    bytes: 128,
};
pub(super) const PUBLISHED: TextPlace = TextPlace {
    at: ADDRESS.end(),
    bytes: super::PUBLISHED_BYTES_MAX,
};
pub(super) const REASON: TextPlace = TextPlace {
    at: PUBLISHED.end(),
    bytes: 256,
};
/// Host pids of the service, four bytes each, in the machine's byte order.
pub(super) const SERVICE_PIDS: TextPlace = TextPlace {
    at: REASON.end(),
    bytes: 4 * super::SERVICE_PIDS_MAX,
};

/// What the last takeover was for.
pub(super) const TAKEOVER_CAUSE: TextPlace = TextPlace {
    at: SERVICE_PIDS.end(),
    bytes: 512,
};

/// Ring of per-second sums: `SECONDS` entries of {second, epochs, pages, bytes}.
pub(super) const SECONDS_AT: usize = TAKEOVER_CAUSE.end();
pub(super) const SECONDS: usize = 16;
pub(super) const SECOND_WORDS: usize = 4;

pub(super) const PAUSE_AT: usize = SECONDS_AT + SECONDS * SECOND_WORDS;
pub(super) const HOLD_AT: usize = PAUSE_AT + histogram::WORDS;
pub(super) const STEPS_AT: usize = HOLD_AT + histogram::WORDS;
pub(super) const WORDS: usize = STEPS_AT + EPOCH_STEPS * histogram::WORDS;
