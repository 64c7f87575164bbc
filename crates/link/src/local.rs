//! The link to a standby on the same machine: shared memory, and a socket for what it cannot hold.
//! Both outlive the primary.

use crate::references::{ReferenceReader, ReferenceWriter};
use crate::{InputLogReader, InputLogWriter, JournalReader, JournalWriter};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use unbroken_sys::channel::Channel;
use unbroken_sys::shared::RingMemory;

/// Both rings of a link, and its socket. Each end may be taken once.
#[derive(Clone, Debug)]
pub struct LocalLink {
    journal: RingMemory,
    inputs: RingMemory,
    /// Where references come out.
    inbound: Arc<Channel>,
    /// Where they go in: the primary alone has it.
    outbound: Option<Arc<Channel>>,
}

impl LocalLink {
    /// A link for a new standby.
    pub fn with_capacity(journal_bytes: usize, input_log_bytes: usize) -> io::Result<Self> {
        let (outbound, inbound) = Channel::pair()?;
        Ok(Self {
            journal: RingMemory::create("unbroken-journal", journal_bytes)?,
            inputs: RingMemory::create("unbroken-inputs", input_log_bytes)?,
            inbound: Arc::new(inbound),
            outbound: Some(Arc::new(outbound)),
        })
    }

    /// The link of which the primary has sent these [`descriptors`](Self::descriptors).
    pub fn from_descriptors([journal, inputs, inbound]: [OwnedFd; 3]) -> io::Result<Self> {
        Ok(Self {
            journal: RingMemory::from_fd(journal)?,
            inputs: RingMemory::from_fd(inputs)?,
            inbound: Arc::new(inbound.into()),
            outbound: None,
        })
    }

    /// What the standby needs to have the same link: the journal, the input log, and the end of the
    /// socket that references come out of.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [
            self.journal.as_fd(),
            self.inputs.as_fd(),
            self.inbound.as_fd(),
        ]
    }

    /// The primary's end for records; its first epoch will be number 1 of `term`.
    pub fn journal_writer(&self, term: u64) -> io::Result<JournalWriter> {
        let outbound = self.outbound.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let references = ReferenceWriter::new(outbound.as_fd().try_clone_to_owned()?.into());
        Ok(JournalWriter::new(
            self.journal.producer()?,
            term,
            references,
        ))
    }

    /// The primary's end for input.
    pub fn input_log_writer(&self) -> io::Result<InputLogWriter> {
        Ok(InputLogWriter::new(self.inputs.producer()?))
    }

    /// The standby's end for records of the primary of `term`.
    pub fn journal_reader(&self, term: u64) -> io::Result<JournalReader> {
        Ok(JournalReader::new(self.journal.consumer()?, term))
    }

    /// The standby's end for references.
    pub fn reference_reader(&self) -> io::Result<ReferenceReader> {
        let inbound = self.inbound.as_fd().try_clone_to_owned()?;
        Ok(ReferenceReader::new(inbound.into()))
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
