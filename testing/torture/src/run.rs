//! Sessions in parallel, and what came of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::memory;
use crate::options::Options;
use crate::progress::Progress;
use crate::session::{Incident, News, Session, Survived, play};

const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What came of a run.
#[derive(Debug, Default)]
pub struct Totals {
    /// By kind of fault.
    kinds: BTreeMap<String, Kind>,
    /// A session that could not be played at all.
    broken: Vec<String>,
}

#[derive(Debug, Default)]
struct Kind {
    survived: u64,
    failed: u64,
    takeovers_ms: Vec<f64>,
    protected_again_ms: Vec<f64>,
    gaps_ms: Vec<f64>,
}

impl Totals {
    pub fn survived(&self) -> u64 {
        self.kinds.values().map(|kind| kind.survived).sum()
    }

    pub fn failed(&self) -> u64 {
        let faults: u64 = self.kinds.values().map(|kind| kind.failed).sum();
        faults + self.broken.len() as u64
    }

    fn count(&mut self, survived: &Survived) {
        let kind = self.kinds.entry(survived.kind.clone()).or_default();
        kind.survived += 1;
        kind.takeovers_ms.extend(survived.takeover_ms);
        kind.gaps_ms.extend(survived.longest_gap_ms);
        let again_ms = survived.protected_again.as_secs_f64() * 1e3;
        kind.protected_again_ms.push(again_ms);
    }

    /// One line a kind of fault.
    pub fn table(&self) -> String {
        let mut lines = vec![format!(
            "{:<48} {:>8} {:>6}  {:<24} {:<24} {}",
            "fault",
            "survived",
            "failed",
            "takeover ms p50/p99/max",
            "longest gap ms",
            "protected again ms"
        )];
        for (name, kind) in &self.kinds {
            lines.push(format!(
                "{name:<48} {:>8} {:>6}  {:<24} {:<24} {}",
                kind.survived,
                kind.failed,
                percentiles(&kind.takeovers_ms),
                percentiles(&kind.gaps_ms),
                percentiles(&kind.protected_again_ms)
            ));
        }
        lines.extend(self.broken.iter().map(|why| format!("not played: {why}")));
        lines.join("\n")
    }
}

fn percentiles(values_ms: &[f64]) -> String {
    let mut sorted = values_ms.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(max) = sorted.last() else {
        return "-".into();
    };
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    format!("{:.1} / {:.1} / {max:.1}", at(0.5), at(0.99))
}

/// Runs all faults; the result says what came of them. Prints as it goes.
pub fn run(options: &Options) -> Result<Totals> {
    let can_run_out = memory::can_run_out();
    let shared = Shared {
        options,
        next: AtomicU64::new(options.from),
        stopped: AtomicBool::new(false),
        can_run_out: can_run_out.is_ok(),
    };
    let mut progress = Progress::new(options.faults);
    let mut totals = Totals::default();
    progress.print(&format!("seed {}", options.seed));
    if let Err(why) = can_run_out {
        progress.print(&format!(
            "SIGKILL stands in for the kernel's killer: {why:#}"
        ));
    }
    std::thread::scope(|scope| {
        let (sender, news) = mpsc::channel();
        for _ in 0..options.parallel {
            let (shared, sender) = (&shared, sender.clone());
            scope.spawn(move || shared.work(&sender));
        }
        drop(sender);
        loop {
            match news.recv_timeout(LOOK_EVERY) {
                Ok(news) => shared.take(news, &mut totals, &mut progress),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            progress.draw();
        }
    });
    progress.print(&totals.table());
    Ok(totals)
}

struct Shared<'a> {
    options: &'a Options,
    /// The first fault that no session has taken.
    next: AtomicU64,
    stopped: AtomicBool,
    can_run_out: bool,
}

type Told = Result<News, String>;

impl Shared<'_> {
    fn work(&self, sender: &Sender<Told>) {
        let end = self.options.from + self.options.faults;
        while !self.stopped.load(Ordering::Relaxed) {
            let first = self.next.fetch_add(self.options.each, Ordering::Relaxed);
            if first >= end {
                return;
            }
            let last = (first + self.options.each).min(end);
            let session = Session::new(self.options, first, last, self.can_run_out);
            self.play_out(session, sender);
        }
    }

    /// Faults after one that failed meet a new service.
    fn play_out(&self, mut session: Session<'_>, sender: &Sender<Told>) {
        while session.first < session.end && !self.stopped.load(Ordering::Relaxed) {
            // Each in a thread of its own: the host that it plays ends with the thread.
            let played = std::thread::scope(|scope| {
                let tell = sender.clone();
                let thread = scope.spawn(move || self.play(session, &tell));
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("it panicked")))
            });
            match played {
                Ok(next) => session.first = next,
                Err(cause) => {
                    // Nobody listens any more only when the run is over.
                    let _ = sender.send(Err(format!("{cause:#}")));
                    return;
                }
            }
        }
    }

    fn play(&self, session: Session<'_>, sender: &Sender<Told>) -> Result<u64> {
        let mut tell = |news| drop(sender.send(Ok(news)));
        let stopped = || self.stopped.load(Ordering::Relaxed);
        play(session, &self.options.evidence, &mut tell, &stopped)
    }

    fn take(&self, told: Told, totals: &mut Totals, progress: &mut Progress) {
        match told {
            Ok(News::Survived(survived)) => {
                totals.count(&survived);
                progress.survived();
                return;
            }
            Ok(News::Slow(incident)) => return progress.print(&self.describe("SLOW", &incident)),
            Ok(News::Failed(incident)) => {
                let entry = totals.kinds.entry(incident.kind.clone()).or_default();
                entry.failed += 1;
                progress.failed(&self.describe("FAILED", &incident));
            }
            Ok(News::Trends(lines)) => return progress.print(&lines),
            Err(why) => {
                progress.failed(&format!("FAILED: {why}"));
                totals.broken.push(why);
            }
        }
        if self.options.stop {
            self.stopped.store(true, Ordering::Relaxed);
        }
    }

    fn describe(&self, what: &str, incident: &Incident) -> String {
        format!(
            "{what} seed {} fault {} ({}, {}): {}\n  kept in {}",
            self.options.seed,
            incident.number,
            incident.server,
            incident.kind,
            incident.why,
            incident.kept
        )
    }
}
