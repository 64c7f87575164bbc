//! What a protected service has counted since its start, and the difference of two moments: a
//! window is not to be judged by the filling of the standby before it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use unbroken_harness::{PATIENCE, Service};

use crate::model::Times;

/// As `status NAME --histograms` prints it.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Totals {
    epochs: u64,
    dirty_pages: u64,
    bytes: u64,
    times: Vec<Counted>,
}

/// The times of one kind.
#[derive(Debug, Clone, Default, Deserialize)]
struct Counted {
    name: String,
    /// Upper bound of a bucket in microseconds, and how many it counted.
    us: Vec<(f64, u64)>,
}

/// What was counted in a window.
#[derive(Debug, Clone, Default)]
pub struct Difference {
    pub epochs: u64,
    pub dirty_pages: u64,
    pub bytes: u64,
    times: Vec<Counted>,
}

impl Totals {
    pub fn read(service: &Service) -> Result<Self> {
        let outcome = service.ask(&["status", service.name(), "--histograms"], PATIENCE)?;
        if outcome.code() != Some(0) {
            bail!("status --histograms: {}", outcome.stderr.trim());
        }
        let text = outcome.stdout;
        serde_json::from_str(&text).with_context(|| format!("status --histograms printed {text}"))
    }

    pub fn since(&self, before: &Self) -> Difference {
        let times = self.times.iter().map(|now| {
            let before = before.times.iter().find(|before| before.name == now.name);
            now.less(before.map_or(&[], |before| before.us.as_slice()))
        });
        Difference {
            epochs: self.epochs - before.epochs,
            dirty_pages: self.dirty_pages - before.dirty_pages,
            bytes: self.bytes - before.bytes,
            times: times.collect(),
        }
    }
}

impl Counted {
    fn less(&self, before: &[(f64, u64)]) -> Self {
        // Bounds are printed from the same whole numbers each time.
        let before: BTreeMap<u64, u64> = before
            .iter()
            .map(|(us, count)| (us.to_bits(), *count))
            .collect();
        let more = |(us, count): &(f64, u64)| {
            (*us, count - before.get(&us.to_bits()).copied().unwrap_or(0))
        };
        let us = self.us.iter().map(more).filter(|(_, count)| *count > 0);
        Self {
            name: self.name.clone(),
            us: us.collect(),
        }
    }

    fn times(&self) -> Times {
        let all: u64 = self.us.iter().map(|(_, count)| count).sum();
        let at = |share: f64| {
            let rank = ((all as f64 * share).ceil() as u64).max(1);
            let mut seen = 0;
            let bucket = self.us.iter().find(|(_, count)| {
                seen += count;
                seen >= rank
            });
            bucket.map_or(0.0, |(us, _)| *us)
        };
        Times {
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

impl Difference {
    /// The times of this name; zeros when nothing was counted.
    pub fn times(&self, name: &str) -> Times {
        let found = self.times.iter().find(|counted| counted.name == name);
        found.map(Counted::times).unwrap_or_default()
    }

    /// All times but pause and hold: the steps in their order.
    pub fn steps(&self) -> Vec<(String, Times)> {
        let steps = self.times.iter();
        let steps = steps.filter(|counted| !matches!(counted.name.as_str(), "pause" | "hold"));
        steps
            .map(|step| (step.name.clone(), step.times()))
            .collect()
    }

    /// The histogram of this name in bars a quarter apart, as shares.
    pub fn bars(&self, name: &str) -> Vec<(f64, f64)> {
        const STEP: f64 = 1.25;
        let Some(counted) = self.times.iter().find(|counted| counted.name == name) else {
            return Vec::new();
        };
        let all: u64 = counted.us.iter().map(|(_, count)| count).sum();
        let mut bars: Vec<(f64, f64)> = Vec::new();
        for (us, count) in &counted.us {
            let share = *count as f64 / all.max(1) as f64;
            let edge = STEP.powf((us.ln() / STEP.ln()).ceil());
            match bars.last_mut() {
                Some(bar) if bar.0 >= edge * 0.999 => bar.1 += share,
                _ => bars.push((edge, share)),
            }
        }
        bars
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(pause: &[(f64, u64)]) -> Totals {
        Totals {
            epochs: pause.iter().map(|bucket| bucket.1).sum(),
            times: vec![Counted {
                name: "pause".into(),
                us: pause.to_vec(),
            }],
            ..Totals::default()
        }
    }

    #[test]
    fn a_window_has_only_its_own_times() {
        let before = totals(&[(10.0, 5), (900.0, 100)]);
        let after = totals(&[(10.0, 104), (11.0, 1), (900.0, 100)]);
        let window = after.since(&before);
        let times = window.times("pause");
        assert_eq!((window.epochs, times.p50, times.max), (100, 10.0, 11.0));
        assert_eq!(window.times("hold"), Times::default());
        let shares: f64 = window.bars("pause").iter().map(|bar| bar.1).sum();
        assert!((shares - 1.0).abs() < 1e-9);
    }
}
