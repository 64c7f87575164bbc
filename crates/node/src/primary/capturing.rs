//! When to capture, and the main thread's part of each capture.

use super::Primary;
use super::idleness::Idleness;
use super::mailbox::TracerReport;
use crate::clock::now_ns;
use crate::handshake::Step;
use crate::steps::{EpochStep, StepClock};
use std::collections::VecDeque;
use std::io;
use unbroken_core::epoch::EpochNumber;
use unbroken_core::pacing::{Pacing, PacingLimits};
use unbroken_core::role::{Event, RoleState};
use unbroken_link::Commits;
use unbroken_wire::exchange::Mark;
use unbroken_wire::flows::Activity;

pub(super) struct Capturing {
    pacing: Pacing,
    idleness: Idleness,
    /// The step of the capture that this thread has dealt with.
    seen: Step,
    /// The next capture completes the fill of a standby.
    sealing: bool,
    /// Where packets went: filled at each mark, and swapped for one that was used.
    activity: Activity,
    commits: Commits,
    /// What there is to show of each epoch that is published and not committed, oldest first.
    published: VecDeque<Published>,
}

struct Published {
    number: EpochNumber,
    pages: u64,
    bytes: u64,
    at_ns: u64,
    completes_fill: bool,
}

impl Capturing {
    pub fn new(spare_core: usize) -> Capturing {
        Capturing {
            pacing: Pacing::new(PacingLimits::default()),
            idleness: Idleness::new(spare_core),
            seen: Step::Idle,
            sealing: false,
            activity: Activity::default(),
            commits: Commits::default(),
            published: VecDeque::new(),
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

    /// The oldest epoch that was published, if it is `safe`.
    fn take_published(&mut self, safe: EpochNumber) -> Option<Published> {
        let oldest = self.published.front()?;
        (oldest.number <= safe).then(|| self.published.pop_front())?
    }

    /// Whatever fill was under way will not end.
    pub fn forget_fill(&mut self) {
        self.pacing.reset();
        self.sealing = false;
        self.commits = Commits::default();
        self.published.clear();
    }
}

impl Primary {
    fn captures_wanted(&self) -> bool {
        match self.role.state() {
            RoleState::Protected => true,
            RoleState::Syncing => self.capturing.sealing,
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
        self.mailbox.handshake.request(now);
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
        let (page, protected) = (&self.common.page, self.role.release_permit().is_some());
        self.traffic.send_released(|held_ns| {
            if protected {
                page.record_hold(held_ns);
            }
        })
    }

    /// Takes the next step of the capture under way, if the tracer has made one.
    pub(super) fn follow_capture(&mut self) -> io::Result<bool> {
        let step = self.mailbox.handshake.step();
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
        let activity = &mut self.capturing.activity;
        let mark = if self.capturing.sealing {
            let standby = self.standby.as_mut();
            let log = standby.and_then(|standby| standby.take_input_log());
            let mark = self.traffic.mark_fill(log, self.role.term(), activity);
            self.fill_is_marked(&mark)?;
            mark
        } else {
            self.traffic.mark(activity)
        };
        self.mailbox.swap_activity(&mut self.capturing.activity);
        self.mailbox.leave_connections(mark.connections);
        self.capturing.seen = Step::Drained;
        self.mailbox.handshake.drained(mark.input_position);
        Ok(())
    }

    /// From this mark on input is logged and output is held.
    fn fill_is_marked(&mut self, mark: &Mark) -> io::Result<()> {
        self.apply(Event::FillMarked)?;
        self.expect_warmth();
        if !mark.is_logged {
            // The tracer still makes its epoch; nobody shall stand on it.
            self.mailbox.report(TracerReport::Broken(
                "what clients said before cannot be logged: connections that are not accepted \
                 yet have sent too much"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn resumed(&mut self) {
        let pause = self.mailbox.handshake.pause_ns();
        self.capturing.seen = Step::Resumed;
        let was_working = self.mailbox.handshake.was_working();
        let pacing = &mut self.capturing.pacing;
        pacing.resumed(now_ns(), pause, was_working);
        pacing.stop_is_due(self.mailbox.handshake.stop_due_ns());
        self.capturing.idleness.paused(pause);
        if !self.capturing.sealing {
            self.common.page.record_pause(pause);
        }
    }

    fn published(&mut self) -> io::Result<()> {
        let Some(captured) = self.mailbox.take_captured() else {
            return self.capture_failed();
        };
        if self.capturing.seen != Step::Resumed {
            // The tracer was done before this thread looked again.
            self.resumed();
        }
        self.capturing.seen = Step::Idle;
        self.mailbox.handshake.finish();
        let completes_fill = std::mem::take(&mut self.capturing.sealing);
        if !completes_fill {
            self.record_steps(&captured.clock);
        }
        let number = captured.publication.epoch();
        self.traffic.published(number, captured.change);
        self.capturing.commits.published(captured.publication);
        self.capturing.published.push_back(Published {
            number,
            pages: captured.pages,
            bytes: captured.bytes,
            at_ns: captured.clock.last_ns(),
            completes_fill,
        });
        Ok(())
    }

    /// Lets the output of epochs go that have become safe; true when there was one.
    pub(super) fn take_commits(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some(committed) = self.capturing.commits.next_commit() {
            any = true;
            let safe = committed.epoch();
            self.traffic.commit(committed);
            while let Some(epoch) = self.capturing.take_published(safe) {
                self.committed(&epoch)?;
            }
        }
        Ok(any)
    }

    fn committed(&mut self, epoch: &Published) -> io::Result<()> {
        let now = now_ns();
        self.capturing.pacing.committed();
        // The output of one that completes a fill goes when the standby stands.
        if !epoch.completes_fill {
            if !self.release_committed()? {
                return Ok(());
            }
            self.send_released()?;
            let lasted_ns = now_ns().saturating_sub(epoch.at_ns);
            self.common.page.record_step(EpochStep::Release, lasted_ns);
        }
        let sequence = epoch.number.sequence;
        self.common
            .page
            .record_epoch(sequence, epoch.pages, epoch.bytes, now);
        self.hand_over_if_asked()
    }

    /// Lets out what is committed, if this node may; false when that was refused, and the standby
    /// is being replaced.
    pub(super) fn release_committed(&mut self) -> io::Result<bool> {
        match self.traffic.release(&self.role) {
            Ok(()) => Ok(true),
            Err(error) => {
                crate::log!("{error}");
                self.replace_standby()?;
                Ok(false)
            }
        }
    }

    fn record_steps(&self, clock: &StepClock) {
        for (step, lasted_ns) in EpochStep::ALL.into_iter().zip(clock.lasted_ns) {
            if step != EpochStep::Release {
                self.common.page.record_step(step, lasted_ns);
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
        self.mailbox.handshake.finish();
        self.capturing.pacing.abandoned(now_ns());
        Ok(())
    }
}
