//! When another takeover would only die of the same input.

/// Whose fault the service's death is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not its own: SIGKILL, the out-of-memory killer, the death of a process of ours.
    External,
    /// Its own: SIGSEGV, SIGABRT and their like. The replica, which has the same state
    /// and gets the same input, may well do the same.
    Own,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GiveUpLimits {
    /// So many crashes in a row are too many.
    pub deaths: u32,
    /// A crash counts when it comes this soon after the service went live.
    pub soon_ns: u64,
}

impl Default for GiveUpLimits {
    fn default() -> Self {
        Self {
            deaths: 3,
            soon_ns: 5_000_000_000,
        }
    }
}

/// Counts crashes that follow a go-live at once. It is handed on from node to node, because each
/// takeover is another process: [`early_deaths`](Self::early_deaths) and
/// [`live_since_ns`](Self::live_since_ns) go into the next node's [`continued`](Self::continued).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GiveUp {
    limits: GiveUpLimits,
    early_deaths: u32,
    live_since_ns: u64,
}

impl GiveUp {
    /// For a service that is about to start.
    pub fn new(limits: GiveUpLimits) -> Self {
        Self::continued(limits, 0, 0)
    }

    /// For a standby of a service that went live at `live_since_ns`.
    pub fn continued(limits: GiveUpLimits, early_deaths: u32, live_since_ns: u64) -> Self {
        Self {
            limits,
            early_deaths,
            live_since_ns,
        }
    }

    pub fn live_since_ns(&self) -> u64 {
        self.live_since_ns
    }

    pub fn early_deaths(&self) -> u32 {
        self.early_deaths
    }

    pub fn went_live(&mut self, now_ns: u64) {
        self.live_since_ns = now_ns;
    }

    /// Counts a death; true when no further takeover should be tried.
    pub fn died(&mut self, fault: Fault, now_ns: u64) -> bool {
        let lived_ns = now_ns.saturating_sub(self.live_since_ns);
        match fault {
            Fault::External => {}
            Fault::Own if lived_ns <= self.limits.soon_ns => self.early_deaths += 1,
            // A crash after a good while: the first of a new row.
            Fault::Own => self.early_deaths = 1,
        }
        self.early_deaths >= self.limits.deaths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    #[test]
    fn three_crashes_each_soon_after_going_live_are_enough() {
        let mut give_up = GiveUp::new(GiveUpLimits::default());
        give_up.went_live(0);
        assert!(!give_up.died(Fault::Own, 100 * SECOND_NS));
        give_up.went_live(101 * SECOND_NS);
        assert!(!give_up.died(Fault::Own, 102 * SECOND_NS));
        let mut next = GiveUp::continued(
            GiveUpLimits::default(),
            give_up.early_deaths(),
            103 * SECOND_NS,
        );
        assert!(next.died(Fault::Own, 104 * SECOND_NS));
    }

    #[test]
    fn kills_from_outside_never_count() {
        let mut give_up = GiveUp::new(GiveUpLimits::default());
        for second in 0..100 {
            give_up.went_live(second * SECOND_NS);
            assert!(!give_up.died(Fault::External, second * SECOND_NS + 1));
        }
    }

    #[test]
    fn a_crash_after_a_good_while_starts_a_new_row() {
        let mut give_up = GiveUp::continued(GiveUpLimits::default(), 2, 0);
        assert!(!give_up.died(Fault::Own, 6 * SECOND_NS));
        assert_eq!(give_up.early_deaths(), 1);
    }
}
