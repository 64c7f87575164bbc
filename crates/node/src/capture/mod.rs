//! From a running service to epochs: the fill of a standby, and each capture after it.
//!
//! The tracer thread owns this. A fill sends memory in rounds while the service runs, until what
//! is left fits a pause; the capture that completes it reads everything else anew (a survey), so
//! it does not matter who held the service before. Each later capture reads what was announced,
//! what was written, and what is volatile.

mod announcements;
mod delta;
mod error;
mod fill;
mod hearing;
mod memory;
mod objects;
mod orphans;
mod process;
mod sockets;
mod threads;

use crate::clock::now_ns;
use crate::config::Config;
use crate::primary::line::Line;
use crate::stage::announcement::Announcement;
use crate::stage::notifier::Announcements;
use crate::steps::{Captured, EpochStep, StepClock};
use announcements::Due;
use delta::ObjectsDelta;
pub use error::CaptureError;
use fill::Fill;
use hearing::Hearing;
use memory::Memory;
use objects::Objects;
use process::Followed;
use std::io;
use std::os::fd::OwnedFd;
use unbroken_image::{Epoch, Mark, PAGE_SIZE, Pid, ProcessDelta, encode_into};
use unbroken_link::{Cause, JournalRoom, JournalWriter, Record};
use unbroken_objects::table::Source;
use unbroken_tracee::{HostPid, HostTid, Process, Stopped, Tree};
use unbroken_wire::flows::Activity;

/// The way to one standby.
struct Link {
    journal: JournalWriter,
    /// Set while memory is being sent ahead.
    fill: Option<Fill>,
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
    due: Due,
    objects: Objects,
    delta: ObjectsDelta,
    followed: Option<Followed>,
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
            due: Due::default(),
            objects: Objects::new(&inodes, config.spare_core)?,
            delta: ObjectsDelta::default(),
            followed: None,
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
        self.link.as_ref().is_some_and(|link| link.fill.is_some())
    }

    /// Lets the standby go, and with it the tracking of memory: a range has room for one tracker,
    /// and the next fill installs its own.
    pub fn unlink(&mut self) {
        self.link = None;
        self.followed = None;
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
        line: &Line,
        journal: JournalWriter,
    ) -> Result<(), CaptureError> {
        self.unlink();
        self.objects.prepare();
        let mut stopped = tree.stop()?;
        let (pid, host_pid, leader) = only_process(&stopped)?;
        // Before anything is sent for nothing: is there something that no replica can have?
        refuse_lost_relatives(stopped.process(pid)?)?;
        if !stopped.has_blob(leader) {
            stopped.install_blob(leader)?;
        }
        self.delta.clear();
        let source = Source::open(pid, host_pid.0)?;
        let closings = self.announcements.closings();
        let sockets = closings.hold_sockets();
        self.objects
            .survey(vec![source], &line.sent(), closings, &mut self.delta)?;
        drop(sockets);
        self.announcements.set_recording(true);
        let hearing = Hearing::new(self.service_core, self.verify);
        let memory = Memory::install(&mut stopped, leader, hearing)?;
        stopped.resume()?;
        self.followed = Some(Followed::new(pid, host_pid, leader, memory));
        self.link = Some(Link {
            journal,
            fill: Some(Fill::default()),
            is_new: true,
            spoiled_at_ns: None,
        });
        Ok(())
    }

    /// Sends the next piece of a fill; true when what is left fits the capture that completes it.
    pub fn fill_on(&mut self, tree: &Tree) -> Result<bool, CaptureError> {
        let (Some(link), Some(followed)) = (&mut self.link, &mut self.followed) else {
            return Ok(false);
        };
        let Some(fill) = &mut link.fill else {
            return Ok(false);
        };
        let process = tree
            .process(followed.pid)
            .ok_or(CaptureError::ProcessGone)?;
        let done = fill.send_some(
            followed.pid,
            &mut followed.memory,
            process,
            &mut link.journal,
            &mut self.description,
        )?;
        if done {
            link.fill = None;
        }
        Ok(done)
    }

    /// Makes one epoch: stops the service, reads what changed, lets it go on, and publishes.
    pub fn epoch(&mut self, tree: &mut Tree, line: &Line) -> Result<(), CaptureError> {
        let Some(mut link) = self.link.take() else {
            return Err(CaptureError::ProcessGone);
        };
        let result = match link.spoiled_at_ns {
            Some(since) if now_ns() - since < DEATH_PATIENCE_NS => Err(CaptureError::Waiting),
            Some(_) => Err(CaptureError::Interrupted),
            None => self.capture_and_publish(&mut link, tree, line),
        };
        if result.is_err() && link.spoiled_at_ns.is_none() {
            link.spoiled_at_ns = Some(now_ns());
        }
        link.is_new = false;
        self.link = Some(link);
        result
    }

    fn capture_and_publish(
        &mut self,
        link: &mut Link,
        tree: &mut Tree,
        line: &Line,
    ) -> Result<(), CaptureError> {
        let mut clock = StepClock::started_at(line.handshake.requested_at_ns());
        clock.done(EpochStep::Wake);
        let started_ns = clock.last_ns();
        let announcements = self.announcements.clone();
        let calls = announcements.hold_calls();
        let mut stopped = tree.stop()?;
        let was_working = stopped.was_working();
        let stop_due_ns = stopped.next_due_ns();
        if line.handshake.stopped() {
            line.wake_main();
        }
        clock.done(EpochStep::Stop);
        let next = link.journal.next_epoch();
        let is_new = link.is_new;
        let reading = self.read(&mut link.journal, is_new, &mut stopped, line, &mut clock);
        drop(calls);
        // A process that is killed meanwhile goes on to its end under our eyes: what was read then
        // may be of one that is half gone, and so may be an error.
        if stopped.is_broken() {
            return Err(CaptureError::Killed);
        }
        let reading = reading?;
        stopped.resume()?;
        clock.done(EpochStep::Resume);
        if line
            .handshake
            .resumed(clock.last_ns() - started_ns, was_working, stop_due_ns)
        {
            line.wake_main();
        }
        let Reading {
            process,
            input_position,
            bulk,
        } = reading;
        self.objects.describe(&mut self.delta);
        let pages = page_count(&process);
        let epoch = Epoch {
            term: next.term,
            sequence: next.sequence,
            mark: Mark { input_position },
            processes: vec![process],
            objects: std::mem::take(&mut self.delta.objects),
            interests: std::mem::take(&mut self.delta.interests),
            gone: std::mem::take(&mut self.delta.gone),
        };
        let record = Record::Epoch {
            epoch: Box::new(epoch),
            connections: line.take_connections(),
        };
        self.description.clear();
        encode_into(&record, &mut self.description);
        clock.done(EpochStep::Encode);
        let bulk_bytes = (pages * PAGE_SIZE) as usize;
        let epoch_bytes = bulk_bytes + self.description.len();
        let publication = match bulk {
            Bulk::InJournal(mut room) if room.len() >= epoch_bytes => {
                room[bulk_bytes..epoch_bytes].copy_from_slice(&self.description);
                room.publish_epoch(bulk_bytes, self.description.len())
            }
            bulk => {
                let content = bulk.into_content(bulk_bytes);
                fill::publish_large(&mut link.journal, record, &content, &mut self.description)?
            }
        };
        clock.done(EpochStep::Commit);
        line.leave_captured(Captured {
            publication,
            change: std::mem::take(&mut self.delta.connections),
            pages,
            bytes: epoch_bytes as u64,
            clock,
        });
        if line.handshake.published() {
            line.wake_main();
        }
        let _ = link.journal.wake_reader();
        if let Some(followed) = &mut self.followed {
            followed.memory.prepare();
        }
        Ok(())
    }

    /// Reads everything that belongs to the epoch of a stopped service.
    fn read<'journal>(
        &mut self,
        journal: &'journal mut JournalWriter,
        is_new: bool,
        stopped: &mut Stopped<'_>,
        line: &Line,
        clock: &mut StepClock,
    ) -> Result<Reading<'journal>, CaptureError> {
        self.hear(is_new);
        let mut process = self.read_process(stopped, is_new, clock)?;
        let input_position = line.handshake.wait_drained();
        line.swap_activity(&mut self.activity);
        clock.done(EpochStep::Drain);
        self.delta.clear();
        self.read_objects(line, clock)?;
        if self.delta.opens_memory()
            && let Some(followed) = &mut self.followed
        {
            followed.memory.expect_writes_anywhere();
        }
        clock.done(EpochStep::Objects);
        process
            .descriptors
            .extend(self.delta.slots.drain(..).map(|(_, change)| change));
        if self.verify {
            self.verify_mirror(stopped)?;
        }
        let bulk_bytes = (page_count(&process) * PAGE_SIZE) as usize;
        let room_bytes = bulk_bytes + self.delta.description_bound() + (256 << 10);
        let mut bulk = match journal.reserve(room_bytes) {
            Some(room) => Bulk::InJournal(room),
            None => Bulk::Aside(vec![0; bulk_bytes]),
        };
        let followed = self.followed.as_ref().ok_or(CaptureError::ProcessGone)?;
        let memory_file = stopped.process(followed.pid)?.memory();
        let (tracker, pages) = (followed.memory.tracker(), &process.memory.pages);
        tracker.read_pages(memory_file, pages, bulk.target(bulk_bytes))?;
        clock.done(EpochStep::Copy);
        Ok(Reading {
            process,
            input_position,
            bulk,
        })
    }

    /// Takes what was announced since the last epoch.
    fn hear(&mut self, is_new: bool) {
        self.due.clear();
        let complete = self.announcements.take(&mut self.heard);
        self.due.advice = !complete;
        self.due.everything = !complete || is_new;
        if let Some(followed) = &self.followed {
            self.due.take(followed.pid, &self.heard);
        }
    }

    fn read_process(
        &mut self,
        stopped: &mut Stopped<'_>,
        is_new: bool,
        clock: &mut StepClock,
    ) -> Result<ProcessDelta, CaptureError> {
        let followed = self.followed.as_mut().ok_or(CaptureError::ProcessGone)?;
        if only_process(stopped)?.0 != followed.pid {
            return Err(CaptureError::ProcessGone);
        }
        if is_new {
            followed.threads.forget();
        }
        followed.read(stopped, &mut self.due, is_new, clock)
    }

    fn read_objects(&mut self, line: &Line, clock: &mut StepClock) -> Result<(), CaptureError> {
        let followed = self.followed.as_ref().ok_or(CaptureError::ProcessGone)?;
        let closings = self.announcements.closings();
        let _sockets = closings.hold_sockets();
        let (due, delta) = (&self.due, &mut self.delta);
        if due.everything {
            let source = Source::open(followed.pid, followed.host_pid.0)?;
            let sent = line.sent();
            self.objects.survey(vec![source], &sent, closings, delta)
        } else {
            self.objects
                .update(due, &self.activity, &line.sent(), closings, delta, clock)
        }
    }

    /// I7: what we believe against what is.
    fn verify_mirror(&mut self, stopped: &Stopped<'_>) -> Result<(), CaptureError> {
        let followed = self.followed.as_ref().ok_or(CaptureError::ProcessGone)?;
        let process = stopped.process(followed.pid)?;
        let map = unbroken_tracee::memory_map::verify(process, followed.memory.map())?;
        if let Some(difference) = map {
            return Err(CaptureError::Mirror(difference));
        }
        self.objects.verify()
    }
}

/// What one stop gave.
struct Reading<'journal> {
    process: ProcessDelta,
    input_position: u64,
    bulk: Bulk<'journal>,
}

/// The content of the pages: where it will be read, or aside when the journal is too full.
enum Bulk<'journal> {
    InJournal(JournalRoom<'journal>),
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

fn page_count(process: &ProcessDelta) -> u64 {
    process.memory.pages.iter().map(|run| run.count).sum()
}

/// The service's one process: its number, its host number, and its leader.
fn only_process(stopped: &Stopped<'_>) -> Result<(Pid, HostPid, HostTid), CaptureError> {
    let mut processes = stopped.processes();
    let first = processes.next().ok_or(CaptureError::ProcessGone)?;
    let others = processes.count();
    if others > 0 {
        return Err(CaptureError::Forked(others + 1));
    }
    Ok((first.pid, first.host_pid, first.leader()))
}

/// Family that a replica cannot be given: it has no dead to wait for.
fn refuse_lost_relatives(process: &Process) -> Result<(), CaptureError> {
    if process.has_lost_its_leader() {
        let why = "its first thread has ended while others go on";
        return Err(CaptureError::Unfit(why.to_owned()));
    }
    match process.unreaped_children()? {
        0 => Ok(()),
        count => {
            let why = format!("{count} of its children have ended and it has not waited for them");
            Err(CaptureError::Unfit(why))
        }
    }
}

#[cfg(test)]
mod tests;
