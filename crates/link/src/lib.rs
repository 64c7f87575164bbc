//! What the nodes of one service say to each other, and the way it takes.
//!
//! A primary has the two outbound ends: a [`JournalWriter`] for [records](Record), epochs above
//! all, with [references](Reference) to the files that they name, and an [`InputLogWriter`] for what clients say; its [`Commits`] tell which epochs are safe.
//! A standby has the [`JournalReader`], the [`ReferenceReader`] and the [`InputLogReader`]. What lies between is a
//! [`LocalLink`], the shared memory of a standby on the same machine; nothing but this crate knows
//! that it is.
//!
//! The input log has every packet before the service has it, and an epoch is published after it is
//! captured, so a standby that finds an epoch and then reads the input log finds every packet from
//! before the epoch's mark.
#![forbid(unsafe_code)]

mod commits;
mod input_log;
mod journal;
mod local;
mod record;
mod references;

pub use commits::Commits;
pub use input_log::{InputLogReader, InputLogWriter};
pub use journal::{JournalEntry, JournalReader, JournalRoom, JournalWriter};
pub use local::LocalLink;
pub use record::{Asker, Cause, Record};
pub use references::{Reference, ReferenceReader};

use std::io;

/// Why nothing more can be read from a link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("read {log}: {source}; the standby has to be filled again")]
    Ring {
        log: &'static str,
        source: io::Error,
    },
    #[error("read {log}: a record of {length_bytes} bytes is none of ours; versions differ?")]
    Malformed {
        log: &'static str,
        length_bytes: usize,
    },
    #[error("receive the references of a record: {source}; the standby has to be filled again")]
    References { source: io::Error },
    #[error(
        "read the journal: epoch {sequence} of term {term} does not follow epoch {after} of term \
         {own_term}; the standby has to be filled again"
    )]
    OutOfOrder {
        term: u64,
        sequence: u64,
        own_term: u64,
        after: u64,
    },
}
