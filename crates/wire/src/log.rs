//! What a primary leaves its standby in shared memory: the input log, which has every packet
//! before the service has it, and the journal of epochs.
//!
//! Both are records in a ring of `sys::shared`, so what stands there is whole wherever the primary
//! died. The input log is written before a packet goes to the service and the journal after an
//! epoch is captured; both by Release stores, so a reader that sees an epoch and then reads the
//! input log finds every packet before the epoch's mark.

use crate::commit::{EpochNumber, Publication};
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::time::Duration;
use unbroken_sys::shared::{Consumer, Producer, Reservation};

#[derive(Debug, thiserror::Error)]
pub enum LogError {
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

const INPUT_LOG: &str = "the input log";
const JOURNAL: &str = "the journal";

/// In front of each frame of the input log: its position.
const INPUT_HEADER_BYTES: usize = 8;

/// The writing end of the input log.
#[derive(Debug)]
pub struct InputLogWriter {
    producer: Producer,
}

impl InputLogWriter {
    pub fn new(producer: Producer) -> Self {
        Self { producer }
    }

    /// Whether a frame of `most_bytes` fits now. When not, the standby is behind: leave the input
    /// in the kernel's queue until it does.
    pub fn has_room(&self, most_bytes: usize) -> bool {
        self.producer.room_bytes() >= INPUT_HEADER_BYTES + most_bytes
    }

    /// Appends a frame; false when there is no room.
    #[must_use]
    pub fn append(&mut self, position: u64, frame: &[u8]) -> bool {
        let copy = |room: &mut [u8]| {
            room.copy_from_slice(frame);
            Ok(Some(frame.len()))
        };
        // Only the closure's errors come back, and this one has none.
        matches!(self.append_with(position, frame.len(), copy), Ok(Some(_)))
    }

    /// Lets `fill` put a frame of up to `most_bytes` straight into the log (a read from the TUN),
    /// and returns the frame as it stands there, for the service. `None` when there is no room or
    /// `fill` had nothing.
    pub fn append_with(
        &mut self,
        position: u64,
        most_bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<Option<usize>>,
    ) -> io::Result<Option<&[u8]>> {
        let Some(mut room) = self.producer.reserve(INPUT_HEADER_BYTES + most_bytes) else {
            return Ok(None);
        };
        room[..INPUT_HEADER_BYTES].copy_from_slice(&position.to_le_bytes());
        let Some(length_bytes) = fill(&mut room[INPUT_HEADER_BYTES..])? else {
            return Ok(None);
        };
        let record = room.publish(INPUT_HEADER_BYTES + length_bytes);
        Ok(Some(&record[INPUT_HEADER_BYTES..]))
    }

    /// Wakes a standby that sleeps in [`InputLogReader::wait`].
    pub fn wake_reader(&self) -> io::Result<()> {
        self.producer.wake_consumer()
    }
}

/// The reading end of the input log.
#[derive(Debug)]
pub struct InputLogReader {
    consumer: Consumer,
}

impl InputLogReader {
    pub fn new(consumer: Consumer) -> Self {
        Self { consumer }
    }

    /// The oldest frame that was not consumed, and its position.
    pub fn peek(&mut self) -> Result<Option<(u64, &[u8])>, LogError> {
        let ring_error = |source| LogError::Ring {
            log: INPUT_LOG,
            source,
        };
        let Some(record) = self.consumer.peek().map_err(ring_error)? else {
            return Ok(None);
        };
        match record.split_first_chunk::<INPUT_HEADER_BYTES>() {
            Some((position, frame)) => Ok(Some((u64::from_le_bytes(*position), frame))),
            None => Err(LogError::Malformed {
                log: INPUT_LOG,
                length_bytes: record.len(),
            }),
        }
    }

    pub fn consume(&mut self) -> Result<(), LogError> {
        self.consumer.consume().map_err(|source| LogError::Ring {
            log: INPUT_LOG,
            source,
        })
    }

    /// Sleeps until there is a frame, at most `timeout`; may come back early with false.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        self.consumer.wait(timeout)
    }
}

/// Behind the content of each journal record: term, sequence, bulk length, kind.
const JOURNAL_TRAILER_BYTES: usize = 32;
const KIND_PART: u64 = 1;
const KIND_EPOCH: u64 = 2;

/// The writing end of the journal, for one term.
#[derive(Debug)]
pub struct JournalWriter {
    producer: Producer,
    term: u64,
    next_sequence: u64,
}

impl JournalWriter {
    /// A journal for a new standby under `term`; its first epoch will be number 1.
    pub fn new(producer: Producer, term: u64) -> Self {
        Self {
            producer,
            term,
            next_sequence: 1,
        }
    }

    /// The epoch that the next [`JournalRoom::publish_epoch`] makes.
    pub fn next_epoch(&self) -> EpochNumber {
        EpochNumber {
            term: self.term,
            sequence: self.next_sequence,
        }
    }

    /// Room for a record with up to `most_bytes` of content; `None` while the standby is too far
    /// behind, or for ever when the ring is smaller than that.
    pub fn reserve(&mut self, most_bytes: usize) -> Option<JournalRoom<'_>> {
        let epoch = self.next_epoch();
        let room = self.producer.reserve(most_bytes + JOURNAL_TRAILER_BYTES)?;
        Some(JournalRoom {
            room,
            most_bytes,
            epoch,
            next_sequence: &mut self.next_sequence,
        })
    }

    /// Bytes of content that one record could take right now.
    pub fn room_bytes(&self) -> usize {
        self.producer
            .room_bytes()
            .saturating_sub(JOURNAL_TRAILER_BYTES)
    }

    /// Wakes a standby that sleeps in [`JournalReader::wait`]; after the service runs again, for
    /// a wake costs more than the epoch is late.
    pub fn wake_reader(&self) -> io::Result<()> {
        self.producer.wake_consumer()
    }

    /// Whether the standby is gone and nothing will be taken any more.
    pub fn is_abandoned(&self) -> bool {
        self.producer.is_abandoned()
    }

    /// Sleeps until `bytes` of content fit or the standby is gone, at most `timeout`; returns
    /// whether they fit. May come back early with false.
    pub fn wait_for_room(&self, bytes: usize, timeout: Option<Duration>) -> io::Result<bool> {
        self.producer
            .wait_for_room(bytes + JOURNAL_TRAILER_BYTES, timeout)
    }

    /// Whether the standby has taken everything.
    pub fn is_drained(&self) -> bool {
        self.producer.is_drained()
    }
}

/// Room for one record: contiguous bytes into which a capture writes, first the bulk (page
/// content), right behind it the structure (the encoded rest). Dropping it publishes nothing.
#[derive(Debug)]
pub struct JournalRoom<'a> {
    room: Reservation<'a>,
    most_bytes: usize,
    epoch: EpochNumber,
    next_sequence: &'a mut u64,
}

impl JournalRoom<'_> {
    /// The epoch that this would become.
    pub fn epoch(&self) -> EpochNumber {
        self.epoch
    }

    /// Commits the content as an epoch: `bulk_bytes` and then `structure_bytes` of the room.
    pub fn publish_epoch(self, bulk_bytes: usize, structure_bytes: usize) -> Publication {
        let epoch = self.epoch;
        self.publish(KIND_EPOCH, epoch.sequence, bulk_bytes, structure_bytes);
        Publication::of(epoch)
    }

    /// Publishes what is no epoch: part of a fill or of a large epoch, which means nothing before the
    /// epoch that completes it, or a word to the standby.
    pub fn publish_part(self, bulk_bytes: usize, structure_bytes: usize) {
        self.publish(KIND_PART, 0, bulk_bytes, structure_bytes);
    }

    fn publish(mut self, kind: u64, sequence: u64, bulk_bytes: usize, structure_bytes: usize) {
        let content = bulk_bytes + structure_bytes;
        assert!(content <= self.most_bytes, "an epoch longer than its room");
        let words = [self.epoch.term, sequence, bulk_bytes as u64, kind];
        let trailer = &mut self.room[content..content + JOURNAL_TRAILER_BYTES];
        for (target, word) in trailer.chunks_exact_mut(8).zip(words) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        if kind == KIND_EPOCH {
            *self.next_sequence = sequence + 1;
        }
        self.room.publish(content + JOURNAL_TRAILER_BYTES);
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
    pub fn new(consumer: Consumer, term: u64) -> Self {
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
    pub fn peek(&mut self) -> Result<Option<JournalEntry<'_>>, LogError> {
        let ring_error = |source| LogError::Ring {
            log: JOURNAL,
            source,
        };
        let Some(record) = self.consumer.peek().map_err(ring_error)? else {
            return Ok(None);
        };
        let malformed = LogError::Malformed {
            log: JOURNAL,
            length_bytes: record.len(),
        };
        let Some((content, trailer)) = record.split_last_chunk::<JOURNAL_TRAILER_BYTES>() else {
            return Err(malformed);
        };
        let [term, sequence, bulk_bytes, kind] = words_of(trailer);
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
            return Err(LogError::OutOfOrder {
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
        }))
    }

    /// Gives the record that [`peek`](Self::peek) shows back, after it is applied whole.
    pub fn consume(&mut self) -> Result<(), LogError> {
        if let Some(JournalEntry {
            epoch: Some(epoch), ..
        }) = self.peek()?
        {
            self.consumed_sequence = epoch.sequence;
        }
        self.consumer.consume().map_err(|source| LogError::Ring {
            log: JOURNAL,
            source,
        })
    }

    /// Whether a record is there: one load.
    pub fn is_ready(&self) -> bool {
        self.consumer.is_ready()
    }

    /// Sleeps until there is a record, at most `timeout`; may come back early with false.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        self.consumer.wait(timeout)
    }

    /// As [`JournalReader::wait`], but also ends when `also` holds: whoever makes it so wakes the
    /// ring's consumer afterwards.
    pub fn wait_or(&self, timeout: Option<Duration>, also: impl Fn() -> bool) -> io::Result<bool> {
        self.consumer.wait_or(timeout, also)
    }
}

fn words_of(trailer: &[u8; JOURNAL_TRAILER_BYTES]) -> [u64; 4] {
    let word = |range: Range<usize>| {
        trailer[range]
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte))
    };
    [word(0..8), word(8..16), word(16..24), word(24..32)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_sys::shared::RingMemory;

    fn ring() -> RingMemory {
        RingMemory::create("unbroken-log-test", 1 << 16).unwrap()
    }

    #[test]
    fn the_input_log_gives_positions_and_frames_back() {
        let ring = ring();
        let mut writer = InputLogWriter::new(ring.producer().unwrap());
        let mut reader = InputLogReader::new(ring.consumer().unwrap());
        assert!(writer.append(41, b"first"));
        let read = |room: &mut [u8]| {
            room[..6].copy_from_slice(b"second");
            Ok(Some(6))
        };
        assert_eq!(
            writer.append_with(42, 1000, read).unwrap(),
            Some(&b"second"[..])
        );
        assert_eq!(writer.append_with(43, 1000, |_| Ok(None)).unwrap(), None);
        assert_eq!(reader.peek().unwrap(), Some((41, &b"first"[..])));
        reader.consume().unwrap();
        assert_eq!(reader.peek().unwrap(), Some((42, &b"second"[..])));
        reader.consume().unwrap();
        assert_eq!(reader.peek().unwrap(), None);
    }

    #[test]
    fn a_full_input_log_refuses_and_has_room_again_later() {
        let ring = ring();
        let mut writer = InputLogWriter::new(ring.producer().unwrap());
        let mut reader = InputLogReader::new(ring.consumer().unwrap());
        let frame = vec![7; 40_000];
        assert!(writer.append(1, &frame));
        assert!(!writer.has_room(frame.len()) && !writer.append(2, &frame));
        reader.consume().unwrap();
        assert!(writer.has_room(frame.len()) && writer.append(2, &frame));
    }

    #[test]
    fn the_journal_numbers_its_epochs_and_keeps_bulk_and_structure_apart() {
        let ring = ring();
        let mut writer = JournalWriter::new(ring.producer().unwrap(), 3);
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
        assert!(reader.peek().unwrap().is_none() && writer.is_drained());
        assert_eq!(writer.next_epoch().sequence, 2);
    }

    #[test]
    fn an_abandoned_room_uses_no_number() {
        let ring = ring();
        let mut writer = JournalWriter::new(ring.producer().unwrap(), 1);
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
                publish(JournalWriter::new(ring.producer().unwrap(), written));
                let mut reader = JournalReader::new(ring.consumer().unwrap(), own);
                assert!(matches!(
                    reader.peek(),
                    Err(LogError::OutOfOrder { term, own_term, .. })
                        if (term, own_term) == (written, own)
                ));
                assert!(reader.consume().is_err() && reader.is_ready());
            }
        }
    }

    #[test]
    fn a_number_that_is_not_next_is_refused() {
        for (sequence, is_next) in [(0, false), (1, false), (2, true), (3, false)] {
            let ring = ring();
            let mut writer = JournalWriter::new(ring.producer().unwrap(), 1);
            let mut reader = JournalReader::new(ring.consumer().unwrap(), 1);
            let _ = writer.reserve(10).unwrap().publish_epoch(0, 0);
            reader.consume().unwrap();
            writer.next_sequence = sequence;
            let _ = writer.reserve(10).unwrap().publish_epoch(0, 0);
            match reader.peek() {
                Ok(Some(entry)) => assert!(is_next && entry.epoch.is_some()),
                Err(LogError::OutOfOrder { after: 1, .. }) => assert!(!is_next),
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
        let mut writer = JournalWriter::new(ring.producer().unwrap(), 1);
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
            Err(LogError::Malformed {
                length_bytes: 10,
                ..
            })
        ));
    }
}
