//! The steps of an epoch, how long each takes, and what comes of them.

use crate::clock::now_ns;
use unbroken_core::epoch::Publication;
use unbroken_wire::flows::ConnectionChange;

/// What is done for one epoch, in this order. The service stands from `Stop` to `Resume`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum EpochStep {
    /// The thread that captures hears that an epoch is wanted.
    Wake,
    /// Every thread is brought to stand.
    Stop,
    /// Registers, signals, and what rarely changes of threads and processes.
    Registers,
    /// Which pages were written.
    Scan,
    /// What the service has said until the stop is read.
    Drain,
    /// Descriptors that calls have changed.
    Descriptors,
    /// Sockets, pipes and all else that changes without announcement.
    Objects,
    /// The content of the written pages.
    Copy,
    /// The service runs again.
    Resume,
    /// The description of the epoch is made.
    Encode,
    /// It is put where the standby has it.
    Commit,
    /// Its output goes out.
    Release,
}

/// How many steps there are.
pub const EPOCH_STEPS: usize = EpochStep::ALL.len();

impl EpochStep {
    pub const ALL: [EpochStep; 12] = [
        EpochStep::Wake,
        EpochStep::Stop,
        EpochStep::Registers,
        EpochStep::Scan,
        EpochStep::Drain,
        EpochStep::Descriptors,
        EpochStep::Objects,
        EpochStep::Copy,
        EpochStep::Resume,
        EpochStep::Encode,
        EpochStep::Commit,
        EpochStep::Release,
    ];

    /// As `status --json` names it.
    pub fn name(self) -> &'static str {
        match self {
            EpochStep::Wake => "wake",
            EpochStep::Stop => "stop",
            EpochStep::Registers => "registers",
            EpochStep::Scan => "scan",
            EpochStep::Drain => "drain",
            EpochStep::Descriptors => "descriptors",
            EpochStep::Objects => "objects",
            EpochStep::Copy => "copy",
            EpochStep::Resume => "resume",
            EpochStep::Encode => "encode",
            EpochStep::Commit => "commit",
            EpochStep::Release => "release",
        }
    }
}

/// A stopwatch: each step lasts from the end of the one before.
#[derive(Clone, Copy, Debug)]
pub struct StepClock {
    last_ns: u64,
    pub lasted_ns: [u64; EPOCH_STEPS],
}

impl StepClock {
    /// Started when the epoch was asked for.
    pub fn started_at(requested_at_ns: u64) -> StepClock {
        StepClock {
            last_ns: requested_at_ns,
            lasted_ns: [0; EPOCH_STEPS],
        }
    }

    /// Now `step` is done, or a part of it.
    pub fn done(&mut self, step: EpochStep) {
        let now = now_ns();
        self.lasted_ns[step as usize] += now.saturating_sub(self.last_ns);
        self.last_ns = now;
    }

    /// When the last step that is done was so.
    pub fn last_ns(&self) -> u64 {
        self.last_ns
    }
}

/// An epoch that was captured and published.
#[derive(Debug)]
pub struct Captured {
    pub publication: Publication,
    /// How it changed the connections that stand.
    pub change: ConnectionChange,
    pub pages: u64,
    pub bytes: u64,
    /// Up to its publication.
    pub clock: StepClock,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_numbered_in_their_order() {
        for (number, step) in EpochStep::ALL.into_iter().enumerate() {
            assert_eq!(step as usize, number);
        }
    }

    #[test]
    fn the_steps_fill_the_time() {
        let begun_ns = now_ns();
        let mut clock = StepClock::started_at(begun_ns);
        for step in [EpochStep::Stop, EpochStep::Copy, EpochStep::Stop] {
            clock.done(step);
        }
        let sum: u64 = clock.lasted_ns.iter().sum();
        assert_eq!(begun_ns + sum, clock.last_ns());
    }
}
