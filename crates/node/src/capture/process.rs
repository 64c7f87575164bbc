//! One process of the service in an epoch: threads, memory, and what rarely changes.

use super::CaptureError;
use super::announcements::Due;
use super::memory::Memory;
use super::signals::Awaited;
use super::threads::Threads;
use crate::clock::now_ns;
use crate::steps::{EpochStep, StepClock};
use unbroken_image::{Pid, ProcessDelta, ProcessState};
use unbroken_tracee::{HostPid, ProcessReading, Stopped};

/// One process of the service while it is replicated.
pub(super) struct Followed {
    pub pid: Pid,
    pub host_pid: HostPid,
    pub memory: Memory,
    pub threads: Threads,
    state: Option<ProcessState>,
    /// How long the reading of its timers took.
    timers_took_ns: u64,
    reading: ProcessReading,
}

impl Followed {
    pub fn new(pid: Pid, host_pid: HostPid, memory: Memory) -> Followed {
        Followed {
            pid,
            host_pid,
            memory,
            threads: Threads::default(),
            state: None,
            timers_took_ns: 0,
            reading: ProcessReading::default(),
        }
    }

    /// What changed in it, without its descriptors and the content of its pages.
    pub fn read(
        &mut self,
        stopped: &mut Stopped<'_>,
        due: &mut Due,
        is_new: bool,
        clock: &mut StepClock,
    ) -> Result<ProcessDelta, CaptureError> {
        let surveyed = self.survey(stopped, due, is_new)?;
        stopped.read_process(self.pid, &mut self.reading)?;
        let state = self.changed_state(surveyed);
        let actions = self.state.as_ref().map(|state| &state.signal_actions[..]);
        let awaited = Awaited::by(actions.unwrap_or_default());
        let mut threads = Vec::new();
        self.threads
            .capture(&mut self.reading, awaited, &mut threads)?;
        due.threads_ended = self.threads.have_ended();
        clock.done(EpochStep::Registers);
        let memory = self
            .memory
            .capture(stopped.process(self.pid)?, due, is_new)?;
        clock.done(EpochStep::Scan);
        let mut delta = ProcessDelta {
            pid: self.pid,
            parent: Pid(1),
            threads,
            memory,
            state,
            descriptors: Vec::new(),
        };
        self.read_attributes(stopped, due, is_new, &mut delta)?;
        clock.done(EpochStep::Registers);
        Ok(delta)
    }

    /// Surveys what may have changed of the process's state; false when nothing may have. Before its
    /// signals are read: one of a timer that fires meanwhile is then in an epoch twice rather than
    /// not at all.
    fn survey(
        &mut self,
        stopped: &mut Stopped<'_>,
        due: &Due,
        is_new: bool,
    ) -> Result<bool, CaptureError> {
        let began_ns = now_ns();
        let state = match &mut self.state {
            Some(state) if !(due.everything || is_new) => state,
            state => {
                *state = Some(stopped.survey_process(self.pid)?);
                self.timers_took_ns = now_ns() - began_ns;
                return Ok(true);
            }
        };
        let actions = due.signal_actions
            || stopped.signal_actions_are_stale(self.pid, &state.signal_actions)?;
        let latest_ns = began_ns + self.timers_took_ns;
        let timers = due.timers || stopped.timers_are_stale(self.pid, state, latest_ns)?;
        if actions {
            stopped.survey_signal_actions(self.pid, &mut state.signal_actions)?;
        }
        if due.settings {
            stopped.survey_settings(self.pid, state)?;
        }
        if timers {
            stopped.survey_timers(self.pid, state)?;
            self.timers_took_ns = now_ns() - began_ns;
        }
        Ok(actions || due.settings || timers)
    }

    fn changed_state(&mut self, surveyed: bool) -> Option<ProcessState> {
        let (state, pending) = (self.state.as_mut()?, &self.reading.shared_pending);
        if !surveyed && state.shared_pending == *pending {
            return None;
        }
        state.shared_pending.clone_from(pending);
        Some(state.clone())
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
        for (thread, read) in delta.threads.iter_mut().zip(&self.reading.threads) {
            let host_tid = read.host_tid;
            let announced = due.all_threads || due.threads.contains(&host_tid.0.cast_unsigned());
            if is_new || due.everything || announced || self.threads.is_new(thread.tid) {
                let attributes = stopped.survey_thread(host_tid)?;
                if attributes.scheduling.policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_DEADLINE
                {
                    let why = "one of its threads has a deadline (SCHED_DEADLINE)";
                    return Err(CaptureError::Unfit(why.to_owned()));
                }
                thread.attributes = Some(attributes);
            }
        }
        if is_new || due.everything || due.settings || delta.memory.mappings.is_some() {
            delta.memory.layout = Some(stopped.survey_memory_layout(self.pid)?);
        }
        Ok(())
    }
}
