//! A fixed-size histogram: recording is two shifts and an addition, and never allocates.

/// Each power of two is divided in 16: quantiles are at most 1/16 too high.
const SUB_BUCKETS: usize = 16;
const SUB_BITS: u32 = SUB_BUCKETS.ilog2();
const BUCKETS: usize = (u64::BITS - SUB_BITS + 1) as usize * SUB_BUCKETS;

/// Counts of values by size; any unit, ours are nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
    sum: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: Box::new([0; BUCKETS]),
            total: 0,
            sum: 0,
            max: 0,
        }
    }
}

impl Histogram {
    pub fn record(&mut self, value: u64) {
        self.counts[bucket_of(value)] += 1;
        self.total += 1;
        self.sum = self.sum.saturating_add(value);
        self.max = self.max.max(value);
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    pub fn max(&self) -> u64 {
        self.max
    }

    /// The mean of all values; 0 when there are none.
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.total).unwrap_or(0)
    }

    /// The smallest bucket end that at least `share` (0 to 1) of all values do not exceed; 0 when
    /// there are none.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen >= wanted {
                return last_of(bucket).min(self.max);
            }
        }
        self.max
    }

    /// Adds all that `other` counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(other.counts.iter()) {
            *count += more;
        }
        self.total += other.total;
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }

    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.total, self.sum, self.max) = (0, 0, 0);
    }
}

fn bucket_of(value: u64) -> usize {
    if value < SUB_BUCKETS as u64 {
        return value as usize;
    }
    let shift = value.ilog2() - SUB_BITS;
    (shift as usize + 1) * SUB_BUCKETS + (value >> shift) as usize - SUB_BUCKETS
}

/// The largest value that falls into a bucket.
fn last_of(bucket: usize) -> u64 {
    if bucket < SUB_BUCKETS {
        return bucket as u64;
    }
    let shift = bucket / SUB_BUCKETS - 1;
    let first = ((bucket % SUB_BUCKETS + SUB_BUCKETS) as u64) << shift;
    first + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_holds_its_value_and_is_narrow(value: u64) {
            let last = last_of(bucket_of(value));
            prop_assert!(last >= value);
            prop_assert!(last - value <= value / SUB_BUCKETS as u64);
            prop_assert_eq!(bucket_of(last), bucket_of(value));
        }
    }

    #[test]
    fn quantiles_are_of_the_values_recorded() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), 0);
        (1..=1000).for_each(|value| histogram.record(value));
        let (median, most) = (histogram.quantile(0.5), histogram.quantile(1.0));
        assert!((500..=532).contains(&median), "{median}");
        assert_eq!((most, histogram.max(), histogram.mean()), (1000, 1000, 500));
        let mut twice = histogram.clone();
        twice.merge(&histogram);
        assert_eq!((twice.count(), twice.quantile(0.5)), (2000, median));
        twice.clear();
        assert_eq!(twice.count(), 0);
    }
}
