//! A server killed under load, and what each of its clients saw of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use unbroken_clients::requests::{self, Kind};
use unbroken_clients::{Report, Running, Tally, config, irc};
use unbroken_harness::{Random, Service, Signal, send};

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

/// A kill under way.
struct Death {
    at: Instant,
    takeover_ms: Option<f64>,
    protected_again_ms: f64,
}

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
    let mut random = Random::from_seed(1);
    let mut deaths = Vec::new();
    let service = subject.service().context("nothing protects it")?;
    for number in 1..=KILLS {
        std::thread::sleep(random.between(WAIT.0, WAIT.1));
        deaths.push(kill(service).with_context(|| format!("kill {number}"))?);
    }
    std::thread::sleep(WAIT.1);
    let report = finish(running)?;
    subject.stop()?;
    for (index, death) in (1..).zip(&deaths) {
        let title = format!("{}, kill {index}", served.name);
        let seen = seen(title, death, &tally, &report, &deaths);
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

/// Kills the service's first process and waits until the service is protected again.
fn kill(service: &Service) -> Result<Death> {
    let before = service.status()?;
    let pid = before
        .service_pids
        .first()
        .context("the service has no process")?;
    let at = Instant::now();
    if !send(*pid, Signal::SIGKILL)? {
        bail!("process {pid} is gone already");
    }
    let after = service.wait_for("protection after the kill", |status| {
        status.is_protected() && status.takeovers > before.takeovers
    })?;
    Ok(Death {
        at,
        takeover_ms: after.last_takeover_ms,
        protected_again_ms: at.elapsed().as_secs_f64() * 1e3,
    })
}

fn seen(
    title: String,
    death: &Death,
    tally: &Tally,
    report: &Report,
    deaths: &[Death],
) -> Failover {
    let zero_us = tally.us_at(death.at);
    let moments: Vec<u64> = deaths.iter().map(|death| tally.us_at(death.at)).collect();
    let lines = &report.timelines;
    let from_us = zero_us.saturating_sub(SHOWN_US.0);
    let arrivals = |line: &unbroken_clients::Timeline| {
        let all = line.received_us().iter();
        all.filter(|at| (from_us..zero_us + SHOWN_US.1).contains(at))
            .map(|at| (*at as f64 - zero_us as f64) / 1e3)
            .collect()
    };
    let gap_ms = |line: &unbroken_clients::Timeline| {
        line.longest_gap_us(zero_us, zero_us + WINDOW_US) as f64 / 1e3
    };
    Failover {
        title,
        takeover_ms: death.takeover_ms,
        protected_again_ms: death.protected_again_ms,
        clients: lines.iter().map(arrivals).collect(),
        gaps_ms: lines.iter().map(gap_ms).collect(),
        usual_gap_ms: report.usual_gap_us(&moments, WINDOW_US) as f64 / 1e3,
    }
}
