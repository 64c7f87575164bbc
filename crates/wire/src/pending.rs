//! Epochs under way: marked at the gate, and not yet committed.
//!
//! Each carries what is its own, so that any number of them can be on their way.

use crate::flows::{ConnectionChange, Flows, NamedConnection, TableChange};
use std::collections::VecDeque;
use unbroken_core::epoch::EpochNumber;

/// An epoch from its mark to its commit.
#[derive(Debug)]
pub(crate) struct PendingEpoch {
    pub number: EpochNumber,
    /// Input before this is in it.
    pub input_position: u64,
    /// Connections that were found to be accepted since the mark before.
    pub accepted: Vec<NamedConnection>,
    pub completes_fill: bool,
    /// What it changed, from its publication on.
    pub change: ConnectionChange,
}

impl PendingEpoch {
    /// Tells the flows of its commit.
    fn commit(self, flows: &mut Flows, now_ns: u64) {
        let ConnectionChange { stood, gone } = &self.change;
        let (accepted, input_position) = (&self.accepted, self.input_position);
        if self.completes_fill {
            return flows.commit_survey(stood, accepted, input_position, now_ns);
        }
        let change = TableChange {
            gone,
            stood,
            accepted,
            input_position,
        };
        flows.commit(change, now_ns);
    }
}

/// A queue of them, oldest first.
#[derive(Debug, Default)]
pub(crate) struct PendingEpochs {
    epochs: VecDeque<PendingEpoch>,
}

impl PendingEpochs {
    pub fn clear(&mut self) {
        self.epochs.clear();
    }

    pub fn mark(&mut self, epoch: PendingEpoch) {
        self.epochs.push_back(epoch);
    }

    /// The newest one is not made.
    pub fn unmark(&mut self) -> Option<PendingEpoch> {
        self.epochs.pop_back()
    }

    /// An epoch was published, and changed this; nothing of an epoch that is not under way.
    pub fn published(&mut self, number: EpochNumber, change: ConnectionChange) {
        if let Some(epoch) = self.epochs.iter_mut().find(|epoch| epoch.number == number) {
            epoch.change = change;
        }
    }

    /// An epoch is committed, and those before it with it.
    pub fn commit(&mut self, number: EpochNumber, flows: &mut Flows, now_ns: u64) {
        while self
            .epochs
            .front()
            .is_some_and(|epoch| epoch.number <= number)
            && let Some(epoch) = self.epochs.pop_front()
        {
            epoch.commit(flows, now_ns);
        }
    }
}
