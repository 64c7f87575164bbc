//! What the threads of a process share, as it was surveyed last: a mirror of the kernel's state, of
//! which only what may have changed is read again.

use super::CaptureError;
use super::announcements::PendingChanges;
use super::signals::Awaited;
use crate::clock::now_ns;
use unbroken_image::{Pid, ProcessState, SignalInfo};
use unbroken_tracee::{Stopped, TraceError};

#[derive(Default)]
pub(super) struct StateMirror {
    state: Option<ProcessState>,
    /// How long the reading of its timers took: their deadlines are late by no more.
    timers_took_ns: u64,
}

impl StateMirror {
    /// Surveys what may have changed; false when nothing may have. Before signals are read: one of a
    /// timer that fires meanwhile is then in an epoch twice rather than not at all.
    pub fn survey(
        &mut self,
        stopped: &mut Stopped<'_>,
        pid: Pid,
        pending: &PendingChanges,
        is_new: bool,
    ) -> Result<bool, CaptureError> {
        let began_ns = now_ns();
        let state = match &mut self.state {
            Some(state) if !(pending.everything || is_new) => state,
            state => {
                *state = Some(stopped.survey_process(pid)?);
                self.timers_took_ns = now_ns() - began_ns;
                return Ok(true);
            }
        };
        let actions = pending.signal_actions
            || stopped.signal_actions_are_stale(pid, &state.signal_actions)?;
        let latest_ns = began_ns + self.timers_took_ns;
        let timers = pending.timers || stopped.timers_are_stale(pid, state, latest_ns)?;
        if actions {
            stopped.survey_signal_actions(pid, &mut state.signal_actions)?;
        }
        if pending.settings {
            stopped.survey_settings(pid, state)?;
        }
        if timers {
            stopped.survey_timers(pid, state)?;
            self.timers_took_ns = now_ns() - began_ns;
        }
        Ok(actions || pending.settings || timers)
    }

    /// The state for an epoch with these signals pending for the process, if it is not that of the
    /// epoch before.
    pub fn changed(&mut self, surveyed: bool, pending: &[SignalInfo]) -> Option<ProcessState> {
        let state = self.state.as_mut()?;
        if !surveyed && state.shared_pending == pending {
            return None;
        }
        state.shared_pending.clear();
        state.shared_pending.extend_from_slice(pending);
        Some(state.clone())
    }

    /// What signals will do.
    pub fn awaited(&self) -> Awaited {
        let state = self.state.as_ref();
        state.map_or(Awaited::default(), |state| {
            Awaited::by(&state.signal_actions)
        })
    }

    /// I7: what is believed against what is.
    pub fn verify(&self, stopped: &mut Stopped<'_>, pid: Pid) -> Result<(), CaptureError> {
        let Some(believed) = &self.state else {
            return Ok(());
        };
        // Of one that is being killed the caller makes no epoch.
        if stopped.is_broken() {
            return Ok(());
        }
        let began_ns = now_ns();
        let found = match stopped.survey_process(pid) {
            // It ends, or has called vfork: nobody is there to ask.
            Err(TraceError::CannotRunCalls { .. }) => return Ok(()),
            found => found?,
        };
        let ended_ns = now_ns();
        let late_ns = self.timers_took_ns.max(ended_ns - began_ns);
        let are_same = |believed_ns: u64, found_ns: u64| {
            let has_fired = believed_ns <= ended_ns;
            let is_the_same = found_ns != 0 && believed_ns.abs_diff(found_ns) <= late_ns;
            believed_ns == found_ns || believed_ns != 0 && (has_fired || is_the_same)
        };
        let mut deadlines = deadlines(believed).zip(deadlines(&found));
        let is_true = without_what_moves(believed) == without_what_moves(&found)
            && deadlines.all(|(believed_ns, found_ns)| are_same(believed_ns, found_ns));
        if is_true {
            return Ok(());
        }
        Err(CaptureError::Mirror(format!(
            "the state of process {} is {found:?} and was taken for {believed:?}",
            pid.0
        )))
    }
}

/// Deadlines by `CLOCK_MONOTONIC`; 0 is none.
fn deadlines(state: &ProcessState) -> impl Iterator<Item = u64> {
    let posix = state.posix_timers.iter();
    let monotonic = posix.filter(|timer| timer.clock == libc::CLOCK_MONOTONIC);
    let real = state.interval_timers[0].expiry_ns;
    std::iter::once(real).chain(monotonic.map(|timer| timer.expiry_ns))
}

/// Without what changes by itself: timers, signals, and what directories are called, which
/// others may rename.
fn without_what_moves(state: &ProcessState) -> ProcessState {
    let mut state = state.clone();
    state.shared_pending.clear();
    state.working_directory.path.clear();
    state.root_directory.path.clear();
    // What others may write to files of /proc; what the service writes there is announced.
    (state.oom_score_adjust, state.coredump_filter) = Default::default();
    for timer in &mut state.interval_timers {
        timer.expiry_ns = 0;
    }
    for timer in &mut state.posix_timers {
        (timer.expiry_ns, timer.overrun) = (0, 0);
    }
    state
}
