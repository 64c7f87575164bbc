//! From one thread to sixty-four: each has to be stopped for every epoch.

use anyhow::Result;

use super::{Lines, add_steps, ask, file, point, steps_sweep};
use crate::bench::Bench;
use crate::model::Section;
use crate::subject::Side;
use crate::text::{count, duration_us};

const THREADS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const X: &str = "threads";

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let (mut pauses, mut times, mut steps) = (Lines::default(), Lines::default(), Lines::default());
    for (manner, all_ask) in [("one asked", false), ("all asked", true)] {
        for threads in THREADS {
            let connections = if all_ask { threads } else { 1 };
            for side in [Side::Unprotected, Side::Protected] {
                let name = format!("{manner}, {}", side.name());
                let case = format!("{}, {name}", count(threads, "thread"));
                let measured = point(
                    bench,
                    section,
                    &case,
                    side,
                    &[("--threads", threads)],
                    |subject| ask(bench, subject, connections, connections, None),
                );
                let Some(found) = measured else {
                    continue;
                };
                let middle_us = found.window.latency_us(0.5);
                bench.tell(&format!("{case}: p50 {}", duration_us(middle_us)));
                times.add(&name, threads as f64, middle_us);
                if let Some(profile) = found.profile {
                    pauses.add_pause(&format!("{manner}: "), threads as f64, &profile);
                    if !all_ask {
                        add_steps(&mut steps, threads as f64, &profile);
                    }
                }
            }
        }
    }
    file(
        section,
        [
            pauses.into_sweep("Pause of an epoch", X, "us"),
            times.into_sweep("Answer time p50", X, "us"),
        ],
    );
    file(
        section,
        steps_sweep(steps, "Steps of an epoch, one thread asked", X),
    );
    Ok(())
}
