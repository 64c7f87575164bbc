//! The link to a standby on the same machine: shared memory that outlives the primary.

use crate::{InputLogReader, InputLogWriter, JournalReader, JournalWriter};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_sys::shared::RingMemory;

/// Both rings of a link. Each end may be taken once.
#[derive(Clone, Debug)]
pub struct LocalLink {
    journal: RingMemory,
    inputs: RingMemory,
}

impl LocalLink {
    /// A link for a new standby.
    pub fn with_capacity(journal_bytes: usize, input_log_bytes: usize) -> io::Result<Self> {
        Ok(Self {
            journal: RingMemory::create("unbroken-journal", journal_bytes)?,
            inputs: RingMemory::create("unbroken-inputs", input_log_bytes)?,
        })
    }

    /// The link of which the primary has sent these [`descriptors`](Self::descriptors).
    pub fn from_descriptors([journal, inputs]: [OwnedFd; 2]) -> io::Result<Self> {
        Ok(Self {
            journal: RingMemory::from_fd(journal)?,
            inputs: RingMemory::from_fd(inputs)?,
        })
    }

    /// What the standby needs to have the same link: the journal's, and the input log's.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.journal.as_fd(), self.inputs.as_fd()]
    }

    /// The primary's end for records; its first epoch will be number 1 of `term`.
    pub fn journal_writer(&self, term: u64) -> io::Result<JournalWriter> {
        Ok(JournalWriter::new(self.journal.producer()?, term))
    }

    /// The primary's end for input.
    pub fn input_log_writer(&self) -> io::Result<InputLogWriter> {
        Ok(InputLogWriter::new(self.inputs.producer()?))
    }

    /// The standby's end for records of the primary of `term`.
    pub fn journal_reader(&self, term: u64) -> io::Result<JournalReader> {
        Ok(JournalReader::new(self.journal.consumer()?, term))
    }

    /// The standby's end for input.
    pub fn input_log_reader(&self) -> io::Result<InputLogReader> {
        Ok(InputLogReader::new(self.inputs.consumer()?))
    }

    /// Makes the standby's wait for a record end.
    pub fn wake_standby(&self) -> io::Result<()> {
        self.journal.wake_consumer()
    }

    /// The standby is gone: whoever waits for room in the journal hears it.
    pub fn abandon(&self) -> io::Result<()> {
        self.journal.abandon()
    }
}
