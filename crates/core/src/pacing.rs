//! When the next epoch starts: a closed loop around output that waits, so that load makes epochs
//! larger and not the queue longer.

/// What pacing keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacingLimits {
    /// The share of its working time that the service may spend stopped, in thousandths; 1 to
    /// 1000. A pause that finds it waiting takes nothing from it and does not count.
    pub paused_permille: u32,
    /// However long a pause was, the next epoch waits no longer than this for its sake. A pause that
    /// is far from what epochs cost is the machine's doing (a primary that was stopped, a virtual
    /// machine that stood still); an epoch that waits four times as long makes it worse, for output
    /// waits with it, and a standby that is almost filled does.
    pub rest_max_ns: u64,
    /// State that changed without giving output is in an epoch this soon.
    pub dirty_interval_ns: u64,
    /// How many epochs may be started and not yet committed.
    pub under_way: u32,
}

impl Default for PacingLimits {
    fn default() -> Self {
        Self {
            paused_permille: 200,
            rest_max_ns: 250_000_000,
            dirty_interval_ns: 20_000_000,
            under_way: 1,
        }
    }
}

/// The loop's state. Every method takes the time at which the event happened, in nanoseconds of
/// one monotonic clock; an idle service needs no call at all.
#[derive(Clone, Copy, Debug)]
pub struct Pacing {
    limits: PacingLimits,
    /// Since when output waits that no started epoch covers.
    waiting_since_ns: Option<u64>,
    /// Since when state has changed that no started epoch covers.
    dirty_since_ns: Option<u64>,
    /// When something of the service ends only by a stop.
    stop_due_ns: Option<u64>,
    under_way: u32,
    stopped: bool,
    /// Before this the budget allows no further pause of a service that works.
    earliest_ns: u64,
    /// The next epoch need not wait for the budget: the service waits.
    early: bool,
    /// The last epoch did not wait for the budget, and met the service in its work after all.
    in_debt: bool,
}

impl Pacing {
    pub fn new(limits: PacingLimits) -> Self {
        let paused_permille = limits.paused_permille.clamp(1, 1000);
        let under_way = limits.under_way.max(1);
        Self {
            limits: PacingLimits {
                paused_permille,
                under_way,
                ..limits
            },
            waiting_since_ns: None,
            dirty_since_ns: None,
            stop_due_ns: None,
            under_way: 0,
            stopped: false,
            earliest_ns: 0,
            early: false,
            in_debt: false,
        }
    }

    /// The gate holds output that was read after the last epoch's mark.
    pub fn output_waits(&mut self, now_ns: u64) {
        self.waiting_since_ns.get_or_insert(now_ns);
    }

    /// The service was given input, or changed for another reason that was noticed.
    pub fn input_arrived(&mut self, now_ns: u64) {
        self.dirty_since_ns.get_or_insert(now_ns);
    }

    /// At `due_ns` the service is to be stopped whatever else happens; not any more when `None`.
    pub fn stop_is_due(&mut self, due_ns: Option<u64>) {
        self.stop_due_ns = due_ns;
    }

    /// The service is being stopped; output and changes so far will be in this epoch.
    pub fn epoch_started(&mut self, now_ns: u64) {
        self.waiting_since_ns = None;
        self.dirty_since_ns = None;
        self.stop_due_ns = None;
        self.early = false;
        self.in_debt = self.earliest_ns > now_ns;
        self.under_way += 1;
        self.stopped = true;
    }

    /// The service runs again after `pause_ns`. `was_working`: it was stopped in its work, and not
    /// while all of it waited for something.
    pub fn resumed(&mut self, now_ns: u64, pause_ns: u64, was_working: bool) {
        self.stopped = false;
        if !was_working {
            self.earliest_ns = now_ns;
            self.in_debt = false;
            return;
        }
        let share = u128::from(self.limits.paused_permille);
        let rest_ns = (u128::from(pause_ns) * (1000 - share)).div_ceil(share);
        let rest_ns = u64::try_from(rest_ns).unwrap_or(u64::MAX);
        // What was left of the last rest when this pause began is still to be had.
        let rested_ns = self.earliest_ns.saturating_add(pause_ns).max(now_ns);
        let longest_ns = now_ns.saturating_add(self.limits.rest_max_ns);
        self.earliest_ns = rested_ns.saturating_add(rest_ns).min(longest_ns);
    }

    /// Whether it would be good to know that the service waits: output does, and nothing but the
    /// budget is in the way. Not after an epoch that was started for that and was wrong.
    pub fn asks_whether_it_waits(&self, now_ns: u64) -> bool {
        let may_start = !self.stopped && self.under_way < self.limits.under_way;
        may_start && self.waiting_since_ns.is_some() && self.earliest_ns > now_ns && !self.in_debt
    }

    /// All of the service was seen waiting: a pause takes nothing from it.
    pub fn seen_waiting(&mut self) {
        self.early = !self.in_debt;
    }

    /// The oldest epoch under way is safe.
    pub fn committed(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }

    /// The newest epoch under way came to nothing: what it was to cover waits again.
    pub fn abandoned(&mut self, now_ns: u64) {
        self.under_way = self.under_way.saturating_sub(1);
        self.output_waits(now_ns);
    }

    /// No epoch will ever commit again (the standby is gone): nothing waits any more.
    pub fn reset(&mut self) {
        *self = Self {
            earliest_ns: self.earliest_ns,
            ..Self::new(self.limits)
        };
    }

    /// When to start the next epoch: a time that may lie in the past (start now), or `None` while
    /// nothing asks for one or another event has to come first.
    pub fn next_start(&self) -> Option<u64> {
        if self.stopped || self.under_way >= self.limits.under_way {
            return None;
        }
        let for_state = self
            .dirty_since_ns
            .map(|since_ns| since_ns.saturating_add(self.limits.dirty_interval_ns));
        let reasons = [self.waiting_since_ns, for_state, self.stop_due_ns];
        let wanted_ns = reasons.into_iter().flatten().min()?;
        match self.early {
            true => Some(wanted_ns),
            false => Some(wanted_ns.max(self.earliest_ns)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLISECOND_NS: u64 = 1_000_000;

    #[test]
    fn an_idle_service_gets_no_epoch() {
        let mut pacing = Pacing::new(PacingLimits::default());
        assert_eq!(pacing.next_start(), None);
        pacing.output_waits(5);
        pacing.epoch_started(5);
        pacing.resumed(60, 50, true);
        pacing.committed();
        assert_eq!(pacing.next_start(), None);
    }

    #[test]
    fn output_starts_an_epoch_at_once_and_state_alone_a_little_later() {
        let mut pacing = Pacing::new(PacingLimits::default());
        pacing.input_arrived(100);
        assert_eq!(pacing.next_start(), Some(100 + 20 * MILLISECOND_NS));
        pacing.output_waits(200);
        assert_eq!(pacing.next_start(), Some(200));
    }

    #[test]
    fn a_stop_that_is_due_comes_once() {
        let mut pacing = Pacing::new(PacingLimits::default());
        pacing.stop_is_due(Some(500));
        assert_eq!(pacing.next_start(), Some(500));
        pacing.output_waits(200);
        assert_eq!(pacing.next_start(), Some(200));
        pacing.epoch_started(500);
        pacing.resumed(510, 10, false);
        pacing.committed();
        assert_eq!(pacing.next_start(), None);
    }

    #[test]
    fn the_next_epoch_waits_for_the_commit_and_for_the_budget() {
        let mut pacing = Pacing::new(PacingLimits::default());
        pacing.epoch_started(1000);
        pacing.resumed(1050, 50, true);
        pacing.output_waits(1060);
        assert_eq!(pacing.next_start(), None);
        pacing.committed();
        assert_eq!(pacing.next_start(), Some(1050 + 200));
    }

    #[test]
    fn a_pause_that_took_nothing_from_the_service_is_free() {
        let mut pacing = Pacing::new(PacingLimits::default());
        pacing.epoch_started(1000);
        pacing.resumed(1050, 50, false);
        pacing.output_waits(1060);
        pacing.committed();
        assert_eq!(pacing.next_start(), Some(1060));
    }

    #[test]
    fn a_service_that_waits_is_stopped_at_once() {
        let mut pacing = Pacing::new(PacingLimits::default());
        pacing.epoch_started(1000);
        pacing.resumed(1050, 50, true);
        pacing.committed();
        assert!(!pacing.asks_whether_it_waits(1065), "no output, no hurry");
        pacing.output_waits(1070);
        assert!(pacing.asks_whether_it_waits(1075));
        pacing.seen_waiting();
        assert_eq!(pacing.next_start(), Some(1070));
        pacing.epoch_started(1080);
        pacing.resumed(1130, 50, true);
        pacing.committed();
        pacing.output_waits(1140);
        assert!(!pacing.asks_whether_it_waits(1140), "it worked after all");
        assert_eq!(pacing.next_start(), Some(1250 + 50 + 200), "both rests");
    }

    #[test]
    fn a_pause_of_the_machines_making_is_not_made_longer() {
        let limits = PacingLimits::default();
        let mut pacing = Pacing::new(limits);
        let pause_ns = 20_000 * MILLISECOND_NS;
        pacing.epoch_started(0);
        pacing.resumed(pause_ns, pause_ns, true);
        pacing.committed();
        pacing.output_waits(pause_ns);
        assert_eq!(pacing.next_start(), Some(pause_ns + limits.rest_max_ns));
    }

    #[test]
    fn an_abandoned_epoch_is_asked_for_again() {
        let mut pacing = Pacing::new(PacingLimits::default());
        pacing.output_waits(10);
        pacing.epoch_started(10);
        pacing.resumed(20, 10, true);
        pacing.abandoned(20);
        assert_eq!(pacing.next_start(), Some(60));
        pacing.reset();
        assert_eq!(pacing.next_start(), None);
    }

    /// What happens next in a random run: time passes, and perhaps something arrives.
    #[derive(Clone, Copy, Debug)]
    struct Step {
        passes_ns: u64,
        output: bool,
        input: bool,
        pause_ns: u64,
        was_working: bool,
        seen_waiting: bool,
        commit_after_ns: u64,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        (
            0..200_000u64,
            any::<bool>(),
            any::<bool>(),
            1..2_000_000u64,
            any::<[bool; 2]>(),
            0..500_000u64,
        )
            .prop_map(
                |(
                    passes_ns,
                    output,
                    input,
                    pause_ns,
                    [was_working, seen_waiting],
                    commit_after_ns,
                )| {
                    Step {
                        passes_ns,
                        output,
                        input,
                        pause_ns,
                        was_working,
                        seen_waiting,
                        commit_after_ns,
                    }
                },
            )
    }

    proptest! {
        /// A driver that obeys `next_start` keeps to the budget, or pays back before it asks again
        /// whether the service waits; and it gives all output an epoch.
        #[test]
        fn the_budget_holds_and_waiting_output_always_gets_its_epoch(
            paused_permille in 1u32..=1000,
            steps in proptest::collection::vec(any_step(), 1..200),
        ) {
            let limits = PacingLimits {
                paused_permille,
                rest_max_ns: u64::MAX,
                ..PacingLimits::default()
            };
            let mut pacing = Pacing::new(limits);
            let (mut now_ns, mut paused_ns) = (0, 0u128);
            let mut first_start_ns = None;
            for step in steps {
                now_ns += step.passes_ns;
                if step.output {
                    pacing.output_waits(now_ns);
                }
                if step.input {
                    pacing.input_arrived(now_ns);
                }
                let early = step.seen_waiting && pacing.asks_whether_it_waits(now_ns);
                if early {
                    pacing.seen_waiting();
                }
                let start_ns = pacing.next_start();
                prop_assert_eq!(start_ns.is_some(), step.output || step.input);
                let Some(start_ns) = start_ns else { continue };
                prop_assert!(!early || start_ns <= now_ns);
                now_ns = now_ns.max(start_ns);
                let first_ns = *first_start_ns.get_or_insert(now_ns);
                let elapsed_ns = u128::from(now_ns - first_ns);
                let affordable_ns = elapsed_ns * u128::from(paused_permille);
                prop_assert!(early || paused_ns * 1000 <= affordable_ns);
                pacing.epoch_started(now_ns);
                prop_assert_eq!(pacing.next_start(), None);
                now_ns += step.pause_ns;
                match step.was_working {
                    true => paused_ns += u128::from(step.pause_ns),
                    // It waited: what it was paused before took nothing from what it does next.
                    false => (paused_ns, first_start_ns) = (0, Some(now_ns)),
                }
                pacing.resumed(now_ns, step.pause_ns, step.was_working);
                now_ns += step.commit_after_ns;
                pacing.committed();
            }
        }
    }
}
