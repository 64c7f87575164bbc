//! From exact times to bars that can be drawn.

use hdrhistogram::Histogram;

use crate::model::BarSet;

/// Bars a factor of this apart: seven to a doubling would be a hedge, two to four can be read.
const STEP: f64 = 1.25;

/// The histogram in bars of growing width; `ns_per_unit` gives the unit of their edges.
pub fn bars(name: &str, times_ns: &Histogram<u64>, ns_per_unit: f64) -> BarSet {
    let all = times_ns.len().max(1) as f64;
    let first = times_ns.min().max(1);
    let mut bars = Vec::new();
    for step in times_ns.iter_log(first, STEP) {
        let share = step.count_since_last_iteration() as f64 / all;
        bars.push((step.value_iterated_to() as f64 / ns_per_unit, share));
    }
    BarSet {
        name: name.into(),
        bars,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_clients::tally::times_ns;

    #[test]
    fn shares_add_up_to_all() {
        let mut times = times_ns();
        for us in 1..=1000u64 {
            times.record(us * 1000).unwrap();
        }
        let set = bars("x", &times, 1e3);
        let sum: f64 = set.bars.iter().map(|(_, share)| share).sum();
        assert!((sum - 1.0).abs() < 1e-9 && set.bars.len() > 10, "{set:?}");
    }
}
