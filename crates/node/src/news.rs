//! What `run` says on standard error of a service's life, each thing once: protection begins, is
//! lost and why, comes back; a death, how, and how long the takeover took.
//!
//! Pure: what the status page says and the time in, lines out.

use crate::status_page::ServiceState;

/// Protection that is lost for less than this is not worth a line: each takeover begins so, and each
/// new standby.
const WORTH_A_LINE_NS: u64 = 2_000_000_000;

/// What can be seen of a service on its status page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    pub state: ServiceState,
    /// Why it is so.
    pub reason: String,
    pub takeovers: u64,
    pub last_takeover_us: u64,
    /// What the last takeover was for.
    pub last_takeover_cause: String,
}

pub struct News {
    name: String,
    address: String,
    takeovers: u64,
    was_protected: bool,
    /// Since when it is not protected; `None` while it is, and before it runs.
    unprotected_since_ns: Option<u64>,
    /// The reason that was told last while it is not protected.
    told: Option<String>,
    /// No standby is being filled: unless that changes, a line is due.
    is_waiting: bool,
}

impl News {
    pub fn new(name: &str, address: &str) -> News {
        News {
            name: name.to_owned(),
            address: address.to_owned(),
            takeovers: 0,
            was_protected: false,
            unprotected_since_ns: None,
            told: None,
            is_waiting: false,
        }
    }

    /// Lines about what has changed since the last look, oldest first, without the program's name.
    pub fn look(&mut self, sight: &Sight, now_ns: u64) -> Vec<String> {
        let mut lines = Vec::new();
        if sight.takeovers > self.takeovers {
            self.takeovers = sight.takeovers;
            lines.push(format!(
                "{}: {}; its replica went on after {:.1} ms",
                self.name,
                sight.last_takeover_cause,
                sight.last_takeover_us as f64 / 1e3
            ));
        }
        self.is_waiting = sight.state == ServiceState::Unprotected;
        match sight.state {
            ServiceState::Protected => self.protected(now_ns, &mut lines),
            state if state.is_exposed() => self.exposed(sight, now_ns, &mut lines),
            _ => {}
        }
        lines
    }

    /// When to look again although nothing changes on the status page.
    pub fn due_ns(&self) -> Option<u64> {
        let is_due = self.is_waiting && self.told.is_none();
        self.unprotected_since_ns
            .filter(|_| is_due)
            .map(|since_ns| since_ns + WORTH_A_LINE_NS)
    }

    /// Since when it has not been protected; `None` while it is, while a standby is being filled, and
    /// before it runs.
    pub fn waiting_since_ns(&self) -> Option<u64> {
        self.unprotected_since_ns.filter(|_| self.is_waiting)
    }

    fn protected(&mut self, now_ns: u64, lines: &mut Vec<String>) {
        let lasted_ns = self.unprotected_since_ns.take();
        let was_told = self.told.take().is_some();
        if !self.was_protected {
            self.was_protected = true;
            lines.push(format!("{} is protected at {}", self.name, self.address));
        } else if was_told {
            let lasted_ns = lasted_ns.map_or(0, |since_ns| now_ns.saturating_sub(since_ns));
            lines.push(format!(
                "{} is protected again, after {:.1} s",
                self.name,
                lasted_ns as f64 / 1e9
            ));
        }
    }

    fn exposed(&mut self, sight: &Sight, now_ns: u64, lines: &mut Vec<String>) {
        let since_ns = *self.unprotected_since_ns.get_or_insert(now_ns);
        let lasts = now_ns.saturating_sub(since_ns) >= WORTH_A_LINE_NS;
        // A standby is filled again and again in vain meanwhile, which is no news.
        if !self.is_waiting || !lasts || self.told.as_ref() == Some(&sight.reason) {
            return;
        }
        lines.push(format!("{} is not protected: {}", self.name, sight.reason));
        self.told = Some(sight.reason.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn sight(state: ServiceState, reason: &str, takeovers: u64) -> Sight {
        Sight {
            state,
            reason: reason.to_owned(),
            takeovers,
            last_takeover_us: 2345,
            last_takeover_cause: "killed by signal 9".to_owned(),
        }
    }

    #[test]
    fn a_life_is_told() {
        let mut news = News::new("chat", "10.0.0.2");
        let mut look = |state, reason, takeovers, at_s: u64| {
            news.look(&sight(state, reason, takeovers), at_s * SECOND_NS)
        };
        let nothing: [&str; 0] = [];
        assert_eq!(look(ServiceState::Starting, "", 0, 0), nothing);
        assert_eq!(look(ServiceState::Syncing, "", 0, 1), nothing);
        assert_eq!(
            look(ServiceState::Protected, "", 0, 4),
            ["chat is protected at 10.0.0.2"]
        );
        assert_eq!(look(ServiceState::Protected, "", 0, 5), nothing);
        assert_eq!(
            look(
                ServiceState::Unprotected,
                "a standby is being started",
                1,
                6
            ),
            ["chat: killed by signal 9; its replica went on after 2.3 ms"]
        );
        assert_eq!(
            look(ServiceState::Protected, "", 1, 7),
            nothing,
            "as expected"
        );
        let why = "it has an io_uring";
        assert_eq!(
            look(ServiceState::Unprotected, why, 1, 10),
            nothing,
            "may pass"
        );
        assert_eq!(
            look(ServiceState::Unprotected, why, 1, 12),
            ["chat is not protected: it has an io_uring"]
        );
        assert_eq!(look(ServiceState::Syncing, why, 1, 13), nothing);
        assert_eq!(
            look(ServiceState::Unprotected, why, 1, 14),
            nothing,
            "known"
        );
        assert_eq!(
            look(ServiceState::Unprotected, "it has forked", 1, 15),
            ["chat is not protected: it has forked"]
        );
        assert_eq!(
            look(ServiceState::Protected, "", 1, 16),
            ["chat is protected again, after 6.0 s"]
        );
    }

    #[test]
    fn what_lasts_is_looked_for() {
        let mut news = News::new("chat", "10.0.0.2");
        assert_eq!(news.due_ns(), None);
        news.look(&sight(ServiceState::Unprotected, "why", 0), 7);
        assert_eq!(news.due_ns(), Some(7 + WORTH_A_LINE_NS));
        let now_ns = 7 + WORTH_A_LINE_NS;
        assert_eq!(
            news.look(&sight(ServiceState::Unprotected, "why", 0), now_ns)
                .len(),
            1
        );
        assert_eq!(news.due_ns(), None);
        assert_eq!(news.waiting_since_ns(), Some(7));
        news.look(&sight(ServiceState::Syncing, "why", 0), now_ns);
        assert_eq!((news.due_ns(), news.waiting_since_ns()), (None, None));
    }
}
