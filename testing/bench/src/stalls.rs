//! What the machine itself does to whoever runs on the service's core: a thread that does nothing
//! but read the clock, and the times in which it could not. No protection can be better than this.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use unbroken_clients::tally::times_ns;

use crate::bench::Bench;
use crate::histogram::bars;
use crate::model::{Bars, Section};
use crate::text::duration_us;

/// Shorter gaps are the reading of the clock itself and the timer's interrupt.
const COUNTED_FROM: Duration = Duration::from_micros(5);

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let span = if bench.short {
        Duration::from_millis(500)
    } else {
        Duration::from_secs(5)
    };
    let cores = bench.cores.clone();
    let probe = std::thread::spawn(move || -> Result<_> {
        cores.only_service()?;
        let mut gaps = times_ns();
        let begun = Instant::now();
        let mut last = begun;
        while last.duration_since(begun) < span {
            let now = Instant::now();
            let gap = now.duration_since(last);
            if gap >= COUNTED_FROM {
                gaps.saturating_record(gap.as_nanos() as u64);
            }
            last = now;
        }
        Ok(gaps)
    });
    let gaps = probe.join().ok().context("the probe panicked")??;
    let seconds = span.as_secs_f64();
    let longer = |us: u64| gaps.count_between(us * 1000, u64::MAX) as f64 / seconds;
    section.set_figure("longest stall us", gaps.max() as f64 / 1e3);
    section.set_figure("stalls over 100 us per s", longer(100));
    section.set_figure("stalls over 1 ms per s", longer(1000));
    let note = format!(
        "In {seconds:.1} s on an idle core: {:.1} gaps a second over {}, {:.1} over 50 us, {:.1} over \
         200 us, {:.1} over 1 ms; the longest was {}.",
        gaps.len() as f64 / seconds,
        duration_us(COUNTED_FROM.as_secs_f64() * 1e6),
        longer(50),
        longer(200),
        longer(1000),
        duration_us(gaps.max() as f64 / 1e3)
    );
    bench.tell(&note);
    section.notes.push(note);
    section.histograms.push(Bars {
        title: "Gaps on the service's core, idle and unprotected".into(),
        x: "us".into(),
        sets: vec![bars("the machine's own gaps, idle core", &gaps, 1e3)],
    });
    Ok(())
}
