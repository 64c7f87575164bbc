//! When to try again what failed: at once the first time, then after waits that double, so that a
//! lasting cause costs a little and not a core.

/// The wait before the second try in a row.
const FIRST_WAIT_NS: u64 = 10_000_000;
/// No wait is longer.
const LONGEST_WAIT_NS: u64 = 2_000_000_000;

const _: () = assert!(FIRST_WAIT_NS < LONGEST_WAIT_NS);

/// Counts tries that led to nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retry {
    tries: u32,
}

impl Retry {
    /// How long to wait before the try that is due now; counts it.
    pub fn next_wait_ns(&mut self) -> u64 {
        let tries = self.tries;
        self.tries = tries.saturating_add(1);
        match tries {
            0 => 0,
            tries => FIRST_WAIT_NS
                .saturating_mul(1 << (tries - 1).min(32))
                .min(LONGEST_WAIT_NS),
        }
    }

    /// A try led to what was wanted.
    pub fn succeeded(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_success_begins_anew() {
        let mut retry = Retry::default();
        let waits: Vec<u64> = (0..4).map(|_| retry.next_wait_ns() / 1_000_000).collect();
        assert_eq!(waits, [0, 10, 20, 40]);
        for _ in 0..100 {
            assert!(retry.next_wait_ns() <= LONGEST_WAIT_NS);
        }
        retry.succeeded();
        assert_eq!(retry.next_wait_ns(), 0);
    }
}
