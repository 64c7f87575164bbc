//! The threads of one process in an epoch.

use super::CaptureError;
use super::signals::{Awaited, set_of};
use std::collections::HashMap;
use unbroken_image::{ThreadState, Tid};
use unbroken_tracee::{ProcessReading, ThreadReading};

/// What is remembered of a thread between captures.
#[derive(Default)]
struct Known {
    extended_state: Vec<u8>,
    /// The captures in which it was seen first and last.
    first: u64,
    seen: u64,
}

#[derive(Default)]
pub(super) struct Threads {
    known: HashMap<Tid, Known>,
    round: u64,
    ended: bool,
}

impl Threads {
    /// Forgets what was sent: everything goes with the next epoch.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    /// Whether the thread was not there at the capture before the last.
    pub fn is_new(&self, tid: Tid) -> bool {
        self.known
            .get(&tid)
            .is_none_or(|known| known.first == self.round)
    }

    /// Whether threads of the capture before the last were not there at the last.
    pub fn have_ended(&self) -> bool {
        self.ended
    }

    /// The states of all threads of a process. `awaited` is what signals will do to it.
    pub fn capture(
        &mut self,
        reading: &mut ProcessReading,
        awaited: Awaited,
        states: &mut Vec<ThreadState>,
    ) -> Result<(), CaptureError> {
        self.round += 1;
        let shared = set_of(&reading.shared_pending);
        for thread in &mut reading.threads {
            states.push(self.capture_one(thread, shared, awaited)?);
        }
        let (round, before) = (self.round, self.known.len());
        self.known.retain(|_, known| known.seen == round);
        self.ended = self.known.len() < before;
        Ok(())
    }

    fn capture_one(
        &mut self,
        thread: &mut ThreadReading,
        shared: u64,
        awaited: Awaited,
    ) -> Result<ThreadState, CaptureError> {
        let round = self.round;
        let known = self.known.entry(thread.tid).or_insert_with(|| Known {
            first: round,
            seen: round,
            ..Known::default()
        });
        known.seen = round;
        let extended_state = (known.extended_state != thread.extended_state).then(|| {
            known.extended_state.clone_from(&thread.extended_state);
            thread.extended_state.clone()
        });
        let arriving = (set_of(&thread.pending) | shared) & !thread.signal_mask;
        if arriving & awaited.fatal != 0 {
            return Err(CaptureError::Doomed);
        }
        let (registers, blocked_call) = thread.image_registers(arriving & awaited.handled != 0);
        Ok(ThreadState {
            tid: thread.tid,
            registers,
            extended_state,
            signal_mask: thread.signal_mask,
            pending: std::mem::take(&mut thread.pending),
            blocked_call,
            attributes: None,
        })
    }
}
