//! What a load saw: counters that can be read while it runs, and the times at which each of its
//! connections heard from the server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

/// At most this many failures are kept in words; the counters count all of them.
const FAILURES_KEPT: usize = 20;

/// Counters of one load, shared between its threads and whoever draws them.
///
/// The unit of `sent`, `received`, `lost` and `doubled` is the load's own: messages for chat,
/// bytes for streams, commands for stores, conversations for churn.
#[derive(Debug)]
pub struct Tally {
    started: Instant,
    sent: AtomicU64,
    received: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    reordered: AtomicU64,
    damaged: AtomicU64,
    reconnects: AtomicU64,
    longest_gap_us: AtomicU64,
    failures: Mutex<Vec<String>>,
    /// When each connection that should hear all the time last did.
    listening: Mutex<Vec<Arc<AtomicU64>>>,
    /// Nanoseconds from what was sent to its arrival, or to its answer, where the load knows both.
    latency_ns: Mutex<Histogram<u64>>,
}

/// One connection, or one client that opens many, that should hear from the server all the time.
#[derive(Debug, Clone)]
pub struct Ear(Arc<AtomicU64>);

impl Ear {
    /// Notes that something arrived now.
    pub fn heard(&self, tally: &Tally) {
        self.0.store(tally.now_us(), Ordering::Relaxed);
    }
}

/// The counters at one moment.
#[derive(Debug, Clone, Default, Serialize, PartialEq, Eq)]
pub struct Snapshot {
    pub sent: u64,
    pub received: u64,
    pub lost: u64,
    pub doubled: u64,
    pub reordered: u64,
    /// Units whose content was not what was sent.
    pub damaged: u64,
    /// Connections that ended or failed when they should not have.
    pub reconnects: u64,
    /// The longest time one connection heard nothing although it should have.
    pub longest_gap_us: u64,
    /// The first failures, in words.
    pub failures: Vec<String>,
}

impl Default for Tally {
    fn default() -> Self {
        Self::new()
    }
}

impl Tally {
    /// Counters at zero; times in timelines count from now.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            doubled: AtomicU64::new(0),
            reordered: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            longest_gap_us: AtomicU64::new(0),
            failures: Mutex::new(Vec::new()),
            listening: Mutex::new(Vec::new()),
            latency_ns: Mutex::new(times_ns()),
        }
    }

    /// Counts one more connection among those that should hear all the time.
    pub fn listen(&self) -> Ear {
        let ear = Ear(Arc::new(AtomicU64::new(self.now_us())));
        if let Ok(mut listening) = self.listening.lock() {
            listening.push(ear.0.clone());
        }
        ear
    }

    /// How many connections should hear all the time, and how many of them have not since
    /// `since_us`.
    pub fn silent_since(&self, since_us: u64) -> (usize, usize) {
        let Ok(listening) = self.listening.lock() else {
            return (0, 0);
        };
        let silent = listening
            .iter()
            .filter(|heard_us| heard_us.load(Ordering::Relaxed) <= since_us);
        (listening.len(), silent.count())
    }

    /// Microseconds since the load began: the clock of every timeline of this load.
    pub fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// A moment in microseconds of this load's clock; zero for what was before it began.
    pub fn us_at(&self, moment: Instant) -> u64 {
        moment.saturating_duration_since(self.started).as_micros() as u64
    }

    /// The longest gap since this was asked last.
    pub fn take_longest_gap_us(&self) -> u64 {
        self.longest_gap_us.swap(0, Ordering::Relaxed)
    }

    pub fn add_sent(&self, units: u64) {
        self.sent.fetch_add(units, Ordering::Relaxed);
    }

    pub fn add_received(&self, units: u64) {
        self.received.fetch_add(units, Ordering::Relaxed);
    }

    /// Units received so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Counts units that did not arrive.
    pub fn add_lost(&self, units: u64, what: impl FnOnce() -> String) {
        self.lost.fetch_add(units, Ordering::Relaxed);
        self.note(what);
    }

    /// A unit counted as lost did arrive, late.
    pub fn found_late(&self, what: impl FnOnce() -> String) {
        self.lost.fetch_sub(1, Ordering::Relaxed);
        self.reordered.fetch_add(1, Ordering::Relaxed);
        self.note(what);
    }

    pub fn add_doubled(&self, units: u64, what: impl FnOnce() -> String) {
        self.doubled.fetch_add(units, Ordering::Relaxed);
        self.note(what);
    }

    pub fn add_damaged(&self, units: u64, what: impl FnOnce() -> String) {
        self.damaged.fetch_add(units, Ordering::Relaxed);
        self.note(what);
    }

    pub fn add_reconnect(&self, what: impl FnOnce() -> String) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
        self.note(what);
    }

    /// Counts how long one message or answer took.
    pub fn add_latency(&self, took: Duration) {
        self.add_latencies(std::iter::once(took));
    }

    /// Counts how long each of several took.
    pub fn add_latencies(&self, took: impl Iterator<Item = Duration>) {
        if let Ok(mut latency_ns) = self.latency_ns.lock() {
            for took in took {
                latency_ns.saturating_record(took.as_nanos() as u64);
            }
        }
    }

    /// The times so far, in nanoseconds; they begin anew from here.
    pub fn take_latency_ns(&self) -> Histogram<u64> {
        let taken = self.latency_ns.lock();
        taken.map_or_else(
            |_| times_ns(),
            |mut times| std::mem::replace(&mut *times, times_ns()),
        )
    }

    fn note(&self, what: impl FnOnce() -> String) {
        if let Ok(mut failures) = self.failures.lock()
            && failures.len() < FAILURES_KEPT
        {
            let at_ms = self.started.elapsed().as_millis();
            failures.push(format!("at {at_ms} ms: {}", what()));
        }
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            sent: read(&self.sent),
            received: read(&self.received),
            lost: read(&self.lost),
            doubled: read(&self.doubled),
            reordered: read(&self.reordered),
            damaged: read(&self.damaged),
            reconnects: read(&self.reconnects),
            longest_gap_us: read(&self.longest_gap_us),
            failures: self
                .failures
                .lock()
                .map(|list| list.clone())
                .unwrap_or_default(),
        }
    }
}

/// An empty histogram of times in nanoseconds, up to a minute, exact to a thousandth.
pub fn times_ns() -> Histogram<u64> {
    const MOST_NS: u64 = 60_000_000_000;
    Histogram::new_with_bounds(1, MOST_NS, 3).expect("the bounds are constants in order")
}

impl Snapshot {
    /// Nothing lost, doubled, reordered or damaged, and no connection broke.
    pub fn is_clean(&self) -> bool {
        self.lost + self.doubled + self.reordered + self.damaged + self.reconnects == 0
    }
}

/// When one connection heard from the server, in microseconds of its load's clock.
#[derive(Debug, Default, Clone)]
pub struct Timeline {
    received_us: Vec<u64>,
    ear: Option<Ear>,
}

impl Timeline {
    /// Notes that something arrived now; keeps the load's longest gap up to date.
    pub fn heard(&mut self, tally: &Tally) {
        self.heard_at(tally, tally.now_us());
    }

    /// Notes that something arrived at a moment of the load's clock, not before the last.
    pub fn heard_at(&mut self, tally: &Tally, now_us: u64) {
        self.ear.get_or_insert_with(|| tally.listen()).heard(tally);
        if let Some(last_us) = self.received_us.last() {
            tally
                .longest_gap_us
                .fetch_max(now_us - last_us, Ordering::Relaxed);
        }
        self.received_us.push(now_us);
    }

    /// Every arrival, in microseconds of the load's clock.
    pub fn received_us(&self) -> &[u64] {
        &self.received_us
    }

    /// The longest time between two arrivals of which some part lies in `from_us..=until_us`.
    pub fn longest_gap_us(&self, from_us: u64, until_us: u64) -> u64 {
        self.received_us
            .windows(2)
            .filter(|pair| pair[1] >= from_us && pair[0] <= until_us)
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap_or(0)
    }
}

/// What a load saw from its start to its end.
#[derive(Debug)]
pub struct Report {
    /// Which load.
    pub name: String,
    pub totals: Snapshot,
    /// One for each connection that listens continuously; none for churn.
    pub timelines: Vec<Timeline>,
}

impl Report {
    /// The longest gap any connection saw around each moment, from the moment to `window_us` later.
    pub fn gaps_us(&self, moments_us: &[u64], window_us: u64) -> Vec<u64> {
        let gap_after = |moment_us: &u64| {
            let until_us = moment_us + window_us;
            let gaps = self
                .timelines
                .iter()
                .map(|line| line.longest_gap_us(*moment_us, until_us));
            gaps.max().unwrap_or(0)
        };
        moments_us.iter().map(gap_after).collect()
    }

    /// The longest gap any connection saw that lies wholly outside the windows of `moments_us`: what
    /// silence is usual for this load on this machine.
    pub fn usual_gap_us(&self, moments_us: &[u64], window_us: u64) -> u64 {
        let near_a_kill = |from_us: u64, until_us: u64| {
            moments_us
                .iter()
                .any(|moment| until_us >= *moment && from_us <= moment + window_us)
        };
        let pairs = self
            .timelines
            .iter()
            .flat_map(|line| line.received_us.windows(2));
        let quiet = pairs.filter(|pair| !near_a_kill(pair[0], pair[1]));
        quiet.map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }

    /// `Ok` when the load was clean and did something; otherwise what went wrong, in words.
    pub fn verdict(&self) -> Result<(), String> {
        let totals = &self.totals;
        if totals.received == 0 {
            return Err(format!(
                "{}: nothing was received: {:?}",
                self.name, totals.failures
            ));
        }
        if totals.is_clean() {
            return Ok(());
        }
        Err(format!(
            "{}: sent {}, received {}, lost {}, doubled {}, reordered {}, damaged {}, broken \
             connections {}; first failures:\n  {}",
            self.name,
            totals.sent,
            totals.received,
            totals.lost,
            totals.doubled,
            totals.reordered,
            totals.damaged,
            totals.reconnects,
            totals.failures.join("\n  ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_counts_where_it_overlaps_the_window() {
        let line = Timeline {
            received_us: vec![0, 10, 500, 510, 520],
            ear: None,
        };
        assert_eq!(line.longest_gap_us(100, 200), 490);
        assert_eq!(line.longest_gap_us(505, 530), 10);
        assert_eq!(line.longest_gap_us(600, 700), 0);
    }

    #[test]
    fn usual_gaps_are_those_away_from_kills() {
        let line = Timeline {
            received_us: vec![0, 10, 500, 510, 540],
            ear: None,
        };
        let totals = Snapshot::default();
        let report = Report {
            name: "x".into(),
            totals,
            timelines: vec![line],
        };
        assert_eq!(report.gaps_us(&[20], 50), [490]);
        assert_eq!(report.usual_gap_us(&[20], 50), 30);
    }

    #[test]
    fn a_connection_is_silent_until_it_hears_again() {
        let tally = Tally::new();
        let (first, _second) = (tally.listen(), tally.listen());
        let since_us = tally.now_us();
        while tally.now_us() == since_us {}
        assert_eq!(tally.silent_since(since_us), (2, 2));
        first.heard(&tally);
        assert_eq!(tally.silent_since(since_us), (2, 1));
    }

    #[test]
    fn a_late_message_is_reordered_and_not_lost() {
        let tally = Tally::new();
        tally.add_received(1);
        tally.add_lost(1, || "7 missing".into());
        assert_eq!(tally.snapshot().lost, 1);
        tally.found_late(|| "7 came late".into());
        let totals = tally.snapshot();
        assert_eq!((totals.lost, totals.reordered), (0, 1));
        assert!(!totals.is_clean());
    }
}
