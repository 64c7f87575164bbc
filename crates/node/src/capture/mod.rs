//! From a running service to epochs: the fill of a standby, and each capture after it.
//!
//! The tracer thread owns this. A fill sends memory in rounds while the service runs, until what
//! is left fits a pause; the capture that completes it reads everything else anew (a survey), so
//! it does not matter who held the service before. Each later capture reads what was announced,
//! what was written, and what is volatile.

mod announcements;
mod closed;
mod fill;
mod memory;
mod objects;
mod threads;

use crate::clock::now_ns;
use crate::config::Config;
use crate::primary::line::Line;
use crate::record::{Cause, Record};
use crate::stage::announcement::Announcement;
use crate::stage::notifier::Announcements;
use announcements::Due;
use fill::Fill;
use memory::Memory;
use objects::{Objects, ObjectsDelta};
use std::io;
use std::os::fd::OwnedFd;
use threads::Threads;
use unbroken_image::{
    Epoch, Mark, PAGE_SIZE, Pid, ProcessDelta, ProcessState, SignalInfo, encode_into,
};
use unbroken_objects::socket::SocketError;
use unbroken_objects::table::Source;
use unbroken_tracee::{HostPid, HostTid, Process, Stopped, TraceError, Tree};
use unbroken_wire::log::{JournalRoom, JournalWriter};

#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error(transparent)]
    Object(unbroken_objects::Error),
    #[error(transparent)]
    Socket(SocketError),
    #[error("the service's process ended during a capture")]
    ProcessGone,
    /// Only SIGKILL moves a thread out of a tracer's stop.
    #[error("the service was killed during a capture")]
    Killed,
    /// A signal that will kill it waits for it: a replica with that signal would only die again.
    #[error("a signal is about to kill the service")]
    Doomed,
    #[error("the service is about to be heard to die")]
    Waiting,
    #[error("a capture found the service about to die, and it did not")]
    Interrupted,
    #[error("it has {0} processes; one can be protected in this version")]
    Forked(usize),
    /// What the service has cannot be replicated; why.
    #[error("{0}")]
    Unfit(String),
    #[error("the standby has not taken its epochs for {0} s")]
    StandbyStuck(u64),
    #[error("the mirror differs from the kernel: {0}")]
    Mirror(String),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl CaptureError {
    /// Whether it means that the service, or a part of it, died meanwhile.
    pub fn is_death(&self) -> bool {
        match self {
            CaptureError::Trace(error) => error.is_death(),
            CaptureError::ProcessGone
            | CaptureError::Killed
            | CaptureError::Doomed
            | CaptureError::Waiting => true,
            CaptureError::Io(error) => error.raw_os_error() == Some(libc::ESRCH),
            _ => false,
        }
    }
}

impl From<unbroken_objects::Error> for CaptureError {
    fn from(error: unbroken_objects::Error) -> CaptureError {
        match error {
            unbroken_objects::Error::Refused { .. } => CaptureError::Unfit(error.to_string()),
            other => CaptureError::Object(other),
        }
    }
}

impl From<SocketError> for CaptureError {
    fn from(error: SocketError) -> CaptureError {
        match error {
            SocketError::Refused { .. } => CaptureError::Unfit(error.to_string()),
            other => CaptureError::Socket(other),
        }
    }
}

/// One process of the service while it is replicated.
struct Followed {
    pid: Pid,
    host_pid: HostPid,
    leader: HostTid,
    memory: Memory,
    threads: Threads,
    state: Option<ProcessState>,
    shared_pending: Vec<SignalInfo>,
}

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
    description: Vec<u8>,
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
            objects: Objects::new(&inodes)?,
            delta: ObjectsDelta::default(),
            followed: None,
            link: None,
            description: Vec::new(),
            verify: config.verify,
        })
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
        journal: JournalWriter,
    ) -> Result<(), CaptureError> {
        self.unlink();
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
            .survey(vec![source], closings, &mut self.delta)?;
        drop(sockets);
        self.announcements.set_recording(true);
        let memory = Memory::install(&mut stopped, leader)?;
        stopped.resume()?;
        self.followed = Some(Followed {
            pid,
            host_pid,
            leader,
            memory,
            threads: Threads::default(),
            state: None,
            shared_pending: Vec::new(),
        });
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
        let started_ns = now_ns();
        let mut stopped = tree.stop()?;
        if line.handshake.stopped() {
            line.wake_main();
        }
        let next = link.journal.next_epoch();
        let is_new = link.is_new;
        let reading = self.read(&mut link.journal, is_new, &mut stopped, line);
        // A process that is killed meanwhile goes on to its end under our eyes: what was read then
        // may be of one that is half gone, and so may be an error.
        if stopped.is_broken() {
            return Err(CaptureError::Killed);
        }
        let reading = reading?;
        stopped.resume()?;
        if line.handshake.resumed(now_ns() - started_ns) {
            line.wake_main();
        }
        let Reading {
            process,
            input_position,
            bulk,
        } = reading;
        let pages = page_count(&process);
        let epoch = Epoch {
            term: next.term,
            sequence: next.sequence,
            mark: Mark { input_position },
            processes: vec![process],
            objects: std::mem::take(&mut self.delta.objects),
            gone: std::mem::take(&mut self.delta.gone),
        };
        let record = Record::Epoch {
            epoch: Box::new(epoch),
            connections: line.take_connections(),
        };
        self.description.clear();
        encode_into(&record, &mut self.description);
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
        line.leave_change(std::mem::take(&mut self.delta.connections));
        line.leave_publication(publication);
        if line.handshake.published(pages, epoch_bytes as u64) {
            line.wake_main();
        }
        let _ = link.journal.wake_reader();
        Ok(())
    }

    /// Reads everything that belongs to the epoch of a stopped service.
    fn read<'journal>(
        &mut self,
        journal: &'journal mut JournalWriter,
        is_new: bool,
        stopped: &mut Stopped<'_>,
        line: &Line,
    ) -> Result<Reading<'journal>, CaptureError> {
        self.hear(is_new);
        let mut process = self.read_process(stopped, is_new)?;
        let input_position = line.handshake.wait_drained();
        self.delta.clear();
        self.read_objects()?;
        process
            .descriptors
            .extend(self.delta.slots.drain(..).map(|(_, change)| change));
        if self.verify {
            self.verify_mirror(stopped)?;
        }
        let bulk_bytes = (page_count(&process) * PAGE_SIZE) as usize;
        // The description is as long as what the sockets hold and little more.
        let room_bytes = bulk_bytes + description_bound(&self.delta) + (256 << 10);
        let mut bulk = match journal.reserve(room_bytes) {
            Some(room) => Bulk::InJournal(room),
            None => Bulk::Aside(vec![0; bulk_bytes]),
        };
        let followed = self.followed.as_ref().ok_or(CaptureError::ProcessGone)?;
        let memory_file = stopped.process(followed.pid)?.memory();
        let (tracker, pages) = (followed.memory.tracker(), &process.memory.pages);
        tracker.read_pages(memory_file, pages, bulk.target(bulk_bytes))?;
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
        self.due.everything = !complete || is_new;
        if let Some(followed) = &self.followed {
            self.due.take(followed.pid, &self.heard);
        }
    }

    fn read_process(
        &mut self,
        stopped: &mut Stopped<'_>,
        is_new: bool,
    ) -> Result<ProcessDelta, CaptureError> {
        let followed = self.followed.as_mut().ok_or(CaptureError::ProcessGone)?;
        if only_process(stopped)?.0 != followed.pid {
            return Err(CaptureError::ProcessGone);
        }
        if is_new {
            followed.threads.forget();
        }
        followed.read(stopped, &mut self.due, is_new)
    }

    fn read_objects(&mut self) -> Result<(), CaptureError> {
        let followed = self.followed.as_ref().ok_or(CaptureError::ProcessGone)?;
        let closings = self.announcements.closings();
        let _sockets = closings.hold_sockets();
        let (due, delta) = (&self.due, &mut self.delta);
        if due.everything {
            let source = Source::open(followed.pid, followed.host_pid.0)?;
            self.objects.survey(vec![source], closings, delta)
        } else {
            self.objects.update(&due.descriptors, closings, delta)
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

impl Followed {
    fn read(
        &mut self,
        stopped: &mut Stopped<'_>,
        due: &mut Due,
        is_new: bool,
    ) -> Result<ProcessDelta, CaptureError> {
        let mut shared_pending = std::mem::take(&mut self.shared_pending);
        shared_pending.clear();
        stopped.shared_pending_signals(self.leader, &mut shared_pending)?;
        let state = self.read_state(stopped, due, is_new, &shared_pending)?;
        let awaited = self
            .state
            .as_ref()
            .map_or(Awaited::default(), awaited_signals);
        let mut threads = Vec::new();
        let process = stopped.process(self.pid)?;
        self.threads
            .capture(stopped, process, &shared_pending, awaited, &mut threads)?;
        self.shared_pending = shared_pending;
        let memory = self
            .memory
            .capture(stopped.process(self.pid)?, due, is_new)?;
        let mut delta = ProcessDelta {
            pid: self.pid,
            parent: Pid(1),
            threads,
            memory,
            state,
            descriptors: Vec::new(),
        };
        self.read_attributes(stopped, due, is_new, &mut delta)?;
        Ok(delta)
    }

    fn read_state(
        &mut self,
        stopped: &mut Stopped<'_>,
        due: &Due,
        is_new: bool,
        shared_pending: &[SignalInfo],
    ) -> Result<Option<ProcessState>, CaptureError> {
        let pending_changed = self
            .state
            .as_ref()
            .is_none_or(|state| state.shared_pending != shared_pending);
        let has_timers = self.state.as_ref().is_some_and(ProcessState::has_timers);
        if !(due.process_state || due.everything || is_new || pending_changed || has_timers) {
            return Ok(None);
        }
        let mut state = stopped.survey_process(self.pid)?;
        state.shared_pending = shared_pending.to_vec();
        self.state = Some(state.clone());
        Ok(Some(state))
    }

    /// What belongs to threads and rarely changes: of all threads of a new link, of new threads,
    /// and of those that announced something.
    fn read_attributes(
        &mut self,
        stopped: &mut Stopped<'_>,
        due: &Due,
        is_new: bool,
        delta: &mut ProcessDelta,
    ) -> Result<(), CaptureError> {
        for index in 0..delta.threads.len() {
            let thread = &mut delta.threads[index];
            let Some(host_tid) = stopped.host_tid(thread.tid) else {
                continue;
            };
            let announced = due.threads.contains(&host_tid.0.cast_unsigned());
            if is_new || due.everything || announced || self.threads.is_new(thread.tid) {
                thread.attributes = Some(stopped.survey_thread(host_tid)?);
            }
        }
        if is_new || due.everything || due.process_state || delta.memory.mappings.is_some() {
            delta.memory.layout = Some(stopped.survey_memory_layout(self.pid)?);
        }
        Ok(())
    }
}

/// Signals by what they will do to the process.
#[derive(Clone, Copy, Debug, Default)]
struct Awaited {
    /// Run a handler of its own.
    handled: u64,
    /// End it.
    fatal: u64,
}

fn awaited_signals(state: &ProcessState) -> Awaited {
    let mut awaited = Awaited::default();
    for (number, action) in (1..).zip(&state.signal_actions) {
        match action.handler {
            // SIG_DFL
            0 if ends_a_process(number) => awaited.fatal |= 1 << (number - 1),
            // SIG_IGN
            0 | 1 => {}
            _ => awaited.handled |= 1 << (number - 1),
        }
    }
    awaited
}

/// Whether the default action of a signal is an end (signal(7)).
fn ends_a_process(signal: i32) -> bool {
    !matches!(
        signal,
        libc::SIGCHLD
            | libc::SIGCONT
            | libc::SIGURG
            | libc::SIGWINCH
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    )
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

/// Bytes that queues of sockets and pipes put into a description, at most.
fn description_bound(delta: &ObjectsDelta) -> usize {
    delta
        .objects
        .iter()
        .map(|(_, object)| object.content_bytes() + 512)
        .sum()
}
