//! One process of the service in an epoch: threads, memory, and what rarely changes.

use super::CaptureError;
use super::announcements::PendingChanges;
use super::candidate::Candidate;
use super::memory::Memory;
use super::references::References;
use super::state::StateMirror;
use super::threads::Threads;
use crate::steps::{EpochStep, StepClock};
use std::io;
use std::sync::Arc;
use unbroken_image::{Pid, ProcessDelta};
use unbroken_sys::fdinfo::ProcessDirectory;
use unbroken_tracee::{ProcessReading, Stopped};

/// One process of the service while it is replicated.
pub(super) struct Followed {
    pub candidate: Candidate,
    pub memory: Memory,
    pub threads: Threads,
    pub pending: PendingChanges,
    pub state: StateMirror,
    reading: ProcessReading,
}

impl Followed {
    pub fn new(candidate: Candidate, memory: Memory) -> Followed {
        Followed {
            candidate,
            memory,
            threads: Threads::default(),
            pending: PendingChanges::default(),
            state: StateMirror::default(),
            reading: ProcessReading::default(),
        }
    }

    pub fn pid(&self) -> Pid {
        self.candidate.birth.pid
    }

    /// What changed in it, without its descriptors and the content of its pages.
    pub fn read(
        &mut self,
        stopped: &mut Stopped<'_>,
        is_new: bool,
        references: &mut References,
        clock: &mut StepClock,
    ) -> Result<ProcessDelta, CaptureError> {
        let birth = self.candidate.birth;
        let surveyed = self
            .state
            .survey(stopped, birth.pid, &self.pending, is_new)?;
        stopped.read_process(birth.pid, &mut self.reading)?;
        let state = self.state.changed(surveyed, &self.reading.shared_pending);
        let awaited = self.state.awaited();
        let mut threads = Vec::new();
        self.threads
            .capture(&mut self.reading, awaited, &mut threads)?;
        clock.done(EpochStep::Registers);
        let process = stopped.process(birth.pid)?;
        let memory = self
            .memory
            .capture(process, &mut self.pending, is_new, references)?;
        clock.done(EpochStep::Scan);
        let mut delta = ProcessDelta {
            pid: birth.pid,
            parent: birth.parent,
            threads,
            memory,
            state,
            descriptors: Vec::new(),
        };
        self.read_attributes(stopped, is_new, &mut delta)?;
        self.refer(&delta, references)?;
        clock.done(EpochStep::Registers);
        Ok(delta)
    }

    /// Has references opened to its program and the directories that it stands in.
    fn refer(&self, delta: &ProcessDelta, references: &mut References) -> io::Result<()> {
        let link = |name| {
            move || {
                let process = ProcessDirectory::open(self.candidate.host_pid.0)?;
                process.linked(name).map(Arc::new)
            }
        };
        if let Some(layout) = &delta.memory.layout {
            references.need(layout.executable, link("exe"))?;
        }
        if let Some(state) = &delta.state {
            references.need(state.root_directory.identity, link("root"))?;
            references.need(state.working_directory.identity, link("cwd"))?;
        }
        Ok(())
    }

    /// What belongs to threads and rarely changes: of all threads of a new link, of new threads,
    /// of those that announced something, and of those whose alternate stack changes without a call.
    fn read_attributes(
        &mut self,
        stopped: &mut Stopped<'_>,
        is_new: bool,
        delta: &mut ProcessDelta,
    ) -> Result<(), CaptureError> {
        let pending = &self.pending;
        for (thread, read) in delta.threads.iter_mut().zip(&self.reading.threads) {
            let host_tid = read.host_tid;
            let announced =
                pending.all_threads || pending.threads.contains(&host_tid.0.cast_unsigned());
            let changes = stopped.thread(host_tid);
            let changes = changes.is_some_and(|(_, thread)| thread.changes_its_stack());
            if is_new
                || pending.everything
                || announced
                || changes
                || self.threads.is_new(thread.tid)
            {
                let attributes = stopped.survey_thread(host_tid)?;
                if attributes.scheduling.policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_DEADLINE
                {
                    let why = "one of its threads has a deadline (SCHED_DEADLINE)";
                    return Err(CaptureError::Unfit(why.to_owned()));
                }
                thread.attributes = Some(attributes);
            }
        }
        if is_new || pending.everything || pending.settings || delta.memory.mappings.is_some() {
            delta.memory.layout = Some(stopped.survey_memory_layout(self.pid())?);
        }
        Ok(())
    }
}
