//! From one connection to ten thousand: all but one idle, or all of them asking.

use anyhow::Result;

use super::{Lines, add_steps, ask, file, note_pause, point, steps_sweep};
use crate::bench::Bench;
use crate::model::Section;
use crate::subject::Side;
use crate::text::{count, duration_us, number};

const CONNECTIONS: [usize; 5] = [1, 10, 100, 1000, 10_000];
const X: &str = "connections";

/// One connection asks, the others are open.
pub fn idle(bench: &Bench, section: &mut Section) -> Result<()> {
    sweep(bench, section, |_| 1);
    Ok(())
}

/// All of them ask.
pub fn active(bench: &Bench, section: &mut Section) -> Result<()> {
    sweep(bench, section, |connections| connections);
    Ok(())
}

fn sweep(bench: &Bench, section: &mut Section, active: fn(usize) -> usize) {
    let (mut pauses, mut times, mut steps) = (Lines::default(), Lines::default(), Lines::default());
    let mut answers = Lines::default();
    for connections in CONNECTIONS {
        let x = connections as f64;
        for side in [Side::Unprotected, Side::Protected] {
            let case = format!("{}, {}", count(connections, "connection"), side.name());
            let measured = point(bench, section, &case, side, &[], |subject| {
                ask(bench, subject, connections, active(connections), None)
            });
            let Some(found) = measured else {
                continue;
            };
            let middle_us = found.window.latency_us(0.5);
            times.add(side.name(), x, middle_us);
            answers.add(side.name(), x, found.window.received_per_s);
            let pause = found.profile.as_ref().map_or(String::new(), |profile| {
                let pause_us = profile.pause_us;
                format!(
                    ", pause p50 {}, p99 {}",
                    duration_us(pause_us.p50),
                    duration_us(pause_us.p99)
                )
            });
            bench.tell(&format!(
                "{case}: {} answers/s, p50 {}{pause}",
                number(found.window.received_per_s),
                duration_us(middle_us)
            ));
            if let Some(profile) = found.profile {
                pauses.add_pause("", x, &profile);
                add_steps(&mut steps, x, &profile);
                note_pause(section, &format!("{connections} connections"), &profile);
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
    file(section, steps_sweep(steps, "Steps of an epoch", X));
}
