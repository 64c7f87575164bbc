//! Connections that nobody asks about any more.

use super::Flows;
use super::connection::Phase;

/// Fewer entries than this are not worth going through.
pub(super) const TIDY_AT_LEAST: usize = 1024;

impl Flows {
    /// Forgets connections that closed, or half opened, long ago.
    pub(super) fn fade(&mut self, now_ns: u64) {
        while let Some((since_ns, tuple)) = self.fading.front().copied() {
            let due = now_ns.saturating_sub(since_ns) >= self.limits.fade_ns;
            if !due && self.fading.len() <= self.limits.fading {
                break;
            }
            self.fading.pop_front();
            let Some(flow) = self.flows.get_mut(&tuple) else {
                continue;
            };
            let half_open = Phase::Opening { since_ns };
            if flow
                .next
                .as_ref()
                .is_some_and(|next| next.phase == half_open)
            {
                flow.next = None;
            }
            let over = match flow.current.phase {
                Phase::Closed {
                    since_ns: closed_ns,
                    ..
                } => closed_ns == since_ns,
                // No epoch will say that it is gone while the service is unprotected.
                Phase::Standing => flow.current.is_over(),
                Phase::Waiting | Phase::Unkept => flow.current.accepted && flow.current.is_over(),
                phase @ Phase::Opening { .. } => phase == half_open,
            };
            if over && !flow.promote_next() {
                self.flows.remove(&tuple);
            }
        }
        self.tidy_waiting();
    }

    /// Drops entries of connections that do not wait any more, once they may be the greater part.
    fn tidy_waiting(&mut self) {
        if self.waiting.len() < self.tidy_at {
            return;
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|tuple| self.is_waiting(*tuple));
        self.tidy_at = (waiting.len() * 2).max(TIDY_AT_LEAST);
        self.waiting = waiting;
    }
}
