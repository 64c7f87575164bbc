//! From one connection to ten thousand, all of them asking, or all but one idle.

use anyhow::Result;

use super::{Lines, add_steps, ask, file, point, steps_sweep};
use crate::bench::Bench;
use crate::model::Section;
use crate::subject::Side;
use crate::text::{count, duration_us, number};

const CONNECTIONS: [usize; 5] = [1, 10, 100, 1000, 10_000];
const X: &str = "connections";

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let (mut pauses, mut times, mut steps) = (Lines::default(), Lines::default(), Lines::default());
    let mut answers = Lines::default();
    for (manner, all_ask) in [("idle", false), ("active", true)] {
        for connections in CONNECTIONS {
            let active = if all_ask { connections } else { 1 };
            let x = connections as f64;
            for side in [Side::Unprotected, Side::Protected] {
                let name = format!("{manner}, {}", side.name());
                let case = format!("{}, {name}", count(connections, "connection"));
                let measured = point(bench, side, &[], |subject| {
                    ask(bench, subject, connections, active, None)
                });
                let found = match measured {
                    Ok(found) => found,
                    Err(cause) => {
                        bench.fail(section, &case, &cause);
                        continue;
                    }
                };
                let middle_us = found.window.latency_us(0.5);
                bench.tell(&format!(
                    "{case}: {} answers/s, p50 {}",
                    number(found.window.received_per_s),
                    duration_us(middle_us)
                ));
                times.add(&name, x, middle_us);
                answers.add(&name, x, found.window.received_per_s);
                let Some(profile) = found.profile else {
                    continue;
                };
                pauses.add_pause(&format!("{manner}: "), x, &profile);
                section.set_figure(
                    &format!("pause p50, {connections} {manner}"),
                    profile.pause_us.p50,
                );
                if !all_ask {
                    add_steps(&mut steps, x, &profile);
                }
            }
        }
    }
    file(
        section,
        [
            pauses.into_sweep("Pause of an epoch", X, "us"),
            times.into_sweep("Answer time p50", X, "us"),
            answers.into_sweep("Answers", X, "per second"),
        ],
    );
    file(
        section,
        steps_sweep(steps, "Steps of an epoch, all but one idle", X),
    );
    Ok(())
}
