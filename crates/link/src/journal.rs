//! The journal: records of what the standby is to do, above all epochs.
//!
//! Each is a record in a ring of `sys::shared`, so what stands there is whole wherever the primary
//! died.

use crate::LinkError;
use crate::references::{Reference, ReferenceWriter};
use std::io;
use std::ops::{Deref, DerefMut};
use std::time::Duration;
use unbroken_core::epoch::{EpochNumber, EpochNumbers, Publication};
use unbroken_sys::shared::{Consumer, Producer, Reservation};

const JOURNAL: &str = "the journal";

/// Behind the content of each journal record: term, sequence, bulk length, kind, and how many messages
/// with references came ahead of it.
const JOURNAL_TRAILER_BYTES: usize = 40;
const TRAILER_WORDS: usize = JOURNAL_TRAILER_BYTES / 8;
const KIND_PART: u64 = 1;
const KIND_EPOCH: u64 = 2;

/// The writing end of the journal, for one term.
#[derive(Debug)]
pub struct JournalWriter {
    producer: Producer,
    numbers: EpochNumbers,
    references: ReferenceWriter,
}

impl JournalWriter {
    /// A journal for a new standby under `term`; its first epoch will be number 1.
    pub(crate) fn new(producer: Producer, term: u64, references: ReferenceWriter) -> Self {
        Self {
            producer,
            numbers: EpochNumbers::of_term(term),
            references,
        }
    }

    /// The epoch that the next [`JournalRoom::publish_epoch`] makes.
    pub fn next_epoch(&self) -> EpochNumber {
        self.numbers.next()
    }

    /// Room for a record with up to `most_bytes` of content; `None` while the standby is too far
    /// behind, or for ever when the ring is smaller than that.
    pub fn reserve(&mut self, most_bytes: usize) -> Option<JournalRoom<'_>> {
        let room = self.producer.reserve(most_bytes + JOURNAL_TRAILER_BYTES)?;
        Some(JournalRoom {
            room,
            most_bytes,
            numbers: &mut self.numbers,
            references: &mut self.references,
        })
    }

    /// Bytes of content that one record could take right now.
    pub fn room_bytes(&self) -> usize {
        self.producer
            .room_bytes()
            .saturating_sub(JOURNAL_TRAILER_BYTES)
    }

    /// Whether the standby has taken everything.
    pub fn is_drained(&self) -> bool {
        self.producer.is_drained()
    }

    /// Wakes a standby that sleeps in [`JournalReader::wait_or`]; after the service runs again, for
    /// a wake costs more than the epoch is late.
    pub fn wake_reader(&self) -> io::Result<()> {
        self.producer.wake_consumer()
    }

    /// Whether the standby is gone and nothing will be taken any more.
    pub fn is_abandoned(&self) -> bool {
        self.producer.is_abandoned()
    }

    /// Whether references were sent of which no record has told: a record was given up. The standby
    /// takes none before it is told.
    pub fn owes_record(&self) -> bool {
        self.references.uncounted > 0
    }

    /// Sleeps until there is room for references, at most `timeout`; returns whether there is.
    pub fn wait_for_reference_room(&self, timeout: Duration) -> io::Result<bool> {
        self.references.wait_for_room(timeout)
    }

    /// Sleeps until `bytes` of content fit or the standby is gone, at most `timeout`; returns
    /// whether they fit. May come back early with false.
    pub fn wait_for_room(&self, bytes: usize, timeout: Option<Duration>) -> io::Result<bool> {
        self.producer
            .wait_for_room(bytes + JOURNAL_TRAILER_BYTES, timeout)
    }
}

/// Room for one record: contiguous bytes into which a capture writes, first the bulk (page
/// content), right behind it the structure (the encoded rest). Dropping it publishes nothing.
#[derive(Debug)]
pub struct JournalRoom<'a> {
    room: Reservation<'a>,
    most_bytes: usize,
    numbers: &'a mut EpochNumbers,
    references: &'a mut ReferenceWriter,
}

impl<'a> JournalRoom<'a> {
    /// Sends references ahead of this record, as many as there is room for, and takes them out of
    /// `waiting`. What is left goes with the next record: a standby makes room when it has read this
    /// one.
    pub fn attach(&mut self, waiting: &mut Vec<Reference>) -> io::Result<()> {
        self.references.send(waiting)
    }

    /// Publishes the content as an epoch: `bulk_bytes` and then `structure_bytes` of the room.
    pub fn publish_epoch(self, bulk_bytes: usize, structure_bytes: usize) -> Publication {
        let sequence = self.numbers.next().sequence;
        let numbers = self.publish(KIND_EPOCH, sequence, bulk_bytes, structure_bytes);
        numbers.published()
    }

    /// Publishes what is no epoch: part of a fill or of a large epoch, which means nothing before the
    /// epoch that completes it, or a word to the standby.
    pub fn publish_part(self, bulk_bytes: usize, structure_bytes: usize) {
        self.publish(KIND_PART, 0, bulk_bytes, structure_bytes);
    }

    fn publish(
        mut self,
        kind: u64,
        sequence: u64,
        bulk_bytes: usize,
        structure_bytes: usize,
    ) -> &'a mut EpochNumbers {
        let content = bulk_bytes + structure_bytes;
        assert!(content <= self.most_bytes, "an epoch longer than its room");
        let messages = std::mem::take(&mut self.references.uncounted);
        let term = self.numbers.next().term;
        let words: [u64; TRAILER_WORDS] = [term, sequence, bulk_bytes as u64, kind, messages];
        let trailer = &mut self.room[content..content + JOURNAL_TRAILER_BYTES];
        for (target, word) in trailer.chunks_exact_mut(8).zip(words) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        self.room.publish(content + JOURNAL_TRAILER_BYTES);
        self.numbers
    }
}

impl Deref for JournalRoom<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.room[..self.most_bytes]
    }
}

impl DerefMut for JournalRoom<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.room[..self.most_bytes]
    }
}

/// One record of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalEntry<'a> {
    /// The epoch that this is; `None` for a part or a word.
    pub epoch: Option<EpochNumber>,
    pub bulk: &'a [u8],
    pub structure: &'a [u8],
    /// With references that belong to it ([`crate::ReferenceReader::receive`]).
    pub messages: u64,
}

/// The reading end of the journal: refuses whatever does not follow what it gave before (I2).
#[derive(Debug)]
pub struct JournalReader {
    consumer: Consumer,
    term: u64,
    consumed_sequence: u64,
}

impl JournalReader {
    /// Reads the journal of the primary of `term` from its beginning.
    pub(crate) fn new(consumer: Consumer, term: u64) -> Self {
        Self {
            consumer,
            term,
            consumed_sequence: 0,
        }
    }

    /// The last epoch that was consumed; 0 before the first.
    pub fn consumed_sequence(&self) -> u64 {
        self.consumed_sequence
    }

    /// The oldest record that was not consumed.
    pub fn peek(&mut self) -> Result<Option<JournalEntry<'_>>, LinkError> {
        let ring_error = |source| LinkError::Ring {
            log: JOURNAL,
            source,
        };
        let Some(record) = self.consumer.peek().map_err(ring_error)? else {
            return Ok(None);
        };
        let malformed = LinkError::Malformed {
            log: JOURNAL,
            length_bytes: record.len(),
        };
        let Some((content, trailer)) = record.split_last_chunk::<JOURNAL_TRAILER_BYTES>() else {
            return Err(malformed);
        };
        let [term, sequence, bulk_bytes, kind, messages] = words_of(trailer);
        let split = usize::try_from(bulk_bytes)
            .ok()
            .and_then(|at| content.split_at_checked(at));
        let Some((bulk, structure)) = split else {
            return Err(malformed);
        };
        let in_order = match kind {
            KIND_PART => true,
            KIND_EPOCH => sequence == self.consumed_sequence + 1,
            _ => return Err(malformed),
        };
        if term != self.term || !in_order {
            let (own_term, after) = (self.term, self.consumed_sequence);
            return Err(LinkError::OutOfOrder {
                term,
                sequence,
                own_term,
                after,
            });
        }
        let epoch = (kind == KIND_EPOCH).then_some(EpochNumber { term, sequence });
        Ok(Some(JournalEntry {
            epoch,
            bulk,
            structure,
            messages,
        }))
    }

    /// Gives the record that [`peek`](Self::peek) shows back, after it is applied whole.
    pub fn consume(&mut self) -> Result<(), LinkError> {
        if let Some(JournalEntry {
            epoch: Some(epoch), ..
        }) = self.peek()?
        {
            self.consumed_sequence = epoch.sequence;
        }
        self.consumer.consume().map_err(|source| LinkError::Ring {
            log: JOURNAL,
            source,
        })
    }

    /// Whether a record is there: one load.
    pub fn is_ready(&self) -> bool {
        self.consumer.is_ready()
    }

    /// Sleeps until there is a record or `also` holds, at most `timeout`; may come back early with
    /// false. Whoever makes `also` hold wakes the reader afterwards ([`crate::LocalLink::wake_standby`]).
    pub fn wait_or(&self, timeout: Option<Duration>, also: impl Fn() -> bool) -> io::Result<bool> {
        self.consumer.wait_or(timeout, also)
    }
}

fn words_of(trailer: &[u8; JOURNAL_TRAILER_BYTES]) -> [u64; TRAILER_WORDS] {
    let (bytes, _) = trailer.as_chunks::<8>();
    std::array::from_fn(|index| u64::from_le_bytes(bytes[index]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_sys::channel::Channel;
    use unbroken_sys::shared::RingMemory;

    fn writer(ring: &RingMemory, term: u64) -> JournalWriter {
        let (outbound, _) = Channel::pair().unwrap();
        let references = ReferenceWriter::new(outbound);
        JournalWriter::new(ring.producer().unwrap(), term, references)
    }

    fn ring() -> RingMemory {
        RingMemory::create("unbroken-journal-test", 1 << 16).unwrap()
    }

    #[test]
    fn the_journal_numbers_its_epochs_and_keeps_bulk_and_structure_apart() {
        let ring = ring();
        let mut writer = writer(&ring, 3);
        let mut reader = JournalReader::new(ring.consumer().unwrap(), 3);
        writer.reserve(100).unwrap().publish_part(0, 0);
        let mut room = writer.reserve(100).unwrap();
        room[..9].copy_from_slice(b"pagesrest");
        let publication = room.publish_epoch(5, 4);
        assert_eq!(
            publication.epoch(),
            EpochNumber {
                term: 3,
                sequence: 1
            }
        );
        assert_eq!(reader.peek().unwrap().unwrap().epoch, None);
        reader.consume().unwrap();
        let entry = reader.peek().unwrap().unwrap();
        assert_eq!(entry.epoch, Some(publication.epoch()));
        assert_eq!((entry.bulk, entry.structure), (&b"pages"[..], &b"rest"[..]));
        reader.consume().unwrap();
        assert_eq!(reader.consumed_sequence(), 1);
        assert!(reader.peek().unwrap().is_none());
        assert_eq!(writer.next_epoch().sequence, 2);
    }

    #[test]
    fn an_abandoned_room_uses_no_number() {
        let ring = ring();
        let mut writer = writer(&ring, 1);
        let _ = writer.reserve(100).unwrap();
        assert_eq!(writer.next_epoch().sequence, 1);
    }

    #[test]
    fn another_term_is_refused_whatever_the_record() {
        let publish_epoch = |mut writer: JournalWriter| {
            let _ = writer.reserve(10).unwrap().publish_epoch(0, 0);
        };
        let publish_part = |mut writer: JournalWriter| {
            writer.reserve(10).unwrap().publish_part(0, 0);
        };
        for publish in [&publish_epoch as &dyn Fn(_), &publish_part] {
            for (written, own) in [(2, 3), (3, 2)] {
                let ring = ring();
                publish(writer(&ring, written));
                let mut reader = JournalReader::new(ring.consumer().unwrap(), own);
                assert!(matches!(
                    reader.peek(),
                    Err(LinkError::OutOfOrder { term, own_term, .. })
                        if (term, own_term) == (written, own)
                ));
                assert!(reader.consume().is_err() && reader.is_ready());
            }
        }
    }

    fn publish_raw(producer: &mut Producer, trailer: [u64; TRAILER_WORDS]) {
        let mut room = producer.reserve(JOURNAL_TRAILER_BYTES).unwrap();
        for (target, word) in room.chunks_exact_mut(8).zip(trailer) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        room.publish(JOURNAL_TRAILER_BYTES);
    }

    #[test]
    fn a_number_that_is_not_next_is_refused() {
        for (sequence, is_next) in [(0, false), (1, false), (2, true), (3, false)] {
            let ring = ring();
            let mut producer = ring.producer().unwrap();
            let mut reader = JournalReader::new(ring.consumer().unwrap(), 1);
            publish_raw(&mut producer, [1, 1, 0, KIND_EPOCH, 0]);
            reader.consume().unwrap();
            publish_raw(&mut producer, [1, sequence, 0, KIND_EPOCH, 0]);
            match reader.peek() {
                Ok(Some(entry)) => assert!(is_next && entry.epoch.is_some()),
                Err(LinkError::OutOfOrder { after: 1, .. }) => assert!(!is_next),
                other => panic!("{other:?}"),
            }
            assert_eq!(reader.consume().is_ok(), is_next);
            assert_eq!(reader.consumed_sequence(), if is_next { 2 } else { 1 });
        }
    }

    /// Large epochs come in parts, and words to the standby come at any time: neither is an epoch,
    /// so neither takes a number or is held to one.
    #[test]
    fn a_part_after_an_epoch_takes_no_number() {
        let ring = ring();
        let mut writer = writer(&ring, 1);
        let mut reader = JournalReader::new(ring.consumer().unwrap(), 1);
        let _ = writer.reserve(10).unwrap().publish_epoch(0, 0);
        writer.reserve(10).unwrap().publish_part(0, 0);
        let _ = writer.reserve(10).unwrap().publish_epoch(0, 0);
        for sequence in [Some(1), None, Some(2)] {
            let entry = reader.peek().unwrap().unwrap();
            assert_eq!(entry.epoch.map(|epoch| epoch.sequence), sequence);
            reader.consume().unwrap();
        }
        assert_eq!(reader.consumed_sequence(), 2);
    }

    #[test]
    fn a_record_that_is_no_epoch_is_refused() {
        let ring = ring();
        let mut producer = ring.producer().unwrap();
        producer.reserve(10).unwrap().publish(10);
        let mut reader = JournalReader::new(ring.consumer().unwrap(), 1);
        assert!(matches!(
            reader.peek(),
            Err(LinkError::Malformed {
                length_bytes: 10,
                ..
            })
        ));
    }
}
