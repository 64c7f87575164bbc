//! A streaming server: one source, many listeners, each chunk to all of them in time.

use anyhow::{Result, ensure};
use unbroken_clients::icecast::{self, Options};
use unbroken_clients::tally::times_ns;
use unbroken_clients::{Report, config};

use crate::bench::{Bench, Reading, Served, finish};
use crate::histogram::bars;
use crate::model::{BarSet, Bars, Section};
use crate::text::count;

/// What was delivered to a crowd of listeners at their rate.
pub const DELIVERED_AT_RATE: &str = "delivered in time";
/// How many listeners take [`SHARE`] of a core; not there when they could not be measured.
pub const LISTENERS_AT_SHARE: &str = "listeners at 80 %";

const RATE_BYTES_PER_S: u64 = 320_000 / 8;
/// The first look, from which the number of listeners that the cores take is reckoned.
const PROBE_LISTENERS: usize = 200;
/// What the other core must be left for besides the listeners: the wire and the standby.
const SHARE: f64 = 0.8;
const LISTENERS_MAX: usize = 4000;
/// More than this much of what was offered in a window is the backlog of the time before it.
const DELIVERED_MAX: f64 = 1.2;

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let served = Served {
        name: "icecast",
        port: config::ICECAST_PORT,
        command: &|directory| Ok(config::icecast(directory)?),
    };
    at_full_speed(bench, section, &served);
    if bench.short {
        return Ok(());
    }
    let probed = at_rate(bench, section, &served, PROBE_LISTENERS);
    let Some(many) = reckon(section) else {
        return Ok(());
    };
    let measured = match many {
        PROBE_LISTENERS => probed,
        _ => at_rate(bench, section, &served, many),
    };
    if measured {
        section.set_figure(LISTENERS_AT_SHARE, many as f64);
    }
    Ok(())
}

/// How many listeners take the given share of the busier core, unprotected.
fn reckon(section: &mut Section) -> Option<usize> {
    let row = section.comparison(&count(PROBE_LISTENERS, "listener"), DELIVERED_AT_RATE)?;
    let busy = row.busy_unprotected;
    let by_server = PROBE_LISTENERS as f64 * SHARE / busy.service.max(0.01);
    let by_clients = PROBE_LISTENERS as f64 * SHARE / busy.others.max(0.01);
    let many = (by_server.min(by_clients) as usize).min(LISTENERS_MAX) / 50 * 50;
    let limit = if by_clients < by_server {
        "the core on which the listeners run"
    } else {
        "the server's core"
    };
    section.notes.push(format!(
        "{many} listeners: what takes 80 % of {limit} unprotected, reckoned from {PROBE_LISTENERS} \
         listeners, which took {:.0} % of the server's core and {:.0} % of the other; at most \
         {LISTENERS_MAX}.",
        busy.service * 100.0,
        busy.others * 100.0
    ));
    (many > 0).then_some(many)
}

/// So many listeners at their rate; whether every run of it could be measured.
fn at_rate(bench: &Bench, section: &mut Section, served: &Served<'_>, listeners: usize) -> bool {
    let case = count(listeners, "listener");
    let offered_per_s = listeners as f64 * RATE_BYTES_PER_S as f64;
    let failures = section.failures.len();
    let mut sets: Vec<BarSet> = Vec::new();
    bench.compare(section, served, &case, |subject, side| {
        let options = Options {
            listeners,
            rate_bytes_per_s: Some(RATE_BYTES_PER_S),
        };
        let running = icecast::start(subject.address(), &options)?;
        let window = bench.watch(subject, &running, "")?;
        let until_us = running.tally().now_us();
        let report = finish(running)?;
        ensure!(
            window.received_per_s <= DELIVERED_MAX * offered_per_s,
            "{:.1} MB/s were delivered of {:.1} MB/s offered: the window is not of an even stream",
            window.received_per_s / 1e6,
            offered_per_s / 1e6
        );
        let span_us = bench.window().as_micros() as u64;
        let gaps = gaps_ns(&report, until_us - span_us, until_us);
        sets.retain(|set| set.name != side.name());
        sets.push(bars(side.name(), &gaps, 1e6));
        let gap_ms = |quantile| gaps.value_at_quantile(quantile) as f64 / 1e6;
        let busy = window.busy;
        Ok(vec![
            Reading::higher(DELIVERED_AT_RATE, "MB/s", window.received_per_s / 1e6, busy),
            Reading::lower("gap between chunks p50", "ms", gap_ms(0.5), busy),
            Reading::lower("gap between chunks p99", "ms", gap_ms(0.99), busy),
            Reading::lower("gap between chunks max", "ms", gap_ms(1.0), busy),
        ])
    });
    section.histograms.push(Bars {
        title: format!("Gaps between two chunks of a listener, {case} at 320 kbit/s"),
        x: "ms".into(),
        sets,
    });
    section.failures.len() == failures
}

/// One listener as fast as the server passes the stream on.
fn at_full_speed(bench: &Bench, section: &mut Section, served: &Served<'_>) {
    bench.compare(section, served, "1 listener, full speed", |subject, _| {
        let options = Options {
            listeners: 1,
            rate_bytes_per_s: None,
        };
        let running = icecast::start(subject.address(), &options)?;
        let window = bench.watch(subject, &running, "")?;
        finish(running)?;
        let rate = window.received_per_s / 1e6;
        Ok(vec![Reading::higher(
            "delivered",
            "MB/s",
            rate,
            window.busy,
        )])
    });
}

/// The times between two arrivals at one listener, of those that lie in the window.
fn gaps_ns(report: &Report, from_us: u64, until_us: u64) -> hdrhistogram::Histogram<u64> {
    let mut gaps = times_ns();
    for line in &report.timelines {
        let pairs = line.received_us().windows(2);
        for pair in pairs.filter(|pair| pair[0] >= from_us && pair[1] <= until_us) {
            gaps.saturating_record((pair[1] - pair[0]) * 1000);
        }
    }
    gaps
}
