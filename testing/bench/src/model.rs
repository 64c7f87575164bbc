//! What was measured: the numbers that report.json keeps and every drawing is made from.

use serde::{Deserialize, Serialize};

use crate::cores::Busy;

/// All that was measured, in pieces that can be measured anew one by one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Measured {
    pub sections: Vec<Section>,
    /// What `cargo xtask torture` wrote down last.
    #[serde(default)]
    pub torture: Option<Torture>,
}

/// A run of faults.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Torture {
    pub survived: u64,
    pub failed: u64,
    pub commit: String,
    pub at: String,
}

/// One workload or one question.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Section {
    /// The word of `--only`.
    pub name: String,
    pub title: String,
    /// What was done, for whoever reads the report.
    pub about: String,
    pub taken: Taken,
    pub comparisons: Vec<Comparison>,
    pub profiles: Vec<Profile>,
    pub sweeps: Vec<Sweep>,
    pub failovers: Vec<Failover>,
    pub histograms: Vec<Bars>,
    /// Single figures by name, for the table of targets.
    pub figures: Vec<Figure>,
    /// What else ran just before this was measured; such figures are not to be relied on.
    #[serde(default)]
    pub disturbed: Option<String>,
    pub notes: Vec<String>,
    /// What could not be measured, and why.
    pub failures: Vec<String>,
}

/// Where and when.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
pub struct Taken {
    pub at: String,
    pub commit: String,
    pub machine: String,
    /// Short runs are for the promises, not for figures.
    pub short: bool,
    pub seconds: f64,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    Higher,
    Lower,
}

/// The same thing unprotected and protected, in turn.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Comparison {
    /// What ran: "20 clients".
    pub case: String,
    /// What was measured: "delivered at saturation".
    pub measure: String,
    pub unit: String,
    pub better: Better,
    pub unprotected: Vec<f64>,
    pub protected: Vec<f64>,
    pub busy_unprotected: Busy,
    pub busy_protected: Busy,
}

/// Middle, least and most of a row of numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub middle: f64,
    pub least: f64,
    pub most: f64,
}

/// What a protected service counted in a window.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Profile {
    pub case: String,
    pub pause_us: Times,
    pub hold_us: Times,
    /// Steps of an epoch in the order in which they are done.
    pub steps_us: Vec<(String, Times)>,
    /// (upper edge in microseconds, share of all pauses).
    pub pause_bars: Vec<(f64, f64)>,
    /// As those, of how long output was held.
    pub hold_bars: Vec<(f64, f64)>,
    pub epochs_per_s: f64,
    pub dirty_pages_per_epoch: f64,
    pub bytes_per_epoch: f64,
    pub connections: u64,
    pub resident_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq)]
pub struct Times {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// How figures follow one quantity.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sweep {
    pub title: String,
    pub x: String,
    pub y: String,
    pub lines: Vec<Line>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// What clients saw around one kill.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failover {
    pub title: String,
    /// What the product measured from the death to the first packet.
    pub takeover_ms: Option<f64>,
    /// Until `status` said protected again.
    pub protected_again_ms: f64,
    /// Each client's arrivals, in milliseconds from the kill.
    pub clients: Vec<Vec<f64>>,
    /// Each client's longest silence around the kill.
    pub gaps_ms: Vec<f64>,
    pub usual_gap_ms: f64,
}

/// A histogram: what stands left of each bar's upper edge.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bars {
    pub title: String,
    pub x: String,
    pub sets: Vec<BarSet>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BarSet {
    pub name: String,
    /// (upper edge, share of all).
    pub bars: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    pub name: String,
    pub value: f64,
}

impl Comparison {
    /// Protected by unprotected, of each pair of runs.
    pub fn ratios(&self) -> Option<Spread> {
        let pairs = self.protected.iter().zip(&self.unprotected);
        let ratios: Vec<f64> = pairs.map(|(with, without)| with / without).collect();
        Spread::of(&ratios)
    }

    /// Protected less unprotected, of each pair of runs.
    pub fn differences(&self) -> Option<Spread> {
        let pairs = self.protected.iter().zip(&self.unprotected);
        let differences: Vec<f64> = pairs.map(|(with, without)| with - without).collect();
        Spread::of(&differences)
    }
}

impl Spread {
    pub fn of(numbers: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = numbers.iter().copied().filter(|n| n.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let middle = if sorted.len() % 2 == 1 {
            sorted[half]
        } else {
            f64::midpoint(sorted[half - 1], sorted[half])
        };
        Some(Self {
            middle,
            least,
            most,
        })
    }
}

impl Section {
    pub fn figure(&self, name: &str) -> Option<f64> {
        let found = self.figures.iter().find(|figure| figure.name == name);
        found.map(|figure| figure.value)
    }

    pub fn set_figure(&mut self, name: &str, value: f64) {
        self.figures.retain(|figure| figure.name != name);
        self.figures.push(Figure {
            name: name.into(),
            value,
        });
    }

    pub fn comparison(&self, case: &str, measure: &str) -> Option<&Comparison> {
        let mut all = self.comparisons.iter();
        all.find(|found| found.case == case && found.measure == measure)
    }

    pub fn profile(&self, case: &str) -> Option<&Profile> {
        self.profiles.iter().find(|profile| profile.case == case)
    }
}

impl Measured {
    /// How many sections were measured while something else ran, in words.
    pub fn disturbance(&self) -> Option<String> {
        let sections = self.sections.iter();
        let disturbed = sections
            .filter(|section| section.disturbed.is_some())
            .count();
        (disturbed > 0).then(|| {
            format!(
                "{disturbed} of {} sections were measured on a machine that was not quiet: their \
                 figures, absolute ones above all, are worse than they would be alone. Measure \
                 them anew before relying on them.",
                self.sections.len()
            )
        })
    }

    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_few_numbers() {
        let spread = Spread::of(&[3.0, 1.0, f64::NAN, 2.0, 8.0]).unwrap();
        assert_eq!((spread.middle, spread.least, spread.most), (2.5, 1.0, 8.0));
        assert_eq!(Spread::of(&[f64::INFINITY]), None);
    }
}
