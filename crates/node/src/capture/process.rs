//! One process of the service in an epoch: threads, memory, and what rarely changes.

use super::CaptureError;
use super::announcements::Due;
use super::candidate::Candidate;
use super::memory::Memory;
use super::threads::Threads;
use crate::steps::{EpochStep, StepClock};
use unbroken_image::{Pid, ProcessDelta, ProcessState, SignalInfo};
use unbroken_tracee::Stopped;

/// One process of the service while it is replicated.
pub(super) struct Followed {
    pub candidate: Candidate,
    pub memory: Memory,
    pub threads: Threads,
    pub due: Due,
    state: Option<ProcessState>,
    shared_pending: Vec<SignalInfo>,
}

impl Followed {
    pub fn new(candidate: Candidate, memory: Memory) -> Followed {
        Followed {
            candidate,
            memory,
            threads: Threads::default(),
            due: Due::default(),
            state: None,
            shared_pending: Vec::new(),
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
        clock: &mut StepClock,
    ) -> Result<ProcessDelta, CaptureError> {
        let Candidate { birth, leader, .. } = self.candidate;
        let mut shared_pending = std::mem::take(&mut self.shared_pending);
        shared_pending.clear();
        stopped.shared_pending_signals(leader, &mut shared_pending)?;
        let state = self.read_state(stopped, is_new, &shared_pending)?;
        let awaited = self
            .state
            .as_ref()
            .map_or(Awaited::default(), awaited_signals);
        let mut threads = Vec::new();
        let process = stopped.process(birth.pid)?;
        self.threads
            .capture(stopped, process, &shared_pending, awaited, &mut threads)?;
        self.shared_pending = shared_pending;
        clock.done(EpochStep::Registers);
        let memory = self
            .memory
            .capture(stopped.process(birth.pid)?, &mut self.due, is_new)?;
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
        clock.done(EpochStep::Registers);
        Ok(delta)
    }

    fn read_state(
        &mut self,
        stopped: &mut Stopped<'_>,
        is_new: bool,
        shared_pending: &[SignalInfo],
    ) -> Result<Option<ProcessState>, CaptureError> {
        let due = &self.due;
        let pending_changed = self
            .state
            .as_ref()
            .is_none_or(|state| state.shared_pending != shared_pending);
        let has_timers = self.state.as_ref().is_some_and(ProcessState::has_timers);
        if !(due.process_state || due.everything || is_new || pending_changed || has_timers) {
            return Ok(None);
        }
        let mut state = stopped.survey_process(self.pid())?;
        state.shared_pending = shared_pending.to_vec();
        self.state = Some(state.clone());
        Ok(Some(state))
    }

    /// What belongs to threads and rarely changes: of all threads of a new link, of new threads,
    /// and of those that announced something.
    fn read_attributes(
        &mut self,
        stopped: &mut Stopped<'_>,
        is_new: bool,
        delta: &mut ProcessDelta,
    ) -> Result<(), CaptureError> {
        let due = &self.due;
        for index in 0..delta.threads.len() {
            let thread = &mut delta.threads[index];
            let Some(host_tid) = stopped.host_tid(thread.tid) else {
                continue;
            };
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
        if is_new || due.everything || due.process_state || delta.memory.mappings.is_some() {
            delta.memory.layout = Some(stopped.survey_memory_layout(self.pid())?);
        }
        Ok(())
    }
}

/// Signals by what they will do to the process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Awaited {
    /// Run a handler of its own.
    pub handled: u64,
    /// End it.
    pub fatal: u64,
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
