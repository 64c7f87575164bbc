//! What the scenarios share: each plays a host in a network namespace of its own, puts a server
//! under protection, loads it, harms it, and asks the clients what they saw.

use anyhow::{Context, Result, anyhow, ensure};
use unbroken_clients::{Report, Running, config, irc};
use unbroken_harness::{Kill, KillPlan, Launch, Random, Scratch, Service, Target, namespace};

/// Where our own small servers listen.
pub const PORT: u16 = 7000;
/// How long after a kill a silence is put down to it.
pub const GAP_WINDOW_US: u64 = 300_000;

/// Gives the calling test its own network namespace and seeded random moments.
pub fn host() -> Result<Random> {
    namespace::enter_new()?;
    Ok(Random::seeded())
}

/// A protected chat server and where it listens. The directory must outlive it.
pub fn chat(scratch: &Scratch) -> Result<(Service, std::net::SocketAddr)> {
    let service = Service::start(&Launch::new("irc", config::ngircd(scratch.path())?))?;
    let address = service.listening(config::IRC_PORT)?;
    Ok((service, address))
}

/// A chat small enough for a busy machine, large enough that every kill meets messages under way.
pub fn small_chat() -> irc::Options {
    irc::Options {
        clients: 8,
        rate_per_s: 20.0,
        message_bytes: 80,
    }
}

/// One of our own small servers, protected, and where it listens.
pub fn own_server(name: &str) -> Result<(Service, std::net::SocketAddr)> {
    let service = Service::start(&Launch::new(name, config::own_program(name, PORT)?))?;
    let address = service.listening(PORT)?;
    Ok((service, address))
}

/// Kills as planned under a load, and fails unless the load saw nothing of it and nothing is left
/// behind after the stop. Returns what was measured.
pub fn survive(
    service: Service,
    load: Running,
    plan: &KillPlan,
    random: &mut Random,
) -> Result<Vec<Kill>> {
    let tally = std::sync::Arc::clone(load.tally());
    let kills = service.kill_repeatedly(plan, random, |_| {});
    let report = load.finish();
    let kills = kills.with_context(|| format!("meanwhile {:?}", report.totals))?;
    let moments_us: Vec<u64> = kills.iter().map(|kill| tally.us_at(kill.at)).collect();
    print_kills(
        plan.target,
        &kills,
        &report.gaps_us(&moments_us, GAP_WINDOW_US),
    );
    clean(&report)?;
    ensure!(
        kills.len() == plan.times,
        "{} kills of {}",
        kills.len(),
        plan.times
    );
    service.stop()?;
    Ok(kills)
}

/// Fails with the load's own words unless it saw nothing wrong.
pub fn clean(report: &Report) -> Result<()> {
    println!("{}: {:?}", report.name, report.totals);
    report.verdict().map_err(|why| anyhow!(why))
}

fn print_kills(target: Target, kills: &[Kill], gaps_us: &[u64]) {
    for (number, kill) in kills.iter().enumerate() {
        let gap_ms = gaps_us
            .get(number)
            .map_or(0.0, |gap_us| *gap_us as f64 / 1e3);
        println!(
            "kill {} of {target:?}: longest gap {gap_ms:.1} ms, takeover {:?} ms, protected again \
             after {:.0} ms",
            number + 1,
            kill.takeover_ms,
            kill.protected_again_ms
        );
    }
}
