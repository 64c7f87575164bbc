//! A server killed under load, and what each of its clients saw of it.

use std::time::Duration;

use anyhow::{Context, Result};
use unbroken_clients::requests::{self, Kind};
use unbroken_clients::{Report, Running, Timeline, config, irc};
use unbroken_harness::{KillEvent, KillPlan, Random, Target};

use crate::bench::{Bench, Served, finish};
use crate::model::{Failover, Section, Spread};
use crate::subject::{MakeCommand, Side, Subject};
use crate::text::number;

const KILLS: usize = 5;
const CLIENTS: usize = 20;
/// Of each client: with twenty of them each hears about a thousand a second.
const CHAT_RATE_PER_S: f64 = 50.0;
/// All together.
const STORE_RATE_PER_S: f64 = 20_000.0;
const WAIT: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(700));
/// How long after a kill a silence is put down to it.
const WINDOW_US: u64 = 300_000;
/// What a timeline keeps before and after a kill.
const SHOWN_US: (u64, u64) = (10_000, 100_000);

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let chat = |subject: &Subject| -> Result<Running> {
        let options = irc::Options {
            clients: CLIENTS,
            rate_per_s: CHAT_RATE_PER_S,
            ..irc::Options::default()
        };
        Ok(irc::start(subject.address(), &options)?)
    };
    let store = |subject: &Subject| -> Result<Running> {
        let options = requests::Options {
            kind: Kind::RedisSet(100),
            connections: CLIENTS,
            active: CLIENTS,
            rate_per_s: Some(STORE_RATE_PER_S),
        };
        Ok(requests::start(subject.address(), &options)?)
    };
    act(
        bench,
        section,
        "ngircd",
        config::IRC_PORT,
        &|place| Ok(config::ngircd(place)?),
        &chat,
    );
    act(
        bench,
        section,
        "redis",
        config::REDIS_PORT,
        &|place| Ok(config::redis(place)),
        &store,
    );
    let gaps: Vec<f64> = section
        .failovers
        .iter()
        .flat_map(|kill| kill.gaps_ms.clone())
        .collect();
    let takeovers: Vec<f64> = section
        .failovers
        .iter()
        .filter_map(|kill| kill.takeover_ms)
        .collect();
    if let (Some(gaps), Some(takeovers)) = (Spread::of(&gaps), Spread::of(&takeovers)) {
        section.set_figure("longest gap ms", gaps.most);
        section.set_figure("takeover ms", takeovers.middle);
        section.set_figure("longest takeover ms", takeovers.most);
    }
    section.set_figure("kills survived", section.failovers.len() as f64);
    Ok(())
}

/// One server with its load and its kills.
fn act(
    bench: &Bench,
    section: &mut Section,
    name: &str,
    port: u16,
    command: &MakeCommand<'_>,
    load: &dyn Fn(&Subject) -> Result<Running>,
) {
    let served = Served {
        name,
        port,
        command,
    };
    if let Err(cause) = perform(bench, section, &served, load) {
        bench.fail(section, name, &cause);
    }
}

fn perform(
    bench: &Bench,
    section: &mut Section,
    served: &Served<'_>,
    load: &dyn Fn(&Subject) -> Result<Running>,
) -> Result<()> {
    let subject = bench.start(Side::Protected, served)?;
    let running = load(&subject)?;
    let tally = std::sync::Arc::clone(running.tally());
    let plan = KillPlan {
        wait: WAIT,
        ..KillPlan::new(Target::Service, KILLS)
    };
    // A kill's own time is from before its victim was looked up, which takes milliseconds.
    let mut moments_us = Vec::new();
    let service = subject.service().context("nothing protects it")?;
    let kills = service.kill_repeatedly(&plan, &mut Random::from_seed(1), |event| {
        if matches!(event, KillEvent::Killed) {
            moments_us.push(tally.now_us());
        }
    })?;
    std::thread::sleep(WAIT.1);
    let report = finish(running)?;
    subject.stop()?;
    for (index, kill) in kills.iter().enumerate() {
        let zero_us = moments_us[index];
        let late_ms = (zero_us - tally.us_at(kill.at)) as f64 / 1e3;
        let seen = Failover {
            title: format!("{}, kill {}", served.name, index + 1),
            takeover_ms: kill.takeover_ms,
            protected_again_ms: kill.protected_again_ms - late_ms,
            clients: arrivals_ms(&report, zero_us),
            gaps_ms: gaps_ms(&report, zero_us),
            usual_gap_ms: report.usual_gap_us(&moments_us, WINDOW_US) as f64 / 1e3,
        };
        let longest = Spread::of(&seen.gaps_ms).map_or(f64::NAN, |gaps| gaps.most);
        bench.tell(&format!(
            "{}: takeover {} ms, longest silence {} ms, protected again after {} ms",
            seen.title,
            number_or_dash(seen.takeover_ms),
            number(longest),
            number(seen.protected_again_ms)
        ));
        section.failovers.push(seen);
    }
    Ok(())
}

fn number_or_dash(value: Option<f64>) -> String {
    value.map_or("-".into(), number)
}

/// When each client heard something around the kill, counted from it.
fn arrivals_ms(report: &Report, zero_us: u64) -> Vec<Vec<f64>> {
    let shown = zero_us.saturating_sub(SHOWN_US.0)..zero_us + SHOWN_US.1;
    let arrivals = |line: &Timeline| {
        let all = line.received_us().iter().filter(|at| shown.contains(at));
        all.map(|at| (*at as f64 - zero_us as f64) / 1e3).collect()
    };
    report.timelines.iter().map(arrivals).collect()
}

/// Each client's longest silence around the kill.
fn gaps_ms(report: &Report, zero_us: u64) -> Vec<f64> {
    let gap_ms = |line: &Timeline| line.longest_gap_us(zero_us, zero_us + WINDOW_US) as f64 / 1e3;
    report.timelines.iter().map(gap_ms).collect()
}
