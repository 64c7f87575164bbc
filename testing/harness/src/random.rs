//! Random moments that can be had again: every test prints its seed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A small generator (splitmix64).
#[derive(Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// From `UNBROKEN_SEED`, or from the clock; prints the seed so that a failure can be repeated.
    pub fn seeded() -> Self {
        let given = std::env::var("UNBROKEN_SEED")
            .ok()
            .and_then(|text| text.parse().ok());
        let clock = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
        };
        let seed = given.unwrap_or_else(|| clock().as_nanos() as u64);
        println!("UNBROKEN_SEED={seed}");
        Self::from_seed(seed)
    }

    pub fn from_seed(seed: u64) -> Self {
        Self { state: seed }
    }

    pub fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A duration between the two, evenly.
    pub fn between(&mut self, least: Duration, most: Duration) -> Duration {
        let span_ns = most.saturating_sub(least).as_nanos() as u64 + 1;
        least + Duration::from_nanos(self.draw() % span_ns)
    }
}
