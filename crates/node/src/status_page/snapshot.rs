//! Reading the whole status page for `unbroken status`.

use super::layout::{self, SECOND_WORDS, SECONDS, TextPlace, Word};
use super::{Percentiles, ServiceState, StatusPage, histogram, text};
use crate::steps::{EPOCH_STEPS, EpochStep};
use std::sync::atomic::{AtomicU64, Ordering};

/// Full seconds behind the current one that "recent" means: fewer than the ring holds, so the
/// writer never overwrites what is being summed.
const RECENT_SECONDS: u64 = 10;
const _: () = assert!(RECENT_SECONDS + 2 < SECONDS as u64);

const NS_PER_SECOND: u64 = 1_000_000_000;

/// Means over the last ten full seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recent {
    pub epochs_per_s: f64,
    /// Over all epochs of the service when there was none recently.
    pub dirty_pages_per_epoch: f64,
    /// As above.
    pub bytes_per_epoch: f64,
}

/// Everything that the status page says, at about one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub name: String,
    pub command: String,
    pub address: String,
    pub published: String,
    pub state: ServiceState,
    /// Why the state is so; empty when there is nothing to say.
    pub reason: String,
    pub term: u64,
    /// Number of the last committed epoch.
    pub epoch: u64,
    /// Host pids; `None` when there is no such process.
    pub front_pid: Option<i32>,
    pub primary_pid: Option<i32>,
    pub standby_pid: Option<i32>,
    pub service_pids: Vec<i32>,
    pub takeovers: u64,
    /// `None` before the first.
    pub last_takeover_us: Option<u64>,
    /// What the last takeover was for.
    pub last_takeover_cause: Option<String>,
    pub recent: Recent,
    pub pause: Percentiles,
    pub hold: Percentiles,
    /// By step, in their order.
    pub steps: [Percentiles; EPOCH_STEPS],
    /// How long it is unprotected by now; `None` while it is protected.
    pub unprotected_for_ns: Option<u64>,
    /// All unprotected time, this one included.
    pub unprotected_total_ns: u64,
    pub exit: Option<u8>,
}

impl StatusPage {
    /// Reads everything; `now_ns` is `CLOCK_MONOTONIC`. Disturbs no writer.
    pub fn snapshot(&self, now_ns: u64) -> Snapshot {
        let since_ns = self.get(Word::UnprotectedSinceNs);
        let unprotected_for_ns = (since_ns != 0).then(|| now_ns.saturating_sub(since_ns));
        let takeovers = self.get(Word::Takeovers);
        Snapshot {
            name: self.text(layout::NAME),
            command: self.text(layout::COMMAND),
            address: self.text(layout::ADDRESS),
            published: self.text(layout::PUBLISHED),
            state: self.state(),
            reason: self.text(layout::REASON),
            term: self.term(),
            epoch: self.get(Word::Epoch),
            front_pid: some_pid(self.front_pid()),
            primary_pid: some_pid(self.primary_pid()),
            standby_pid: some_pid(self.standby_pid()),
            service_pids: self.service_pids(),
            takeovers,
            last_takeover_us: (takeovers > 0).then(|| self.get(Word::LastTakeoverUs)),
            last_takeover_cause: (takeovers > 0).then(|| self.text(layout::TAKEOVER_CAUSE)),
            recent: self.recent(now_ns),
            pause: histogram::read(self.pauses()),
            hold: histogram::read(self.holds()),
            steps: EpochStep::ALL.map(|step| histogram::read(self.step(step))),
            unprotected_for_ns,
            unprotected_total_ns: self.get(Word::UnprotectedTotalNs)
                + unprotected_for_ns.unwrap_or(0),
            exit: self.exit(),
        }
    }

    pub(super) fn text(&self, place: TextPlace) -> String {
        String::from_utf8_lossy(&text::read(self.words.words(), place)).into_owned()
    }

    /// The service's processes as the host sees them.
    pub fn service_pids(&self) -> Vec<i32> {
        text::read(self.words.words(), layout::SERVICE_PIDS)
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| i32::from_ne_bytes(*bytes))
            .collect()
    }

    fn recent(&self, now_ns: u64) -> Recent {
        let (epochs, pages, bytes) = sum_of_recent(self.seconds(), now_ns / NS_PER_SECOND);
        let (divisor, pages, bytes) = match epochs {
            0 => (
                self.get(Word::Epochs),
                self.get(Word::DirtyPages),
                self.get(Word::Bytes),
            ),
            _ => (epochs, pages, bytes),
        };
        Recent {
            epochs_per_s: epochs as f64 / RECENT_SECONDS as f64,
            dirty_pages_per_epoch: pages as f64 / divisor.max(1) as f64,
            bytes_per_epoch: bytes as f64 / divisor.max(1) as f64,
        }
    }
}

fn some_pid(pid: i32) -> Option<i32> {
    (pid > 0).then_some(pid)
}

/// Adds an epoch to the sums of the current second. One writer, so plain loads and stores do; a
/// takeover inside one second may lose one epoch of these sums.
pub(super) fn add_to_second(ring: &[AtomicU64], now_ns: u64, pages: u64, bytes: u64) {
    let second = now_ns / NS_PER_SECOND;
    let start = (second % SECONDS as u64) as usize * SECOND_WORDS;
    let entry = &ring[start..start + SECOND_WORDS];
    if entry[0].load(Ordering::Relaxed) != second {
        for sum in &entry[1..] {
            sum.store(0, Ordering::Relaxed);
        }
        entry[0].store(second, Ordering::Release);
    }
    for (sum, value) in entry[1..].iter().zip([1, pages, bytes]) {
        sum.fetch_add(value, Ordering::Relaxed);
    }
}

/// Epochs, pages and bytes of the full seconds before `current`.
fn sum_of_recent(ring: &[AtomicU64], current: u64) -> (u64, u64, u64) {
    let wanted = current.saturating_sub(RECENT_SECONDS)..current;
    ring.chunks_exact(SECOND_WORDS)
        .filter(|entry| wanted.contains(&entry[0].load(Ordering::Acquire)))
        .map(|entry| [1, 2, 3].map(|index: usize| entry[index].load(Ordering::Relaxed)))
        .fold((0, 0, 0), |sum, entry| {
            (
                sum.0.saturating_add(entry[0]),
                sum.1.saturating_add(entry[1]),
                sum.2.saturating_add(entry[2]),
            )
        })
}
