//! When to capture, and the main thread's part of each capture.

use super::Primary;
use super::idleness::Idleness;
use super::line::Report;
use crate::clock::now_ns;
use crate::handshake::Step;
use crate::steps::EpochStep;
use std::io;
use unbroken_core::epoch::Committed;
use unbroken_core::pacing::{Pacing, PacingLimits};
use unbroken_core::role::{Event, State};
use unbroken_wire::flows::NamedConnection;

pub(super) struct Capturing {
    pacing: Pacing,
    idleness: Idleness,
    /// The step of the capture that this thread has dealt with.
    seen: Step,
    /// The next capture completes the fill of a standby.
    sealing: bool,
    /// The epoch that completed the fill: its output goes when the standby stands.
    sealed: Option<Committed>,
    /// What went with the epoch under way ([`Flows::take_accepted`](unbroken_wire::flows::Flows)).
    accepted: Vec<NamedConnection>,
}

impl Capturing {
    pub fn new(spare_core: usize) -> Capturing {
        Capturing {
            pacing: Pacing::new(PacingLimits::default()),
            idleness: Idleness::new(spare_core),
            seen: Step::Idle,
            sealing: false,
            sealed: None,
            accepted: Vec::new(),
        }
    }

    pub fn seen(&self) -> Step {
        self.seen
    }

    /// When the next capture may start, or it is to be asked whether it may; if there is a reason.
    fn due_ns(&self) -> Option<u64> {
        if self.seen != Step::Idle {
            return None;
        }
        let start = self.pacing.next_start()?;
        let look = match self.pacing.asks_whether_it_waits(now_ns()) {
            true => self.idleness.next_look_ns(),
            false => None,
        };
        Some(look.map_or(start, |look| look.min(start)))
    }

    /// Looks whether the service, process `pid`, waits, if an epoch could then start.
    fn look_if_due(&mut self, pid: i32, now: u64) {
        let is_due = self.idleness.next_look_ns().is_some_and(|look| look <= now);
        if is_due && self.pacing.asks_whether_it_waits(now) && self.idleness.waits(pid, now) {
            self.pacing.seen_waiting();
        }
    }

    /// The next capture completes a fill, and is wanted now.
    pub fn seal_next(&mut self, now: u64) {
        self.sealing = true;
        self.pacing.output_waits(now);
    }

    pub fn want(&mut self, now: u64) {
        self.pacing.output_waits(now);
    }

    /// Whatever fill was under way will not end.
    pub fn forget_fill(&mut self) {
        self.pacing.reset();
        self.sealing = false;
        self.sealed = None;
    }

    pub fn take_sealed(&mut self) -> Option<Committed> {
        self.sealed.take()
    }
}

impl Primary {
    fn captures_wanted(&self) -> bool {
        match self.role.state() {
            State::Protected => true,
            State::Syncing => self.capturing.sealing,
            _ => false,
        }
    }

    /// When to look whether a capture is to start.
    pub(super) fn capture_due_ns(&self) -> Option<u64> {
        self.captures_wanted()
            .then(|| self.capturing.due_ns())
            .flatten()
    }

    pub(super) fn start_capture_if_due(&mut self) {
        if self.capturing.seen != Step::Idle || !self.captures_wanted() {
            return;
        }
        let now = now_ns();
        if self.traffic.output_waits() {
            self.capturing.pacing.output_waits(now);
        }
        self.capturing.look_if_due(self.host_pid, now);
        if self
            .capturing
            .pacing
            .next_start()
            .is_none_or(|start| start > now)
        {
            return;
        }
        self.capturing.pacing.epoch_started(now);
        self.capturing.seen = Step::Requested;
        self.line.handshake.request(now);
        self.bell.ring();
    }

    /// Carries packets and text both ways, as far as the capture under way allows.
    pub(super) fn carry(&mut self) -> io::Result<bool> {
        let mut busy = false;
        if !matches!(
            self.capturing.seen,
            Step::Requested | Step::Stopped | Step::Drained
        ) {
            let arrived = self.traffic.carry_input()?;
            if arrived {
                self.capturing.pacing.input_arrived(now_ns());
            }
            busy |= arrived;
        }
        busy |= self.traffic.collect_output(false)?;
        self.traffic.pass(&self.role);
        busy |= self.send_released()?;
        Ok(busy)
    }

    /// Sends what may go; true when there was any. How long a protected service's output waited is
    /// shown.
    pub(super) fn send_released(&mut self) -> io::Result<bool> {
        let (board, protected) = (&self.common.board, self.role.release_permit().is_some());
        self.traffic.send_released(|held_ns| {
            if protected {
                board.record_hold(held_ns);
            }
        })
    }

    /// Takes the next step of the capture under way, if the tracer has made one.
    pub(super) fn follow_capture(&mut self) -> io::Result<bool> {
        let step = self.line.handshake.step();
        if self.capturing.seen == Step::Idle || step == self.capturing.seen {
            return Ok(false);
        }
        match step {
            Step::Stopped => self.drain()?,
            Step::Resumed => self.resumed(),
            Step::Published => self.published()?,
            Step::Failed => self.capture_failed()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The service stands: what it has said is this epoch's.
    fn drain(&mut self) -> io::Result<()> {
        self.traffic.collect_output(true)?;
        self.traffic.pass(&self.role);
        let sealing = self.capturing.sealing;
        if sealing {
            self.seal()?;
        }
        self.traffic.mark();
        self.traffic.take_activity();
        let connections = self.traffic.take_connections(sealing);
        self.capturing.accepted.clone_from(&connections.accepted);
        self.line.leave_connections(connections);
        self.capturing.seen = Step::Drained;
        self.line.handshake.drained(self.traffic.input_position());
        Ok(())
    }

    /// From this mark on input is logged and output is held.
    fn seal(&mut self) -> io::Result<()> {
        let log = self
            .standby
            .as_mut()
            .and_then(|standby| standby.take_input_log());
        let began = log.is_some_and(|log| self.traffic.begin_log(log));
        self.traffic.restart_gate(self.role.term());
        self.apply(Event::FillMarked)?;
        self.expect_warmth();
        if !began {
            // The tracer still makes its epoch; nobody shall stand on it.
            self.line.report(Report::Broken(
                "what clients said before cannot be logged: connections that are not accepted \
                 yet have sent too much"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn resumed(&mut self) {
        let pause = self.line.handshake.pause_ns();
        self.capturing.seen = Step::Resumed;
        let was_working = self.line.handshake.was_working();
        let pacing = &mut self.capturing.pacing;
        pacing.resumed(now_ns(), pause, was_working);
        pacing.stop_is_due(self.line.handshake.stop_due_ns());
        self.capturing.idleness.paused(pause);
        if !self.capturing.sealing {
            self.common.board.record_pause(pause);
        }
    }

    fn published(&mut self) -> io::Result<()> {
        if self.capturing.seen != Step::Resumed {
            // The tracer was done before this thread looked again.
            self.resumed();
        }
        let now = now_ns();
        self.capturing.seen = Step::Idle;
        self.capturing.pacing.committed(now);
        let Some(publication) = self.line.take_publication() else {
            self.line.handshake.finish();
            return Ok(());
        };
        let (pages, bytes) = self.line.handshake.size();
        let position = self.line.handshake.input_position();
        let committed_at_ns = self.line.handshake.committed_at_ns();
        if !self.capturing.sealing {
            self.record_steps();
        }
        self.line.handshake.finish();
        let sequence = publication.epoch().sequence;
        let committed = publication.committed();
        let sealing = std::mem::take(&mut self.capturing.sealing);
        let change = self.line.take_change();
        self.traffic
            .commit(&change, &self.capturing.accepted, position, sealing);
        if sealing {
            self.capturing.sealed = Some(committed);
        } else if let Err(error) = self.traffic.release(&self.role, committed) {
            crate::log!("{error}");
            return self.replace_standby();
        } else {
            self.send_released()?;
            let lasted_ns = now_ns().saturating_sub(committed_at_ns);
            self.common.board.record_step(EpochStep::Release, lasted_ns);
        }
        self.common.board.record_epoch(sequence, pages, bytes, now);
        self.hand_over_if_asked()
    }

    fn record_steps(&self) {
        for step in EpochStep::ALL {
            if step != EpochStep::Release {
                let lasted_ns = self.line.handshake.step_ns(step);
                self.common.board.record_step(step, lasted_ns);
            }
        }
    }

    fn capture_failed(&mut self) -> io::Result<()> {
        let marked = matches!(self.capturing.seen, Step::Drained | Step::Resumed);
        if self.capturing.seen != Step::Resumed {
            self.capturing.pacing.resumed(now_ns(), 0, false);
        }
        self.capturing.seen = Step::Idle;
        if marked {
            self.traffic.unmark();
        }
        self.line.handshake.finish();
        self.capturing.pacing.abandoned(now_ns());
        Ok(())
    }
}
