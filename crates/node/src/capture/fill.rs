//! Memory that is sent ahead of an epoch.

use super::CaptureError;
use super::memory::Memory;
use super::references::References;
use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
use std::time::{Duration, Instant};
use unbroken_core::epoch::Publication;
use unbroken_image::{MemoryDelta, PAGE_SIZE, PageRun, Pid, encode_into};
use unbroken_link::{JournalRoom, JournalWriter, Record, Reference};
use unbroken_tracee::Process;

/// Pages of one record.
const PAGES_PER_PIECE: u64 = 1024;
/// A round that found no more than this leaves the rest to the pause: well under a millisecond.
const PAGES_LEFT: u64 = 256;
/// A service that writes faster than we send is stopped with whatever is left.
const ROUNDS_MAX: u32 = 8;
/// How long a standby may take to make room before it is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Room for one piece, its description included; more is waited for, if need be, when it is there.
const PIECE_BYTES: usize = (PAGES_PER_PIECE * PAGE_SIZE) as usize + (1 << 20);
/// While a fill waits for room the service's threads have their events seen to this often.
const MOMENT: Duration = Duration::from_millis(1);

/// The rounds of one process's fill. Each begins, and the last ends, when the standby has taken what was sent
/// before: from the epoch that completes the fill on, output waits for the standby, which must have
/// little more than that epoch to do by then. Until then output passes, however long it takes.
pub(super) struct Fill {
    pub pid: Pid,
    rounds: u32,
    found: u64,
    /// What the current round has not sent, last first.
    left: Vec<PageRun>,
    is_mapped: bool,
    /// Since when the standby has made no room.
    stuck_since: Option<Instant>,
}

impl Fill {
    pub fn new(pid: Pid) -> Fill {
        Fill {
            pid,
            rounds: 0,
            found: 0,
            left: Vec::new(),
            is_mapped: false,
            stuck_since: None,
        }
    }

    /// Sends one piece while the service runs; true when the rest fits a pause.
    pub fn send_some(
        &mut self,
        memory: &mut Memory,
        process: &Process,
        sending: &mut Sending<'_>,
    ) -> Result<bool, CaptureError> {
        let is_over = self.left.is_empty();
        if !self.has_room(sending, is_over)? {
            return Ok(false);
        }
        if is_over {
            if self.rounds > 0 && (self.found <= PAGES_LEFT || self.rounds >= ROUNDS_MAX) {
                return Ok(true);
            }
            memory.scan_running(process, self.rounds == 0, &mut self.left)?;
            self.found = self.left.iter().map(|run| run.count).sum();
            self.left.reverse();
            self.rounds += 1;
        }
        let mut delta = MemoryDelta {
            pages: take_piece(&mut self.left),
            ..MemoryDelta::default()
        };
        if !self.is_mapped {
            self.is_mapped = true;
            delta.mappings = Some(memory.map().to_vec());
            delta.guards = memory.guards()?;
            sending.references.map(self.pid, memory.map());
        }
        let bulk_bytes = bulk_bytes(&delta.pages);
        let mut content = vec![0; bulk_bytes];
        if memory
            .tracker()
            .read_pages(process.memory(), &delta.pages, &mut content)
            .is_err()
        {
            // Something was unmapped meanwhile: the epoch's map says what is left of it.
            keep_readable(memory, process, &mut delta.pages, &mut content);
        }
        let record = Record::Memory {
            pid: self.pid,
            memory: delta,
        };
        sending.publish_part(&record, &content)?;
        Ok(false)
    }

    /// Whether the next piece may be sent; `all` when the standby must have taken everything first.
    /// Waits no longer than a moment: a thread of the service that makes another one, or is sent a
    /// signal, stands until the caller looks again.
    fn has_room(&mut self, sending: &mut Sending<'_>, all: bool) -> Result<bool, CaptureError> {
        let are_sent = sending.send_references()?;
        let journal = &*sending.journal;
        let _ = journal.wake_reader();
        let room_bytes = journal.room_bytes();
        if are_sent && (journal.is_drained() || (!all && room_bytes >= PIECE_BYTES)) {
            self.stuck_since = None;
            return Ok(true);
        }
        if journal.wait_for_room(room_bytes + 1, Some(MOMENT))? {
            self.stuck_since = None;
            return Ok(false);
        }
        let since = *self.stuck_since.get_or_insert_with(Instant::now);
        require_standby(journal, since)?;
        Ok(false)
    }
}

fn bulk_bytes(pages: &[PageRun]) -> usize {
    pages
        .iter()
        .map(|run| (run.count * PAGE_SIZE) as usize)
        .sum()
}

/// Takes the next runs off `left`, splitting the last one.
fn take_piece(left: &mut Vec<PageRun>) -> Vec<PageRun> {
    let mut piece = Vec::new();
    let mut room = PAGES_PER_PIECE;
    while room > 0
        && let Some(run) = left.pop()
    {
        let count = run.count.min(room);
        piece.push(PageRun {
            address: run.address,
            count,
        });
        if count < run.count {
            let address = run.address + count * PAGE_SIZE;
            left.push(PageRun {
                address,
                count: run.count - count,
            });
        }
        room -= count;
    }
    piece
}

/// Leaves only the runs that can still be read.
fn keep_readable(
    memory: &Memory,
    process: &Process,
    pages: &mut Vec<PageRun>,
    content: &mut Vec<u8>,
) {
    content.clear();
    pages.retain(|run| {
        let at = content.len();
        content.resize(at + (run.count * PAGE_SIZE) as usize, 0);
        let target = &mut content[at..];
        let read = memory
            .tracker()
            .read_pages(process.memory(), &[*run], target);
        if read.is_err() {
            content.truncate(at);
        }
        read.is_ok()
    });
}

/// What goes to the standby while the service runs.
pub(super) struct Sending<'a> {
    pub journal: &'a mut JournalWriter,
    pub references: &'a mut References,
    pub description: &'a mut Vec<u8>,
}

impl Sending<'_> {
    /// Publishes a record that is no epoch, waiting for room.
    pub fn publish_part(&mut self, record: &Record, content: &[u8]) -> Result<(), CaptureError> {
        let (room, length_bytes) = self.put(record, content)?;
        room.publish_part(content.len(), length_bytes);
        let _ = self.journal.wake_reader();
        Ok(())
    }

    /// A room, waited for, with `content`, the record, whose length is returned, and references
    /// ahead of it, as many as there is room for.
    fn put(
        &mut self,
        record: &Record,
        content: &[u8],
    ) -> Result<(JournalRoom<'_>, usize), CaptureError> {
        self.description.clear();
        encode_into(record, self.description);
        let total = content.len() + self.description.len();
        wait_for_room(self.journal, total)?;
        let mut room = self
            .journal
            .reserve(total)
            .ok_or(CaptureError::StandbyStuck(0))?;
        room[..content.len()].copy_from_slice(content);
        room[content.len()..total].copy_from_slice(self.description);
        attach(&mut room, &mut self.references.waiting)?;
        Ok((room, self.description.len()))
    }

    /// Sends references by themselves, as many as there is room for within a moment; whether none
    /// are left. The standby makes room when it has read of them.
    fn send_references(&mut self) -> Result<bool, CaptureError> {
        if self.references.waiting.is_empty() {
            return Ok(true);
        }
        if self.journal.owes_record() || self.journal.wait_for_reference_room(MOMENT)? {
            self.publish_part(&Record::References, &[])?;
        }
        Ok(self.references.waiting.is_empty())
    }

    fn send_all_references(&mut self) -> Result<(), CaptureError> {
        let began = Instant::now();
        while !self.send_references()? {
            require_standby(self.journal, began)?;
        }
        Ok(())
    }
}

/// Sends what is waiting ahead of the record in `room`, as much as there is room for.
pub(super) fn attach(
    room: &mut JournalRoom<'_>,
    waiting: &mut Vec<Reference>,
) -> Result<(), CaptureError> {
    match room.attach(waiting) {
        Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset) => {
            Err(CaptureError::StandbyGone)
        }
        sent => Ok(sent?),
    }
}

/// Whether there is any use in waiting on, since `began`, for what a standby is to do.
fn require_standby(journal: &JournalWriter, began: Instant) -> Result<(), CaptureError> {
    if journal.is_abandoned() {
        return Err(CaptureError::StandbyGone);
    }
    if began.elapsed() > PATIENCE {
        return Err(CaptureError::StandbyStuck(PATIENCE.as_secs()));
    }
    Ok(())
}

fn wait_for_room(journal: &JournalWriter, bytes: usize) -> Result<(), CaptureError> {
    let _ = journal.wake_reader();
    let began = Instant::now();
    loop {
        let left = PATIENCE.saturating_sub(began.elapsed());
        if journal.wait_for_room(bytes, Some(left))? {
            return Ok(());
        }
        require_standby(journal, began)?;
    }
}

/// Publishes an epoch that one record of the journal cannot hold, or not now: its pages go ahead
/// in parts, which mean nothing before the epoch that follows them, and so do references.
pub(super) fn publish_large(
    mut sending: Sending<'_>,
    mut record: Record,
    content: &[u8],
) -> Result<Publication, CaptureError> {
    let Record::Epoch { epoch, .. } = &mut record else {
        return Err(CaptureError::ProcessGone);
    };
    sending.send_all_references()?;
    let mut at = 0;
    for process in &mut epoch.processes {
        // The parts come before the epoch's map changes, so those go with the first of them.
        let mut memory = std::mem::take(&mut process.memory);
        let mut left = std::mem::take(&mut memory.pages);
        left.reverse();
        loop {
            let mut piece = std::mem::take(&mut memory);
            piece.pages = take_piece(&mut left);
            let length = bulk_bytes(&piece.pages);
            let part = Record::Memory {
                pid: process.pid,
                memory: piece,
            };
            sending.publish_part(&part, &content[at..at + length])?;
            at += length;
            if left.is_empty() {
                break;
            }
        }
    }
    let (room, length_bytes) = sending.put(&record, &[])?;
    Ok(room.publish_epoch(0, length_bytes))
}
