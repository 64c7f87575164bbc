//! How the figures of one small server follow one quantity: connections, memory, dirty pages,
//! threads.

pub mod connections;
pub mod dirty;
pub mod memory;
pub mod threads;

use anyhow::Result;
use unbroken_clients::config::find_own_program;
use unbroken_clients::requests::{self, Kind, Options};

use crate::bench::{Bench, Served, Window, finish};
use crate::model::{Line, Profile, Section, Sweep};
use crate::subject::{Side, Subject};

pub const PORT: u16 = 7000;
const BYTES: usize = 64;

/// The command line of the holder.
pub fn holder(arguments: &[(&str, usize)]) -> Result<Vec<String>> {
    let mut words = vec![find_own_program("holder")?.to_string_lossy().into_owned()];
    words.push(PORT.to_string());
    for (name, value) in arguments {
        words.extend([name.to_string(), value.to_string()]);
    }
    Ok(words)
}

/// What one point of a sweep showed.
pub struct Point {
    pub window: Window,
    /// Of the protected side.
    pub profile: Option<Profile>,
}

/// Asks over so many connections, of which so many are active, for a window.
pub fn ask(
    bench: &Bench,
    subject: &Subject,
    connections: usize,
    active: usize,
    rate_per_s: Option<f64>,
) -> Result<Point> {
    let options = Options {
        kind: Kind::Echo(BYTES),
        connections,
        active,
        rate_per_s,
    };
    let running = requests::start(subject.address(), &options)?;
    let window = bench.watch(subject, &running, "")?;
    finish(running)?;
    Ok(Point {
        window,
        profile: subject.take_profiles().pop(),
    })
}

/// One point on one side, on a server of its own. One that fails becomes a failure of the section,
/// and the sweep goes on without it.
pub fn point(
    bench: &Bench,
    section: &mut Section,
    case: &str,
    side: Side,
    arguments: &[(&str, usize)],
    measure: impl FnOnce(&Subject) -> Result<Point>,
) -> Option<Point> {
    let command = |_: &std::path::Path| holder(arguments);
    let served = Served {
        name: "holder",
        port: PORT,
        command: &command,
    };
    let measured = bench.start(side, &served).and_then(|subject| {
        let point = measure(&subject)?;
        subject.stop()?;
        Ok(point)
    });
    measured
        .inspect_err(|cause| bench.fail(section, case, cause))
        .ok()
}

/// Lines that grow by a point each time something is measured.
#[derive(Debug, Default)]
pub struct Lines(Vec<Line>);

impl Lines {
    pub fn add(&mut self, name: &str, x: f64, y: f64) {
        let index = self.0.iter().position(|line| line.name == name);
        let index = index.unwrap_or_else(|| {
            self.0.push(Line {
                name: name.into(),
                points: Vec::new(),
            });
            self.0.len() - 1
        });
        self.0[index].points.push((x, y));
    }

    /// The pause of an epoch and how long output waits, under a prefix that tells variants apart.
    pub fn add_pause(&mut self, prefix: &str, x: f64, profile: &Profile) {
        self.add(&format!("{prefix}pause p50"), x, profile.pause_us.p50);
        self.add(&format!("{prefix}pause p99"), x, profile.pause_us.p99);
    }

    pub fn into_sweep(self, title: &str, x: &str, y: &str) -> Sweep {
        Sweep {
            title: title.into(),
            x: x.into(),
            y: y.into(),
            lines: self.0,
        }
    }
}

/// The largest steps of each profile as lines.
pub fn add_steps(lines: &mut Lines, x: f64, profile: &Profile) {
    for (name, times) in &profile.steps_us {
        lines.add(name, x, times.p50);
    }
}

/// The name of a part (p50, p99) of the pause among the figures by which targets are judged.
pub fn pause_figure(part: &str, case: &str) -> String {
    format!("pause {part}, {case}")
}

/// Keeps the pause of one point for the targets.
pub fn note_pause(section: &mut Section, case: &str, profile: &Profile) {
    let pause_us = profile.pause_us;
    section.set_figure(&pause_figure("p50", case), pause_us.p50);
    section.set_figure(&pause_figure("p99", case), pause_us.p99);
}

/// Keeps the lines of the few steps that ever take longest: more cannot be told apart.
pub fn steps_sweep(lines: Lines, title: &str, x: &str) -> Option<Sweep> {
    const SHOWN: usize = 6;
    let mut sweep = lines.into_sweep(title, x, "us, p50");
    let longest = |line: &Line| line.points.iter().map(|point| point.1).fold(0.0, f64::max);
    sweep
        .lines
        .sort_by(|one, other| longest(other).total_cmp(&longest(one)));
    sweep.lines.truncate(SHOWN);
    (!sweep.lines.is_empty()).then_some(sweep)
}

/// Puts the plots that have anything to show into the section.
pub fn file(section: &mut Section, sweeps: impl IntoIterator<Item = Sweep>) {
    section
        .sweeps
        .extend(sweeps.into_iter().filter(|sweep| !sweep.lines.is_empty()));
}
