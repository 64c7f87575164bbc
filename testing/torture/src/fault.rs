//! What is done to whom: drawn by lot, the same for the same seed and number.
//!
//! Only faults that docs/INVARIANTS.md promises to survive are drawn: any one death at any moment
//! while the service is protected; of two at once, those that leave one whole state behind (a
//! service and its primary, anyone and the front, anyone beside a process that is only stopped);
//! and while no standby stands, the death of one process of ours that has another beside it.

use std::fmt;
use std::time::Duration;

use unbroken_harness::{Random, Signal};

/// Whom a blow meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Victim {
    /// The first process of the service.
    Service,
    /// Pid 1 of the service's namespace.
    Init,
    Primary,
    Standby,
    /// `unbroken run`.
    Front,
}

/// How a process is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    Signal(Signal),
    /// The kernel kills it because memory is short.
    OutOfMemory,
}

/// One death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Death {
    pub victim: Victim,
    pub blow: Blow,
}

/// One fault, from its first blow to the last thing undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Death(Death),
    /// Two deaths, so close that the second meets the first's takeover or its beginning.
    Deaths(Death, Duration, Death),
    /// A death, and when somebody of ours is back in its place, but nothing is protected yet, the
    /// death of one of them.
    DeathThenExposed(Death, Duration, Victim),
    /// Stopped, and continued after a while.
    Pause(Victim, Duration),
    /// Stopped; meanwhile somebody else dies; continued.
    PauseAndDeath {
        stopped: Victim,
        before: Duration,
        death: Death,
        after: Duration,
    },
    /// No file in /run/unbroken or beside the service's own can grow for a while.
    FullDisk(Duration),
    /// The same, and somebody dies meanwhile.
    FullDiskAndDeath(Duration, Death, Duration),
    /// `unbroken switchover`.
    Switchover,
}

/// A fault and how long everything is left in peace before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    pub wait: Duration,
    pub fault: Fault,
}

impl Victim {
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Init => "init",
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::Front => "front",
        }
    }
}

impl fmt::Display for Death {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.blow {
            Blow::Signal(signal) => write!(out, "{} {signal}", self.victim.name()),
            Blow::OutOfMemory => write!(out, "{} out of memory", self.victim.name()),
        }
    }
}

impl Fault {
    /// What it is, without its durations: one line of the result's table.
    pub fn kind(&self) -> String {
        match self {
            Self::Death(death) => death.to_string(),
            Self::Deaths(first, _, second) => format!("{first} + {second}"),
            Self::DeathThenExposed(first, _, second) => {
                format!("{first}, then exposed {}", second.name())
            }
            Self::Pause(victim, _) => format!("{} paused", victim.name()),
            Self::PauseAndDeath { stopped, death, .. } => {
                format!("{} paused + {death}", stopped.name())
            }
            Self::FullDisk(_) => "full disk".into(),
            Self::FullDiskAndDeath(_, death, _) => format!("full disk + {death}"),
            Self::Switchover => "switchover".into(),
        }
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "after {:?}: {:?}", self.wait, self.fault)
    }
}

/// The fault of that number, of those whose name has `only` in it. `front` says whether the front
/// is there to be met: it dies at most once a service.
pub fn plan(seed: u64, number: u64, front: bool, only: &str) -> Planned {
    let mut lot = Lot(Random::from_seed(mix(seed, number)));
    let wait = match lot.below(4) {
        0 => Duration::ZERO,
        1 | 2 => lot.up_to_ms(60),
        _ => lot.up_to_ms(400),
    };
    let mut fault = lot.any(front);
    for _ in 0..DRAWS_MAX {
        if fault.kind().contains(only) {
            break;
        }
        fault = lot.any(front);
    }
    Planned { wait, fault }
}

/// Whether some fault has `only` in its name.
pub fn is_drawn(only: &str) -> bool {
    plan(0, 0, true, only).fault.kind().contains(only)
}

/// Distant seeds for neighbouring numbers.
pub fn mix(seed: u64, number: u64) -> u64 {
    Random::from_seed(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95)).draw()
}

/// The rarest kinds are one in a few thousand.
const DRAWS_MAX: usize = 100_000;

struct Lot(Random);

impl Lot {
    fn below(&mut self, count: u64) -> u64 {
        self.0.draw() % count
    }

    fn up_to_ms(&mut self, most_ms: u64) -> Duration {
        self.0
            .between(Duration::ZERO, Duration::from_millis(most_ms))
    }

    fn any(&mut self, front: bool) -> Fault {
        // Drawn in any case: a number's fault does not depend on what happened before, unless it
        // would meet a front that is gone.
        let meets_front = self.below(20) == 0;
        if front && meets_front {
            self.with_front()
        } else {
            self.fault()
        }
    }

    fn fault(&mut self) -> Fault {
        match self.below(100) {
            0..40 => Fault::Death(self.death(&[Victim::Service, Victim::Primary, Victim::Standby])),
            40..44 => Fault::Death(death(Victim::Init, Signal::SIGKILL)),
            44..58 => self.two_deaths(),
            58..70 => {
                let first = self.death(&[Victim::Service, Victim::Primary, Victim::Standby]);
                let after = self.up_to_ms(60);
                let second = [Victim::Primary, Victim::Standby][self.below(2) as usize];
                Fault::DeathThenExposed(first, after, second)
            }
            70..80 => {
                let victim = self.one_of(&[Victim::Primary, Victim::Standby]);
                Fault::Pause(victim, self.pause())
            }
            80..90 => self.pause_and_death(),
            90..93 => Fault::FullDisk(self.up_to_ms(300)),
            93..97 => {
                let death = self.death(&[Victim::Service, Victim::Primary, Victim::Standby]);
                Fault::FullDiskAndDeath(self.up_to_ms(50), death, self.up_to_ms(300))
            }
            _ => Fault::Switchover,
        }
    }

    fn with_front(&mut self) -> Fault {
        let front = death(Victim::Front, Signal::SIGKILL);
        match self.below(3) {
            0 => Fault::Death(front),
            1 => Fault::Pause(Victim::Front, self.pause()),
            _ => {
                let other = self.death(&[Victim::Service, Victim::Primary, Victim::Standby]);
                Fault::Deaths(front, self.gap(), other)
            }
        }
    }

    /// The service is lost with its primary anyway, so one state, the standby's, is left whole.
    fn two_deaths(&mut self) -> Fault {
        let killed = self.one_of(&[Victim::Service, Victim::Service, Victim::Init]);
        let pair = [
            death(killed, Signal::SIGKILL),
            death(Victim::Primary, Signal::SIGKILL),
        ];
        let gap = self.gap();
        match self.below(2) {
            0 => Fault::Deaths(pair[0], gap, pair[1]),
            _ => Fault::Deaths(pair[1], gap, pair[0]),
        }
    }

    /// A stopped process has lost nothing: whoever dies beside it, it goes on from there.
    fn pause_and_death(&mut self) -> Fault {
        let (stopped, dies) = match self.below(5) {
            0 | 1 => (Victim::Standby, Victim::Primary),
            2 => (Victim::Standby, Victim::Service),
            3 => (Victim::Primary, Victim::Service),
            _ => (Victim::Primary, Victim::Standby),
        };
        Fault::PauseAndDeath {
            stopped,
            before: self.gap(),
            death: death(dies, Signal::SIGKILL),
            after: self.up_to_ms(300),
        }
    }

    fn death(&mut self, victims: &[Victim]) -> Death {
        let victim = self.one_of(victims);
        let blow = match (victim, self.below(10)) {
            (_, 0) => Blow::OutOfMemory,
            (Victim::Service, 1 | 2) => Blow::Signal(Signal::SIGSEGV),
            (Victim::Service, 3) => Blow::Signal(Signal::SIGBUS),
            _ => Blow::Signal(Signal::SIGKILL),
        };
        Death { victim, blow }
    }

    fn one_of(&mut self, victims: &[Victim]) -> Victim {
        victims[self.below(victims.len() as u64) as usize]
    }

    /// Between two blows: none, within an epoch, or within a takeover.
    fn gap(&mut self) -> Duration {
        let most_us = [0, 300, 5_000][self.below(3) as usize];
        self.0
            .between(Duration::ZERO, Duration::from_micros(most_us))
    }

    fn pause(&mut self) -> Duration {
        let most_ms = [5, 100, 1_500][self.below(3) as usize];
        self.up_to_ms(most_ms)
    }
}

fn death(victim: Victim, signal: Signal) -> Death {
    let blow = Blow::Signal(signal);
    Death { victim, blow }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_and_a_number_give_one_fault() {
        for number in 0..500 {
            assert_eq!(plan(7, number, true, ""), plan(7, number, true, ""));
        }
        assert!((0..500).any(|number| plan(7, number, true, "") != plan(8, number, true, "")));
    }

    #[test]
    fn every_kind_is_drawn() {
        let kinds: BTreeSet<String> = (0..5000)
            .map(|number| plan(1, number, true, "").fault.kind())
            .collect();
        for kind in [
            "service SIGKILL",
            "service SIGSEGV",
            "service SIGBUS",
            "service out of memory",
            "primary out of memory",
            "standby SIGKILL",
            "init SIGKILL",
            "front SIGKILL",
            "service SIGKILL + primary SIGKILL",
            "primary paused + service SIGKILL",
            "full disk",
            "switchover",
        ] {
            assert!(kinds.contains(kind), "{kind} is not among {kinds:?}");
        }
    }

    #[test]
    fn a_part_of_a_name_is_enough_to_draw_it() {
        let kind = |number| plan(5, number, true, "standby paused").fault.kind();
        assert!((0..50).all(|number| kind(number).contains("standby paused")));
        assert!(!is_drawn("no such fault"));
    }

    #[test]
    fn without_a_front_none_is_met_and_all_else_is_the_same() {
        for number in 0..5000 {
            let with = plan(3, number, true, "");
            let without = plan(3, number, false, "");
            assert!(!without.fault.kind().contains("front"));
            assert!(with == without || with.fault.kind().contains("front"));
        }
    }
}
