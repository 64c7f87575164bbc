//! Resident memory that nobody writes: it should cost nothing but the filling of a new standby.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use unbroken_harness::{Signal, Target, wait_until};

use super::{Lines, add_steps, ask, file, note_pause, point, steps_sweep};
use crate::bench::Bench;
use crate::model::Section;
use crate::subject::{Side, Subject};
use crate::text::{duration_us, number};

const MEGABYTES: [usize; 6] = [10, 100, 500, 2000, 4000, 8000];
/// A service and its replica each have the memory, and something must be left.
const SPARE_MEGABYTES: usize = 2000;
const RATE_PER_S: f64 = 300.0;
const X: &str = "resident MB";
/// How long the filling of gigabytes may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let (mut pauses, mut times, mut steps) = (Lines::default(), Lines::default(), Lines::default());
    let mut fills = Lines::default();
    for megabytes in MEGABYTES {
        let case = format!("{megabytes} MB");
        if 2 * megabytes + SPARE_MEGABYTES > available_megabytes()? {
            section.notes.push(format!(
                "{case}: not measured, the machine has no room for it twice now"
            ));
            continue;
        }
        let x = megabytes as f64;
        let mut refill_s = None;
        let measured = point(
            bench,
            section,
            &case,
            Side::Protected,
            &[("--megabytes", megabytes)],
            |subject| {
                let found = ask(bench, subject, 1, 1, Some(RATE_PER_S))?;
                refill_s = Some(refill(subject).context("filling a new standby")?);
                Ok(found)
            },
        );
        let Some(found) = measured else {
            continue;
        };
        let middle_us = found.window.latency_us(0.5);
        times.add("p50", x, middle_us);
        times.add("p99", x, found.window.latency_us(0.99));
        if let Some(seconds) = refill_s {
            fills.add("until protected again", x, seconds);
        }
        let Some(profile) = found.profile else {
            continue;
        };
        bench.tell(&format!(
            "{case}: answer p50 {}, pause p50 {}, filled anew in {} s",
            duration_us(middle_us),
            duration_us(profile.pause_us.p50),
            number(refill_s.unwrap_or(f64::NAN))
        ));
        pauses.add_pause("", x, &profile);
        add_steps(&mut steps, x, &profile);
        note_pause(section, &case, &profile);
    }
    file(
        section,
        [
            pauses.into_sweep("Pause of an epoch", X, "us"),
            times.into_sweep("Answer time, protected", X, "us"),
            fills.into_sweep("Filling a new standby while it serves", X, "seconds"),
        ],
    );
    file(section, steps_sweep(steps, "Steps of an epoch", X));
    Ok(())
}

/// Kills the standby; seconds until another one protects.
fn refill(subject: &Subject) -> Result<f64> {
    let service = subject.service().context("nothing protects it")?;
    let before = service.kill(Target::Standby, Signal::SIGKILL)?;
    let begun = Instant::now();
    wait_until("protection by another standby", PATIENCE, || {
        let status = service.status()?;
        let replaced = status.is_protected() && status.standby_pid != before.standby_pid;
        Ok(replaced.then(|| begun.elapsed().as_secs_f64()))
    })
}

fn available_megabytes() -> Result<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok());
    Ok(kilobytes.context("/proc/meminfo does not say what is available")? / 1000)
}
