//! The clients against unprotected servers: they find nothing wrong while the server lives, and
//! they do notice when it dies. A client that cannot fail would prove nothing.

use std::time::Duration;

use anyhow::{Result, ensure};
use unbroken_clients::{Running, bulk, churn, config, icecast, irc, latency, redis, requests};
use unbroken_harness::{PATIENCE, Plain, Scratch, namespace, wait_until};

const SHORT: Duration = Duration::from_millis(1500);
const PORT: u16 = 7000;

fn verdict(report: &unbroken_clients::Report) -> Result<()> {
    report.verdict().map_err(anyhow::Error::msg)
}

fn finish_clean(running: Running) -> Result<unbroken_clients::Report> {
    std::thread::sleep(SHORT);
    let report = running.finish();
    verdict(&report)?;
    Ok(report)
}

#[test]
fn chat_is_heard_whole() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("irc")?;
    let plain = Plain::start(&config::ngircd(scratch.path())?, config::IRC_PORT, &scratch)?;
    let options = irc::Options {
        clients: 6,
        ..irc::Options::default()
    };
    let report = finish_clean(irc::start(plain.address(), &options)?)?;
    ensure!(
        report.totals.received == report.totals.sent * 5,
        "{:?}",
        report.totals
    );
    ensure!(report.timelines.len() == 6);
    Ok(())
}

#[test]
fn chat_notices_the_death_of_its_server() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("irc-death")?;
    let mut plain = Plain::start(&config::ngircd(scratch.path())?, config::IRC_PORT, &scratch)?;
    let options = irc::Options {
        clients: 3,
        ..irc::Options::default()
    };
    let running = irc::start(plain.address(), &options)?;
    std::thread::sleep(SHORT);
    plain.kill()?;
    let plain = Plain::start(&config::ngircd(scratch.path())?, config::IRC_PORT, &scratch)?;
    std::thread::sleep(SHORT);
    let report = running.finish();
    drop(plain);
    ensure!(report.totals.reconnects >= 3, "{:?}", report.totals);
    ensure!(report.verdict().is_err());
    Ok(())
}

/// A streaming server and its clients. The server can die of a connection that comes in the moment
/// in which it begins to listen (1 start in 20 here), so it is started until it has not.
fn stream(scratch: &Scratch, options: &icecast::Options) -> Result<(Plain, Running)> {
    let command = config::icecast(scratch.path())?;
    wait_until("a stream", PATIENCE, || {
        let plain = Plain::start(&command, config::ICECAST_PORT, scratch)?;
        Ok(icecast::start(plain.address(), options)
            .ok()
            .map(|running| (plain, running)))
    })
}

#[test]
fn a_stream_is_heard_whole() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("icecast")?;
    for rate_bytes_per_s in [Some(40_000), None] {
        let options = icecast::Options {
            listeners: 3,
            rate_bytes_per_s,
        };
        let (_plain, running) = stream(&scratch, &options)?;
        let report = finish_clean(running)?;
        ensure!(
            report.totals.received >= report.totals.sent,
            "{:?}",
            report.totals
        );
    }
    Ok(())
}

#[test]
fn a_stream_notices_the_death_of_its_server() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("icecast-death")?;
    let options = icecast::Options {
        listeners: 2,
        ..icecast::Options::default()
    };
    let (mut plain, running) = stream(&scratch, &options)?;
    plain.kill()?;
    // Both listeners and the source, each in its own time.
    wait_until("all who notice", PATIENCE, || {
        let noticed = running.tally().snapshot().reconnects >= 3;
        Ok(noticed.then_some(()))
    })?;
    ensure!(running.finish().verdict().is_err());
    Ok(())
}

#[test]
fn counters_count() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("redis")?;
    let plain = Plain::start(&config::redis(scratch.path()), config::REDIS_PORT, &scratch)?;
    for pipeline in [1, 16] {
        let options = redis::Options {
            connections: 2,
            pipeline,
        };
        finish_clean(redis::start(plain.address(), &options)?)?;
    }
    Ok(())
}

#[test]
fn counters_notice_a_server_that_forgot() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("redis-death")?;
    let mut plain = Plain::start(&config::redis(scratch.path()), config::REDIS_PORT, &scratch)?;
    let running = redis::start(plain.address(), &redis::Options::default())?;
    std::thread::sleep(SHORT);
    plain.kill()?;
    let report = running.finish();
    ensure!(report.totals.reconnects == 4, "{:?}", report.totals);
    Ok(())
}

#[test]
fn churn_is_answered() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("churn")?;
    let mut plain = Plain::start(&config::own_program("churn-server", PORT)?, PORT, &scratch)?;
    let report = finish_clean(churn::start(plain.address(), 6)?)?;
    ensure!(report.totals.received > 100, "{:?}", report.totals);
    let running = churn::start(plain.address(), 2)?;
    wait_until("an answer", PATIENCE, || {
        Ok((running.tally().snapshot().received > 0).then_some(()))
    })?;
    plain.kill()?;
    wait_until("a notice of the death", PATIENCE, || {
        Ok((running.tally().snapshot().reconnects > 0).then_some(()))
    })?;
    running.finish();
    Ok(())
}

#[test]
fn transfers_arrive_whole_in_both_directions() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("bulk")?;
    let plain = Plain::start(&config::own_program("bulk-server", PORT)?, PORT, &scratch)?;
    for direction in [bulk::Direction::Download, bulk::Direction::Upload] {
        let report = bulk::start(plain.address(), direction, 2, 20_000_001)?.wait();
        verdict(&report)?;
        ensure!(report.totals.received == 40_000_002, "{:?}", report.totals);
    }
    Ok(())
}

#[test]
fn transfers_without_end_notice_the_death_of_their_server() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("bulk-death")?;
    let mut plain = Plain::start(&config::own_program("bulk-server", PORT)?, PORT, &scratch)?;
    let start =
        |plain: &Plain, direction| bulk::start_endless(plain.address(), direction, 2, 1_000_001);
    let directions = [bulk::Direction::Download, bulk::Direction::Upload];
    for direction in directions {
        let report = finish_clean(start(&plain, direction)?)?;
        let totals = report.totals;
        ensure!(
            totals.received > 2_000_002 && totals.received == totals.sent,
            "{totals:?}"
        );
    }
    let both = [start(&plain, directions[0])?, start(&plain, directions[1])?];
    for running in &both {
        wait_until("a transfer", PATIENCE, || {
            Ok((running.tally().snapshot().received > 0).then_some(()))
        })?;
    }
    plain.kill()?;
    for running in both {
        let report = running.wait();
        ensure!(report.totals.reconnects == 2, "{:?}", report.totals);
    }
    Ok(())
}

#[test]
fn latency_is_measured() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("latency")?;
    let mut plain = Plain::start(&config::own_program("echo-server", PORT)?, PORT, &scratch)?;
    let found = latency::measure(plain.address(), 500, 64)?;
    ensure!(found.samples == 500 && found.p50_us > 0.0 && found.p50_us <= found.max_us);
    plain.kill()?;
    ensure!(latency::measure(plain.address(), 1, 64).is_err());
    Ok(())
}

#[test]
fn requests_are_answered_and_a_death_is_noticed() -> Result<()> {
    namespace::enter_new()?;
    let scratch = Scratch::new("requests")?;
    let options = |kind| requests::Options {
        kind,
        connections: 5,
        active: 3,
        rate_per_s: Some(3000.0),
    };
    let mut store = Plain::start(&config::redis(scratch.path()), config::REDIS_PORT, &scratch)?;
    let echo = Plain::start(&config::own_program("echo-server", PORT)?, PORT, &scratch)?;
    for (address, kind) in [
        (store.address(), requests::Kind::RedisSet(100)),
        (echo.address(), requests::Kind::Echo(64)),
    ] {
        let report = finish_clean(requests::start(address, &options(kind))?)?;
        ensure!(report.timelines.len() == 3, "{:?}", report.totals);
    }
    let running = requests::start(store.address(), &options(requests::Kind::RedisSet(100)))?;
    store.kill()?;
    let report = running.finish();
    ensure!(report.totals.reconnects >= 5, "{:?}", report.totals);
    // A store that answers something else than was asked of it.
    let wrong = requests::start(echo.address(), &options(requests::Kind::MemcachedSet(10)));
    ensure!(wrong.is_err(), "an echo passed for an answer");
    Ok(())
}

#[test]
fn a_new_namespace_has_no_residue() -> Result<()> {
    namespace::enter_new()?;
    let residue = namespace::residue()?;
    ensure!(residue.is_empty(), "{residue:?}");
    namespace::ip(&["tuntap", "add", "dev", "leftover0", "mode", "tun"])?;
    let residue = namespace::residue()?;
    ensure!(
        residue.iter().any(|line| line.contains("leftover0")),
        "{residue:?}"
    );
    Ok(())
}
