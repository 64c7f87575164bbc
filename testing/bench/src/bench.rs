//! What every workload needs: sides in turn, windows of time, and somewhere to put what was seen.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use unbroken_clients::Running;

use crate::cores::{Busy, Cores};
use crate::model::{Better, Comparison, Profile, Section};
use crate::subject::{MakeCommand, Side, Subject};

/// Before each window: caches fill, connections open their windows, the product finds its pace.
const WARM_UP: Duration = Duration::from_millis(300);

/// One run of the benchmark.
#[derive(Debug)]
pub struct Bench {
    pub cores: Cores,
    /// Only what the promises need, in little time.
    pub short: bool,
    /// Says nothing of single runs.
    pub quiet: bool,
    /// How often each side runs.
    pub rounds: usize,
}

/// The server of a workload.
pub struct Served<'a> {
    pub name: &'a str,
    pub port: u16,
    pub command: &'a MakeCommand<'a>,
}

/// One number that a side gave.
#[derive(Debug, Clone)]
pub struct Reading {
    pub measure: String,
    pub unit: &'static str,
    pub better: Better,
    pub value: f64,
    pub busy: Busy,
}

/// What a load did in a window of time.
#[derive(Debug)]
pub struct Window {
    pub received_per_s: f64,
    pub latency_ns: Histogram<u64>,
    pub busy: Busy,
}

impl Reading {
    pub fn higher(measure: impl Into<String>, unit: &'static str, value: f64, busy: Busy) -> Self {
        let measure = measure.into();
        Self {
            measure,
            unit,
            better: Better::Higher,
            value,
            busy,
        }
    }

    pub fn lower(measure: impl Into<String>, unit: &'static str, value: f64, busy: Busy) -> Self {
        Self {
            better: Better::Lower,
            ..Self::higher(measure, unit, value, busy)
        }
    }
}

impl Window {
    pub fn latency_us(&self, quantile: f64) -> f64 {
        self.latency_ns.value_at_quantile(quantile) as f64 / 1e3
    }

    /// Middle and tail of the answer times under this name.
    pub fn latencies(&self, name: &str) -> [Reading; 2] {
        let reading = |part: &str, quantile| {
            let value = self.latency_us(quantile);
            Reading::lower(format!("{name} {part}"), "us", value, self.busy)
        };
        [reading("p50", 0.5), reading("p99", 0.99)]
    }
}

impl Bench {
    pub fn new(short: bool, quiet: bool, rounds: usize) -> Result<Self> {
        let cores = Cores::find()?;
        cores.only_others()?;
        Ok(Self {
            cores,
            short,
            quiet,
            rounds,
        })
    }

    /// What else runs on this machine now, in words; `None` when it is next to nothing.
    pub fn disturbance(&self) -> Result<Option<String>> {
        const LOOK: Duration = Duration::from_millis(300);
        const TOLERATED: f64 = 0.08;
        let since = self.cores.since_now()?;
        std::thread::sleep(LOOK);
        let busy = self.cores.busy(&since)?;
        let disturbed = busy.service.max(busy.others).max(busy.stolen) > TOLERATED;
        Ok(disturbed.then(|| {
            format!(
                "The machine was not quiet before this: server's core {:.0} %, others {:.0} % busy, \
                 {:.0} % stolen.",
                busy.service * 100.0,
                busy.others * 100.0,
                busy.stolen * 100.0
            )
        }))
    }

    pub fn window(&self) -> Duration {
        Duration::from_millis(if self.short { 700 } else { 1200 })
    }

    /// Says how far the run is.
    pub fn tell(&self, line: &str) {
        if !self.quiet {
            println!("  {line}");
        }
    }

    pub fn start(&self, side: Side, served: &Served<'_>) -> Result<Subject> {
        Subject::start(&self.cores, side, served.name, served.port, served.command)
    }

    /// Lets a load warm up, then looks at it for a window. `name` tells the windows of one run
    /// apart; one that has only one needs none.
    pub fn watch(&self, subject: &Subject, running: &Running, name: &str) -> Result<Window> {
        std::thread::sleep(WARM_UP);
        let tally = running.tally();
        let totals = subject.totals()?;
        drop(tally.take_latency_ns());
        let (since, begun) = (self.cores.since_now()?, Instant::now());
        let before = tally.received();
        std::thread::sleep(self.window());
        let received = tally.received() - before;
        let seconds = begun.elapsed().as_secs_f64();
        if running.has_ended() {
            bail!("the load ended early: {:?}", tally.snapshot().failures);
        }
        let window = Window {
            received_per_s: received as f64 / seconds,
            latency_ns: tally.take_latency_ns(),
            busy: self.cores.busy(&since)?,
        };
        subject.note_profile(name, totals.as_ref(), begun.elapsed().as_secs_f64())?;
        Ok(window)
    }

    /// Waits until a load that has fallen silent hears nothing more.
    pub fn settle(&self, running: &Running) {
        const QUIET: Duration = Duration::from_millis(100);
        const PATIENCE: Duration = Duration::from_secs(10);
        let begun = Instant::now();
        let mut received = running.tally().received();
        while begun.elapsed() < PATIENCE {
            std::thread::sleep(QUIET);
            let now = running.tally().received();
            if now == received {
                return;
            }
            received = now;
        }
    }

    /// As [`Bench::watch`], for a load that is a program of its own.
    pub fn watch_program<T>(
        &self,
        subject: &Subject,
        program: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Busy)> {
        let totals = subject.totals()?;
        let (since, begun) = (self.cores.since_now()?, Instant::now());
        let found = program()?;
        let busy = self.cores.busy(&since)?;
        subject.note_profile("", totals.as_ref(), begun.elapsed().as_secs_f64())?;
        Ok((found, busy))
    }

    /// Runs both sides in turn, each on a server of its own, and files what `measure` reads. What
    /// fails becomes a failure of the section, and the case goes no further.
    pub fn compare(
        &self,
        section: &mut Section,
        served: &Served<'_>,
        case: &str,
        mut measure: impl FnMut(&Subject, Side) -> Result<Vec<Reading>>,
    ) {
        for _ in 0..self.rounds {
            for side in [Side::Unprotected, Side::Protected] {
                match self.one_run(side, served, &mut measure) {
                    Ok((readings, profiles)) => {
                        self.tell_readings(case, side, &readings);
                        file(section, case, side, readings);
                        for mut profile in profiles {
                            profile.case = [case, &profile.case].join(" ").trim_end().into();
                            section.profiles.retain(|other| other.case != profile.case);
                            section.profiles.push(profile);
                        }
                    }
                    Err(cause) => {
                        self.fail(section, &format!("{case}, {}", side.name()), &cause);
                        return;
                    }
                }
            }
        }
    }

    fn one_run(
        &self,
        side: Side,
        served: &Served<'_>,
        measure: &mut impl FnMut(&Subject, Side) -> Result<Vec<Reading>>,
    ) -> Result<(Vec<Reading>, Vec<Profile>)> {
        let subject = self.start(side, served)?;
        let outcome = measure(&subject, side);
        let readings = outcome.with_context(|| match subject.service() {
            Some(service) => format!("state {}", state(service)),
            None => served.name.to_string(),
        })?;
        let profiles = subject.take_profiles();
        subject.stop().context("ending the server")?;
        Ok((readings, profiles))
    }

    /// Notes that something could not be measured; a number that is missing says so.
    pub fn fail(&self, section: &mut Section, what: &str, cause: &anyhow::Error) {
        // Errors bring what clients and logs said; the first lines say what it is.
        let text = format!("{what}: {cause:#}");
        let line = text.lines().take(4).collect::<Vec<_>>().join(" | ");
        println!("  FAILED {line}");
        section.failures.push(line);
    }

    fn tell_readings(&self, case: &str, side: Side, readings: &[Reading]) {
        let busy = readings
            .first()
            .map(|reading| reading.busy)
            .unwrap_or_default();
        let values: Vec<String> = readings
            .iter()
            .map(|reading| {
                let value = crate::text::number(reading.value);
                format!("{} {value} {}", reading.measure, reading.unit)
            })
            .collect();
        self.tell(&format!(
            "{case}, {}: {} (service core {:.0} %, others {:.0} %)",
            side.name(),
            values.join(", "),
            busy.service * 100.0,
            busy.others * 100.0
        ));
    }
}

fn state(service: &unbroken_harness::Service) -> String {
    service.status().map_or_else(
        |cause| format!("unknown: {cause:#}"),
        |status| {
            let reason = status.whole["reason"].as_str().unwrap_or_default();
            format!("{} {reason}", status.state)
        },
    )
}

/// Puts readings where those of earlier rounds are.
fn file(section: &mut Section, case: &str, side: Side, readings: Vec<Reading>) {
    for reading in readings {
        let known = section
            .comparisons
            .iter()
            .position(|row| row.case == case && row.measure == reading.measure);
        let index = known.unwrap_or_else(|| {
            section.comparisons.push(Comparison {
                case: case.into(),
                measure: reading.measure.clone(),
                unit: reading.unit.into(),
                better: reading.better,
                unprotected: Vec::new(),
                protected: Vec::new(),
                busy_unprotected: Busy::default(),
                busy_protected: Busy::default(),
            });
            section.comparisons.len() - 1
        });
        let row = &mut section.comparisons[index];
        match side {
            Side::Unprotected => {
                row.unprotected.push(reading.value);
                row.busy_unprotected = reading.busy;
            }
            Side::Protected => {
                row.protected.push(reading.value);
                row.busy_protected = reading.busy;
            }
        }
    }
}

/// Ends a load and fails when a client noticed anything.
pub fn finish(running: Running) -> Result<unbroken_clients::Report> {
    let report = running.finish();
    report.verdict().map_err(anyhow::Error::msg)?;
    Ok(report)
}
