//! Pages that the service writes each millisecond, whatever its clients do.

use anyhow::Result;

use super::{Lines, add_steps, ask, file, point, steps_sweep};
use crate::bench::Bench;
use crate::model::Section;
use crate::subject::Side;
use crate::text::{bytes, duration_us, number};

const PAGES_PER_MS: [usize; 6] = [1, 3, 10, 30, 100, 300];
const MEGABYTES: usize = 64;
/// Requests a second: enough that answers show what the writing costs them, little enough that
/// they are not the load.
const RATE_PER_S: f64 = 300.0;
const X: &str = "pages written per millisecond";

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let (mut pauses, mut times, mut steps) = (Lines::default(), Lines::default(), Lines::default());
    let mut amounts = Lines::default();
    for pages in PAGES_PER_MS {
        let arguments = [("--megabytes", MEGABYTES), ("--pages-per-ms", pages)];
        let x = pages as f64;
        for side in [Side::Unprotected, Side::Protected] {
            let case = format!("{pages} pages/ms, {}", side.name());
            let measured = point(bench, section, &case, side, &arguments, |subject| {
                ask(bench, subject, 1, 1, Some(RATE_PER_S))
            });
            let Some(found) = measured else {
                continue;
            };
            let middle_us = found.window.latency_us(0.5);
            times.add(&format!("p50, {}", side.name()), x, middle_us);
            times.add(
                &format!("p99, {}", side.name()),
                x,
                found.window.latency_us(0.99),
            );
            let Some(profile) = found.profile else {
                bench.tell(&format!("{case}: answer p50 {}", duration_us(middle_us)));
                continue;
            };
            bench.tell(&format!(
                "{case}: answer p50 {}, pause p50 {}, {} pages and {} an epoch",
                duration_us(middle_us),
                duration_us(profile.pause_us.p50),
                number(profile.dirty_pages_per_epoch),
                bytes(profile.bytes_per_epoch)
            ));
            pauses.add_pause("", x, &profile);
            amounts.add("bytes per dirty page", x, per_page(&profile));
            add_steps(&mut steps, x, &profile);
        }
    }
    file(
        section,
        [
            pauses.into_sweep("Pause of an epoch", X, "us"),
            times.into_sweep("Answer time", X, "us"),
            amounts.into_sweep("Bytes shipped for each dirty page", X, "bytes"),
        ],
    );
    file(section, steps_sweep(steps, "Steps of an epoch", X));
    Ok(())
}

fn per_page(profile: &crate::model::Profile) -> f64 {
    profile.bytes_per_epoch / profile.dirty_pages_per_epoch.max(1.0)
}
