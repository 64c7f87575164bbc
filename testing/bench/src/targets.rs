//! The targets of the design, each beside what was measured and what RRC has published.

use crate::model::{Measured, Spread, Torture};
use crate::sweeps;
use crate::text::{count, duration_us, number};
use crate::workloads::{footprint, icecast, ngircd};

/// What became of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Met,
    NotMet,
    NotMeasured,
    /// Waits for a standby on another machine.
    Later,
}

#[derive(Debug, Clone)]
pub struct Target {
    pub what: &'static str,
    pub wanted: &'static str,
    pub rrc: &'static str,
    pub measured: String,
    pub verdict: Verdict,
}

/// What was measured for a target, and whether it is good enough.
type Found = Option<(String, Verdict)>;

/// Every target, in the design's order.
pub fn all(measured: &Measured) -> Vec<Target> {
    let target = |what, wanted, rrc, found: Found| {
        let (measured, verdict) = found.unwrap_or(("-".into(), Verdict::NotMeasured));
        Target {
            what,
            wanted,
            rrc,
            measured,
            verdict,
        }
    };
    let later = || Some(("-".to_string(), Verdict::Later));
    vec![
        target(
            "pause, small server, p50 / p99",
            "50 us / 200 us",
            "500-3,200 us average",
            pause(measured, "ngircd", "20 clients at 50 %", (50.0, 200.0)),
        ),
        target(
            "pause, 100 MB and 200 connections, p50 / p99",
            "150 us / 600 us",
            "-",
            pause(measured, "footprint", footprint::CASE, (150.0, 600.0)),
        ),
        target(
            "added latency, one machine, p50 / p99",
            "100 us / 400 us",
            "144-290 us / 235-959 us",
            added_latency(measured),
        ),
        target(
            "added latency, two machines",
            "the same + one round trip",
            "144-290 us / 235-959 us",
            later(),
        ),
        target("throughput kept: chat at 80 %", "97 %", "-", chat(measured)),
        target(
            "throughput kept: streaming at 80 %",
            "97 %",
            "-",
            streaming(measured),
        ),
        target(
            "throughput kept: redis at saturation",
            "75 %",
            "54-69 %",
            redis(measured),
        ),
        target(
            "death to the replica's first packet",
            "1 ms",
            "355-818 ms",
            takeover(measured),
        ),
        target(
            "longest gap of a client, process death",
            "10 ms",
            "445-908 ms",
            gap(measured),
        ),
        target(
            "longest gap of a client, machine death",
            "detection + 20 ms",
            "445-908 ms",
            later(),
        ),
        target(
            "10,000 connections, cost by the active ones",
            "pause of 1 connection, p50 and p99 at most doubled",
            "-",
            flat(measured, "idle", "1 connections", "10000 connections"),
        ),
        target(
            "resident memory of 10 GB, cost by the dirty pages",
            "pause of 10 MB, p50 and p99 at most doubled",
            "-",
            flat(measured, "memory", "10 MB", "8000 MB"),
        ),
        target(
            "injected faults survived",
            "all, of 10,000",
            "99.0-100 %",
            faults(measured),
        ),
    ]
}

fn judged(text: String, met: bool) -> Found {
    Some((text, if met { Verdict::Met } else { Verdict::NotMet }))
}

fn pause(measured: &Measured, section: &str, case: &str, limits_us: (f64, f64)) -> Found {
    let pause = measured.section(section)?.profile(case)?.pause_us;
    let text = format!("{} / {}", duration_us(pause.p50), duration_us(pause.p99));
    judged(text, pause.p50 <= limits_us.0 && pause.p99 <= limits_us.1)
}

fn added_latency(measured: &Measured) -> Found {
    let echo = measured.section("echo")?;
    let added = |part| echo.comparison("1 connection", part)?.differences();
    let (middle, tail) = (
        added("answer time p50")?.middle,
        added("answer time p99")?.middle,
    );
    let text = format!("{} / {}", duration_us(middle), duration_us(tail));
    judged(text, middle <= 100.0 && tail <= 400.0)
}

/// The ratios of the rows that are asked for, the worst deciding.
fn worst(ratios: Vec<Spread>, limit: f64) -> Found {
    let middles: Vec<f64> = ratios.iter().map(|ratio| ratio.middle).collect();
    let all = Spread::of(&middles)?;
    let text = if middles.len() > 1 {
        format!("{:.0}-{:.0} %", all.least * 100.0, all.most * 100.0)
    } else {
        format!("{:.1} %", all.least * 100.0)
    };
    judged(text, all.least >= limit)
}

fn chat(measured: &Measured) -> Found {
    let rows = &measured.section("ngircd")?.comparisons;
    let rows = rows
        .iter()
        .filter(|row| row.measure == ngircd::AT_MOST_OF_IT);
    worst(rows.filter_map(|row| row.ratios()).collect(), 0.97)
}

fn streaming(measured: &Measured) -> Found {
    let section = measured.section("icecast")?;
    // Only the crowd that was made to take 80 % of a core; another says nothing of it.
    let listeners = section.figure(icecast::LISTENERS_AT_SHARE)? as usize;
    let row = section.comparison(&count(listeners, "listener"), icecast::DELIVERED_AT_RATE)?;
    worst(vec![row.ratios()?], 0.97)
}

fn redis(measured: &Measured) -> Found {
    let rows = &measured.section("redis")?.comparisons;
    let pressed = rows.iter().filter(|row| {
        // One connection alone waits; it does not press.
        !row.case.starts_with("1 ") && matches!(row.measure.as_str(), "GET" | "SET")
    });
    worst(pressed.filter_map(|row| row.ratios()).collect(), 0.75)
}

fn takeover(measured: &Measured) -> Found {
    let section = measured.section("failover")?;
    let (middle, most) = (
        section.figure("takeover ms")?,
        section.figure("longest takeover ms")?,
    );
    let text = format!("{} ms, at most {} ms", number(middle), number(most));
    judged(text, middle <= 1.0)
}

fn gap(measured: &Measured) -> Found {
    let longest_ms = measured.section("failover")?.figure("longest gap ms")?;
    judged(format!("{} ms", number(longest_ms)), longest_ms <= 10.0)
}

/// Whether the pause, its tail too, stays what it was while a quantity grows.
fn flat(measured: &Measured, section: &str, small: &str, large: &str) -> Found {
    let section = measured.section(section)?;
    let at = |part, case: &str| section.figure(&sweeps::pause_figure(part, case));
    let both = |case| Some((at("p50", case)?, at("p99", case)?));
    let (small_us, large_us) = (both(small)?, both(large)?);
    let shown = |us: (f64, f64)| format!("{} / {}", duration_us(us.0), duration_us(us.1));
    let text = format!(
        "{large}: {} ({small}: {})",
        shown(large_us),
        shown(small_us)
    );
    let met = large_us.0 <= 2.0 * small_us.0 && large_us.1 <= 2.0 * small_us.1;
    judged(text, met)
}

fn faults(measured: &Measured) -> Found {
    const ENOUGH: u64 = 10_000;
    let Torture {
        survived,
        failed,
        commit,
        at,
    } = measured.torture.as_ref()?;
    let all = survived + failed;
    let verdict = match failed {
        0 if all >= ENOUGH => Verdict::Met,
        // Fewer are no proof of so many.
        0 => Verdict::NotMeasured,
        _ => Verdict::NotMet,
    };
    let [survived, all] = [*survived, all].map(|faults| number(faults as f64));
    let text = format!("{survived} of {all} ({commit}, {at})");
    Some((text, verdict))
}
