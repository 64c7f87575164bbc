//! From a running service to epochs: the fill of a standby, and each capture after it.
//!
//! The tracer thread owns this. A fill sends memory in rounds while the service runs, until what
//! is left fits a pause; the capture that completes it reads everything else anew (a survey), so
//! it does not matter who held the service before. Each later capture reads what was announced,
//! what was written, and what is volatile.

mod announcements;
mod candidate;
mod delta;
mod error;
mod fill;
mod memory;
mod objects;
mod orphans;
mod process;
mod references;
mod signals;
mod sockets;
mod state;
mod threads;
mod tree;
mod wire;
mod write_fault_listener;

use crate::clock::now_ns;
use crate::config::Config;
use crate::stage::announcement::Announcement;
use crate::stage::notifier::Announcements;
use crate::steps::{Captured, EpochStep, StepClock};
use announcements::PendingObjectChanges;
use candidate::Candidate;
use delta::ObjectsDelta;
pub use error::CaptureError;
use fill::{Fill, Sending};
use objects::Objects;
use references::References;
use std::io;
use std::os::fd::OwnedFd;
use tree::{FollowedTree, page_count};
use unbroken_core::epoch::EpochNumber;
use unbroken_image::{Epoch, Mark, PAGE_SIZE, ProcessDelta, encode_into};
use unbroken_link::{Cause, JournalRoom, JournalWriter, Record};
use unbroken_tracee::{Stopped, Tree};
use unbroken_wire::flows::Activity;
pub use wire::{Pause, Wire};
use write_fault_listener::WriteFaultListener;

/// The way to one standby, and what is followed for it. A range of memory has room for one tracker:
/// the next fill installs its own when these are gone.
struct Link {
    journal: JournalWriter,
    processes: FollowedTree,
    /// While memory is being sent ahead: of the processes that have not been filled, the next last.
    fills: Vec<Fill>,
    /// The epoch that completes the fill has not been made.
    is_new: bool,
    /// A capture failed half way: what it took of the changes is in no epoch. Only an order to
    /// take over from the last epoch may follow; if the service lives after all, a new fill.
    spoiled_at_ns: Option<u64>,
}

/// A death that a capture ran into is heard of this soon.
const DEATH_PATIENCE_NS: u64 = 500_000_000;

pub struct Capture {
    announcements: Announcements,
    heard: Vec<Announcement>,
    pending: PendingObjectChanges,
    objects: Objects,
    delta: ObjectsDelta,
    link: Option<Link>,
    activity: Activity,
    description: Vec<u8>,
    service_core: usize,
    may_be_urgent: bool,
    verify: bool,
}

impl Capture {
    /// `outputs` are the read ends of the service's standard output and error.
    pub fn new(
        announcements: Announcements,
        outputs: &[Option<OwnedFd>; 2],
        config: &Config,
    ) -> Result<Capture, CaptureError> {
        let mut inodes = Vec::new();
        for (stream, output) in (1..).zip(outputs) {
            let Some(output) = output else { continue };
            let status = rustix::fs::fstat(output).map_err(io::Error::from)?;
            inodes.push((status.st_ino, stream));
        }
        Ok(Capture {
            announcements,
            heard: Vec::new(),
            pending: PendingObjectChanges::default(),
            objects: Objects::new(&inodes, config.spare_core)?,
            delta: ObjectsDelta::default(),
            link: None,
            activity: Activity::default(),
            description: Vec::new(),
            service_core: config.service_core,
            may_be_urgent: config.service_core != config.spare_core,
            verify: config.verify,
        })
    }

    /// Whether the thread that captures has a core that main does not need meanwhile.
    pub fn may_be_urgent(&self) -> bool {
        self.may_be_urgent
    }

    pub fn is_linked(&self) -> bool {
        self.link.is_some()
    }

    pub fn is_filling(&self) -> bool {
        self.link
            .as_ref()
            .is_some_and(|link| !link.fills.is_empty())
    }

    /// Lets the standby go, and with it the tracking of memory.
    pub fn unlink(&mut self) {
        self.link = None;
        self.announcements.set_recording(false);
    }

    /// Tells the standby to take over.
    pub fn hand_over(&mut self, cause: Cause) {
        self.send_last(&Record::TakeOver(cause));
    }

    /// Tells the standby that it is not to take over.
    pub fn retire(&mut self) {
        self.send_last(&Record::Retire);
        self.unlink();
    }

    fn send_last(&mut self, record: &Record) {
        self.description.clear();
        encode_into(record, &mut self.description);
        let Some(link) = &mut self.link else { return };
        match link.journal.reserve(self.description.len()) {
            Some(mut room) => {
                room[..self.description.len()].copy_from_slice(&self.description);
                room.publish_part(0, self.description.len());
            }
            // The standby is far behind; it acts when it sees this process gone.
            None => crate::log!("no room in the journal for {record:?}"),
        }
        let _ = link.journal.wake_reader();
    }

    /// Begins to fill the standby that reads `journal`: makes the service's memory tracked.
    pub fn begin_fill(
        &mut self,
        tree: &mut Tree,
        wire: &impl Wire,
        mut journal: JournalWriter,
    ) -> Result<(), CaptureError> {
        self.unlink();
        self.objects.prepare();
        let mut stopped = tree.stop()?;
        // Before anything is sent for nothing: is there something that no replica can have?
        let candidates = Candidate::all(&mut stopped)?;
        self.delta.clear();
        let sources = candidates.iter().map(Candidate::source);
        let sources = sources.collect::<Result<_, _>>()?;
        let closings = self.announcements.closings();
        let sockets = closings.hold_sockets();
        self.objects
            .survey(sources, &wire.sent(), closings, &mut self.delta)?;
        drop(sockets);
        self.announcements.set_recording(true);
        let listener = || WriteFaultListener::new(self.service_core, self.verify);
        let mut processes = FollowedTree::follow(&mut stopped, &candidates, listener)?;
        stopped.resume()?;
        let mut sending = Sending {
            journal: &mut journal,
            references: &mut processes.references,
            description: &mut self.description,
        };
        for candidate in &candidates {
            sending.publish_part(&Record::Birth(candidate.birth), &[])?;
        }
        self.link = Some(Link {
            journal,
            fills: processes.pids().map(Fill::new).collect(),
            processes,
            is_new: true,
            spoiled_at_ns: None,
        });
        Ok(())
    }

    /// Sends the next piece of a fill; true when what is left fits the capture that completes it.
    pub fn fill_on(&mut self, tree: &Tree) -> Result<bool, CaptureError> {
        let Some(link) = &mut self.link else {
            return Ok(false);
        };
        let Some(fill) = link.fills.last_mut() else {
            return Ok(false);
        };
        let process = tree.process(fill.pid).ok_or(CaptureError::ProcessGone)?;
        let (memory, references) = link.processes.memory(fill.pid)?;
        let mut sending = Sending {
            journal: &mut link.journal,
            references,
            description: &mut self.description,
        };
        if fill.send_some(memory, process, &mut sending)? {
            link.fills.pop();
        }
        Ok(link.fills.is_empty())
    }

    /// Makes one epoch, asked for at `requested_at_ns`: stops the service, reads what changed, lets it
    /// go on, and publishes.
    pub fn epoch(
        &mut self,
        tree: &mut Tree,
        wire: &impl Wire,
        requested_at_ns: u64,
    ) -> Result<Captured, CaptureError> {
        let Some(mut link) = self.link.take() else {
            return Err(CaptureError::ProcessGone);
        };
        let clock = StepClock::started_at(requested_at_ns);
        let result = match link.spoiled_at_ns {
            Some(since) if now_ns() - since < DEATH_PATIENCE_NS => Err(CaptureError::Waiting),
            Some(_) => Err(CaptureError::Interrupted),
            None => self.capture_and_publish(&mut link, tree, wire, clock),
        };
        if result.is_err() && link.spoiled_at_ns.is_none() {
            link.spoiled_at_ns = Some(now_ns());
        }
        link.is_new = false;
        self.link = Some(link);
        result
    }

    /// What is left to do when an epoch has been made and is known to be: nobody waits for it.
    pub fn settle(&mut self) {
        if let Some(link) = &mut self.link {
            let _ = link.journal.wake_reader();
            link.processes.prepare();
        }
    }

    fn capture_and_publish(
        &mut self,
        link: &mut Link,
        tree: &mut Tree,
        wire: &impl Wire,
        mut clock: StepClock,
    ) -> Result<Captured, CaptureError> {
        clock.done(EpochStep::Wake);
        let started_ns = clock.last_ns();
        let announcements = self.announcements.clone();
        let calls = announcements.hold_calls();
        let mut stopped = tree.stop()?;
        let was_working = stopped.was_working();
        let next_due_ns = stopped.next_due_ns();
        wire.stopped();
        clock.done(EpochStep::Stop);
        let Link {
            journal,
            processes: followed,
            is_new,
            ..
        } = link;
        let reading = self.read(journal, (followed, *is_new), &mut stopped, wire, &mut clock);
        drop(calls);
        // A process that is killed meanwhile goes on to its end under our eyes: what was read then
        // may be of one that is half gone, and so may be an error.
        if stopped.is_broken() {
            return Err(CaptureError::Killed);
        }
        let reading = reading?;
        stopped.resume()?;
        clock.done(EpochStep::Resume);
        wire.resumed(Pause {
            lasted_ns: clock.last_ns() - started_ns,
            was_working,
            next_due_ns,
        });
        let references = &mut followed.references;
        let pages = reading.processes.iter().map(page_count).sum();
        let (bulk_bytes, mut bulk) = ((pages * PAGE_SIZE) as usize, reading.bulk);
        let record = Record::Epoch {
            epoch: Box::new(self.complete(reading.epoch, reading.processes, references)?),
            connections: wire.take_connections(),
            released: references.take_released(),
        };
        self.description.clear();
        encode_into(&record, &mut self.description);
        clock.done(EpochStep::Encode);
        let epoch_bytes = bulk_bytes + self.description.len();
        if let Bulk::InJournal(room) = &mut bulk {
            fill::attach(room, &mut references.waiting)?;
        }
        let publication = match bulk {
            Bulk::InJournal(mut room)
                if room.len() >= epoch_bytes && references.waiting.is_empty() =>
            {
                room[bulk_bytes..epoch_bytes].copy_from_slice(&self.description);
                room.publish_epoch(bulk_bytes, self.description.len())
            }
            bulk => {
                let content = bulk.into_content(bulk_bytes);
                let sending = Sending {
                    journal,
                    references,
                    description: &mut self.description,
                };
                fill::publish_large(sending, record, &content)?
            }
        };
        clock.done(EpochStep::Commit);
        Ok(Captured {
            publication,
            change: std::mem::take(&mut self.delta.connections),
            pages,
            bytes: epoch_bytes as u64,
            clock,
        })
    }

    /// Adds what need not be done while the service stands.
    fn complete(
        &mut self,
        place: Place,
        processes: Vec<ProcessDelta>,
        references: &mut References,
    ) -> io::Result<Epoch> {
        self.objects.describe(&mut self.delta, references)?;
        references.take_processes(&processes);
        Ok(Epoch {
            term: place.number.term,
            sequence: place.number.sequence,
            mark: place.mark,
            processes,
            objects: std::mem::take(&mut self.delta.objects),
            interests: std::mem::take(&mut self.delta.interests),
            gone: std::mem::take(&mut self.delta.gone),
        })
    }

    /// Reads everything that belongs to the epoch of a stopped service.
    fn read<'link>(
        &mut self,
        journal: &'link mut JournalWriter,
        (followed, is_new): (&mut FollowedTree, bool),
        stopped: &mut Stopped<'_>,
        wire: &impl Wire,
        clock: &mut StepClock,
    ) -> Result<Reading<'link>, CaptureError> {
        let number = journal.next_epoch();
        self.announcements.take(&mut self.heard);
        followed.hear(stopped, &self.heard, is_new, &mut self.pending);
        let mut processes = followed.read(stopped, is_new, &mut self.pending, clock)?;
        let input_position = wire.wait_drained(&mut self.activity);
        clock.done(EpochStep::Drain);
        self.delta.clear();
        self.read_objects(followed, wire, clock)?;
        if self.delta.opens_memory() {
            followed.expect_writes_anywhere();
        }
        clock.done(EpochStep::Objects);
        for (pid, change) in self.delta.slots.drain(..) {
            let mut deltas = processes.iter_mut();
            if let Some(delta) = deltas.find(|delta| delta.pid == pid) {
                delta.descriptors.push(change);
            }
        }
        if self.verify {
            followed.verify(stopped)?;
            self.objects.verify()?;
        }
        let pages: u64 = processes.iter().map(page_count).sum();
        let bulk_bytes = (pages * PAGE_SIZE) as usize;
        let room_bytes = bulk_bytes + self.delta.description_bound() + (256 << 10);
        let mut bulk = match journal.reserve(room_bytes) {
            Some(room) => Bulk::InJournal(room),
            None => Bulk::Aside(vec![0; bulk_bytes]),
        };
        followed.read_pages(stopped, &processes, bulk.target(bulk_bytes))?;
        clock.done(EpochStep::Copy);
        let mark = Mark { input_position };
        Ok(Reading {
            epoch: Place { number, mark },
            processes,
            bulk,
        })
    }

    fn read_objects(
        &mut self,
        followed: &FollowedTree,
        wire: &impl Wire,
        clock: &mut StepClock,
    ) -> Result<(), CaptureError> {
        let closings = self.announcements.closings();
        let _sockets = closings.hold_sockets();
        let (pending, delta, sent) = (&self.pending, &mut self.delta, &wire.sent());
        if pending.everything {
            self.objects
                .survey(followed.sources()?, sent, closings, delta)
        } else {
            self.objects
                .update(pending, &self.activity, sent, closings, delta, clock)
        }
    }
}

/// What one stop gave.
struct Reading<'link> {
    epoch: Place,
    processes: Vec<ProcessDelta>,
    bulk: Bulk<'link>,
}

/// Where an epoch stands among the others and in the streams.
struct Place {
    number: EpochNumber,
    mark: Mark,
}

/// The content of the pages: where it will be read, or aside when the journal is too full.
enum Bulk<'link> {
    InJournal(JournalRoom<'link>),
    Aside(Vec<u8>),
}

impl Bulk<'_> {
    fn target(&mut self, length: usize) -> &mut [u8] {
        match self {
            Bulk::InJournal(room) => &mut room[..length],
            Bulk::Aside(content) => content,
        }
    }

    /// Gives the room in the journal back.
    fn into_content(self, length: usize) -> Vec<u8> {
        match self {
            Bulk::InJournal(room) => room[..length].to_vec(),
            Bulk::Aside(content) => content,
        }
    }
}

#[cfg(test)]
mod tests;
