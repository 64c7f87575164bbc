//! A histogram of times in shared memory: one addition a sample, no lock, no allocation, readable
//! by any process at any time.
//!
//! Log-linear: every power of two of nanoseconds is cut into 32 equal buckets, so a percentile is
//! at most 1/32 (3 %) above the true one.

use std::sync::atomic::{AtomicU64, Ordering};

const STEP_BITS: u32 = 5;
const STEPS: u64 = 1 << STEP_BITS;
/// Times of 2^40 ns (18 minutes) and longer are counted in the last bucket.
const VALUE_BITS: u32 = 40;
const BUCKETS: usize = ((VALUE_BITS - STEP_BITS + 1) as usize) << STEP_BITS;
/// Buckets, then the largest sample.
pub(super) const WORDS: usize = BUCKETS + 1;

fn bucket_of(value_ns: u64) -> usize {
    if value_ns < STEPS {
        return value_ns as usize;
    }
    let exponent = (63 - value_ns.leading_zeros()).min(VALUE_BITS);
    if exponent == VALUE_BITS {
        return BUCKETS - 1;
    }
    let shift = exponent - STEP_BITS;
    let step = (value_ns >> shift) - STEPS;
    ((u64::from(shift + 1) << STEP_BITS) + step) as usize
}

/// The largest value that the bucket counts.
fn upper_bound_ns(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let shift = (bucket >> STEP_BITS) - 1;
    ((STEPS + (bucket & (STEPS - 1)) + 1) << shift) - 1
}

/// Counts one sample.
pub(super) fn record(words: &[AtomicU64], value_ns: u64) {
    words[bucket_of(value_ns)].fetch_add(1, Ordering::Relaxed);
    if value_ns > words[BUCKETS].load(Ordering::Relaxed) {
        words[BUCKETS].fetch_max(value_ns, Ordering::Relaxed);
    }
}

/// What a histogram says. Nanoseconds; all 0 when nothing was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percentiles {
    pub samples: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
}

/// Reads the histogram while others may write to it: the figures are those of some moment between
/// the first and the last load.
pub(super) fn read(words: &[AtomicU64]) -> Percentiles {
    let counts: Vec<u64> = words[..BUCKETS]
        .iter()
        .map(|count| count.load(Ordering::Relaxed))
        .collect();
    let max_ns = words[BUCKETS].load(Ordering::Relaxed);
    // A damaged status page may hold anything.
    let total = |sum: u64, count: &u64| sum.saturating_add(*count);
    let samples = counts.iter().fold(0, total);
    let at = |share: f64| {
        let rank = ((samples as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = counts.iter().position(|count| {
            seen = total(seen, count);
            seen >= rank
        });
        bucket.map_or(0, |bucket| upper_bound_ns(bucket).min(max_ns))
    };
    Percentiles {
        samples,
        p50_ns: at(0.50),
        p99_ns: at(0.99),
        max_ns,
    }
}

/// The buckets that counted anything: the largest value of each in nanoseconds, and how many.
pub(super) fn counts(words: &[AtomicU64]) -> Vec<(u64, u64)> {
    let counts = words[..BUCKETS].iter().enumerate();
    let counts = counts.map(|(bucket, count)| (bucket, count.load(Ordering::Relaxed)));
    counts
        .filter(|(_, count)| *count > 0)
        .map(|(bucket, count)| (upper_bound_ns(bucket), count))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Vec<AtomicU64> {
        (0..WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn buckets_are_in_order_without_gap_and_narrow() {
        let mut next = 0;
        for bucket in 0..BUCKETS {
            let upper = upper_bound_ns(bucket);
            assert_eq!(bucket_of(next), bucket, "lower bound {next}");
            assert_eq!(bucket_of(upper), bucket, "upper bound {upper}");
            assert!(upper - next <= next / STEPS, "bucket {bucket} is too wide");
            next = upper + 1;
        }
        assert_eq!(next, 1 << VALUE_BITS);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_known_set() {
        let words = empty();
        assert_eq!(read(&words), Percentiles::default());
        for value in 1..=1000u64 {
            record(&words, value * 1000);
        }
        let read = read(&words);
        assert_eq!((read.samples, read.max_ns), (1000, 1_000_000));
        let counts = counts(&words);
        assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), 1000);
        assert_eq!(
            counts.first().map(|(upper_ns, _)| bucket_of(*upper_ns)),
            Some(bucket_of(1000))
        );
        assert!((500_000..=516_000).contains(&read.p50_ns), "{read:?}");
        assert!((990_000..=1_000_000).contains(&read.p99_ns), "{read:?}");
    }

    #[test]
    fn one_sample_is_every_percentile() {
        let words = empty();
        record(&words, 12_345);
        let read = read(&words);
        assert_eq!(
            (read.p50_ns, read.p99_ns, read.max_ns),
            (12_345, 12_345, 12_345)
        );
    }
}
