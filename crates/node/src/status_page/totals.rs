//! Everything that the status page has counted, for whoever takes the difference of two moments.

use super::layout::Word;
use super::{StatusPage, histogram};
use crate::steps::EpochStep;

/// Sums and histograms since the service was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub epochs: u64,
    pub dirty_pages: u64,
    pub bytes: u64,
    /// `pause`, `hold`, then the steps of an epoch in their order. Of each the buckets that
    /// counted anything: their largest value in nanoseconds, and how many.
    pub times: Vec<(&'static str, Vec<(u64, u64)>)>,
}

impl StatusPage {
    pub fn totals(&self) -> Totals {
        let mut times = vec![
            ("pause", histogram::counts(self.pauses())),
            ("hold", histogram::counts(self.holds())),
        ];
        times.extend(EpochStep::ALL.map(|step| (step.name(), histogram::counts(self.step(step)))));
        Totals {
            epochs: self.get(Word::Epochs),
            dirty_pages: self.get(Word::DirtyPages),
            bytes: self.get(Word::Bytes),
            times,
        }
    }
}
