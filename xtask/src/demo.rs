//! `cargo xtask demo`: two servers nobody prepared for this, killed under load, and what their
//! clients see of it.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use unbroken_clients::{ClientError, Report, Running, config, icecast, irc};
use unbroken_harness::{
    Kill, KillEvent, KillPlan, Launch, Random, Scratch, Service, Target, assert_namespace_empty,
    namespace, run_to_end,
};

use crate::build;
use crate::packages::{self, install_missing};
use crate::table::{Row, Table, Unit};
use crate::tools::require_root;

const KILLS: usize = 10;
/// The wait before each kill lies between these: long enough to see the load run, short enough
/// that all of it takes less than two minutes.
const WAIT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(2500));
/// How long after a kill a silence is put down to it.
const GAP_WINDOW_US: u64 = 300_000;

/// One server of the demonstration, with its load.
struct Act {
    server: &'static str,
    unit: Unit,
    service: Service,
    load: Running,
    progress: Mutex<Progress>,
}

/// What the killing thread tells the table.
struct Progress {
    state: &'static str,
    killed: usize,
    kills: Vec<Kill>,
}

/// Shows it; an error when a client lost anything, got anything twice, or had to reconnect.
pub fn run() -> Result<()> {
    require_root("demo")?;
    install_missing(&[packages::IPROUTE, packages::NGIRCD, packages::ICECAST])?;
    build::product()?;
    check_machine()?;
    namespace::enter_new()?;
    let scratch = Scratch::new("demo")?;
    println!("starting ngircd with 20 clients and icecast2 with a source and 10 listeners");
    let acts = [
        Act::start(
            "ngircd",
            Unit::Messages,
            config::ngircd(scratch.path())?,
            config::IRC_PORT,
            |at| irc::start(at, &irc::Options::default()),
        )?,
        Act::start(
            "icecast2",
            Unit::Bytes,
            config::icecast(scratch.path())?,
            config::ICECAST_PORT,
            |at| icecast::start(at, &icecast::Options::default()),
        )?,
    ];
    println!("killing each server {KILLS} times with SIGKILL, at random moments, under load");
    let mut random = Random::seeded();
    let performed = perform(&acts, &mut random);
    let mut table = Table::new();
    if performed.is_err() {
        table.draw_now(&acts.iter().map(Act::row).collect::<Vec<_>>());
        return performed;
    }
    let mut verdicts = Vec::new();
    let mut rows = Vec::new();
    for act in acts {
        let (row, verdict) = act.finish()?;
        rows.push(row);
        verdicts.push(verdict);
    }
    assert_namespace_empty()?;
    println!("\nin the end, after everything under way had arrived:");
    table.draw_now(&rows);
    judge(verdicts)
}

/// Asks the product whether this machine can do it, and shows its answer when not.
fn check_machine() -> Result<()> {
    let outcome = run_to_end(&["check"], None)?;
    if outcome.code() != Some(0) {
        bail!(
            "this machine cannot protect a service yet:\n{}{}",
            outcome.stdout,
            outcome.stderr.trim_end()
        );
    }
    Ok(())
}

/// Kills both servers as planned, each from a thread of its own, and draws the table meanwhile.
fn perform(acts: &[Act], random: &mut Random) -> Result<()> {
    let plan = KillPlan {
        wait: WAIT,
        ..KillPlan::new(Target::Service, KILLS)
    };
    std::thread::scope(|scope| {
        let killers: Vec<_> = acts
            .iter()
            .map(|act| {
                let mut own_random = Random::from_seed(random.draw());
                scope.spawn(move || {
                    let killed = act
                        .service
                        .kill_repeatedly(&plan, &mut own_random, |event| {
                            act.note(&event);
                        });
                    killed.map(drop).with_context(|| act.server)
                })
            })
            .collect();
        let mut table = Table::new();
        while killers.iter().any(|killer| !killer.is_finished()) {
            table.draw(&acts.iter().map(Act::row).collect::<Vec<_>>());
            std::thread::sleep(Duration::from_millis(50));
        }
        for killer in killers {
            killer
                .join()
                .map_err(|_| anyhow!("a killing thread panicked"))??;
        }
        Ok(())
    })
}

impl Act {
    fn start(
        server: &'static str,
        unit: Unit,
        command: Vec<String>,
        port: u16,
        load: impl FnOnce(SocketAddr) -> Result<Running, ClientError>,
    ) -> Result<Self> {
        let service = Service::start(&Launch::new(server, command).unverified())?;
        let load = load(service.listening(port)?)?;
        let progress = Mutex::new(Progress {
            state: "protected",
            killed: 0,
            kills: Vec::new(),
        });
        Ok(Self {
            server,
            unit,
            service,
            load,
            progress,
        })
    }

    fn note(&self, event: &KillEvent<'_>) {
        let Ok(mut progress) = self.progress.lock() else {
            return;
        };
        match event {
            KillEvent::Killed => {
                progress.killed += 1;
                progress.state = "killed";
            }
            KillEvent::Recovered(kill) => {
                progress.kills.push((*kill).clone());
                progress.state = "protected";
            }
        }
    }

    fn row(&self) -> Row {
        let progress = self.progress.lock();
        let (state, killed, kills) = progress
            .map(|progress| (progress.state, progress.killed, progress.kills.clone()))
            .unwrap_or_default();
        Row {
            server: self.server,
            state,
            kills: killed,
            kills_planned: KILLS,
            unit: self.unit,
            totals: self.load.tally().snapshot(),
            takeovers_ms: kills.iter().filter_map(|kill| kill.takeover_ms).collect(),
        }
    }

    /// Ends the load, then the service; says what the clients saw.
    fn finish(self) -> Result<(Row, Result<String, String>)> {
        let mut row = self.row();
        let tally = std::sync::Arc::clone(self.load.tally());
        let report = self.load.finish();
        row.totals = report.totals.clone();
        row.state = "stopped";
        let kills = self
            .progress
            .into_inner()
            .map(|progress| progress.kills)
            .unwrap_or_default();
        let moments_us: Vec<u64> = kills.iter().map(|kill| tally.us_at(kill.at)).collect();
        let summary = summary(self.server, &report, &moments_us);
        self.service
            .stop_beside_others()
            .with_context(|| format!("stopping {}", self.server))?;
        Ok((row, report.verdict().map(|()| summary)))
    }
}

fn summary(server: &str, report: &Report, moments_us: &[u64]) -> String {
    let gaps_us = report.gaps_us(moments_us, GAP_WINDOW_US);
    let longest_us = gaps_us.iter().max().copied().unwrap_or(0);
    format!(
        "{server}: the longest silence any client heard around a kill was {:.1} ms, at other times \
         {:.1} ms",
        longest_us as f64 / 1e3,
        report.usual_gap_us(moments_us, GAP_WINDOW_US) as f64 / 1e3
    )
}

fn judge(verdicts: Vec<Result<String, String>>) -> Result<()> {
    let mut wrong = Vec::new();
    for verdict in verdicts {
        match verdict {
            Ok(summary) => println!("{summary}"),
            Err(why) => wrong.push(why),
        }
    }
    if !wrong.is_empty() {
        bail!("a client noticed:\n{}", wrong.join("\n"));
    }
    println!("nothing was lost, nothing came twice, nobody had to reconnect");
    Ok(())
}
