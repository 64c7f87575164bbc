//! The threads of one process in an epoch.

use super::CaptureError;
use super::process::Awaited;
use std::collections::HashMap;
use unbroken_image::{SignalInfo, ThreadState, Tid};
use unbroken_tracee::{HostTid, Process, Stopped};

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
    buffer: Vec<u8>,
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

    /// The states of all threads of `process`; `shared` are the signals pending for the process,
    /// `awaited` what signals will do.
    pub fn capture(
        &mut self,
        stopped: &Stopped<'_>,
        process: &Process,
        shared: &[SignalInfo],
        awaited: Awaited,
        states: &mut Vec<ThreadState>,
    ) -> Result<(), CaptureError> {
        self.round += 1;
        for thread in process.threads() {
            let (tid, host_tid) = (thread.tid, thread.host_tid);
            let state = self.capture_one(stopped, tid, host_tid, shared, awaited)?;
            states.push(state);
        }
        let (round, before) = (self.round, self.known.len());
        self.known.retain(|_, known| known.seen == round);
        self.ended = self.known.len() < before;
        Ok(())
    }

    fn capture_one(
        &mut self,
        stopped: &Stopped<'_>,
        tid: Tid,
        host_tid: HostTid,
        shared: &[SignalInfo],
        awaited: Awaited,
    ) -> Result<ThreadState, CaptureError> {
        let signal_mask = stopped.signal_mask(host_tid)?;
        let mut pending = Vec::new();
        stopped.pending_signals(host_tid, &mut pending)?;
        stopped.extended_state(host_tid, &mut self.buffer)?;
        let round = self.round;
        let known = self.known.entry(tid).or_insert_with(|| Known {
            first: round,
            seen: round,
            ..Known::default()
        });
        known.seen = round;
        let extended_state = (known.extended_state != self.buffer).then(|| {
            known.extended_state.clone_from(&self.buffer);
            self.buffer.clone()
        });
        let waiting = pending
            .iter()
            .chain(shared)
            .fold(0, |set, info| set | bit_of(info));
        let arriving = waiting & !signal_mask;
        if arriving & awaited.fatal != 0 {
            return Err(CaptureError::Doomed);
        }
        let handler_runs = arriving & awaited.handled != 0;
        let (registers, blocked_call) = stopped.image_registers(host_tid, handler_runs)?;
        Ok(ThreadState {
            tid,
            registers,
            extended_state,
            signal_mask,
            pending,
            blocked_call,
            attributes: None,
        })
    }
}

/// The bit of a signal in a mask.
fn bit_of(info: &SignalInfo) -> u64 {
    match info.signal() {
        number @ 1..=64 => 1 << (number - 1),
        _ => 0,
    }
}
