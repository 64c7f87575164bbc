//! The service dies, again and again, under load; its clients see nothing of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use unbroken_clients::{bulk, churn, config, icecast, irc, redis};
use unbroken_harness::{
    Ended, KillPlan, Launch, PATIENCE, Scratch, Service, Signal, Target, send, wait_until,
};
use unbroken_scenarios::{chat, clean, host, own_server, small_chat, survive};

#[test]
fn chat_through_ten_kills() -> Result<()> {
    let mut random = host()?;
    let scratch = Scratch::new("irc")?;
    let (service, address) = chat(&scratch)?;
    let load = irc::start(address, &irc::Options::default())?;
    survive(
        service,
        load,
        &KillPlan::new(Target::Service, 10),
        &mut random,
    )?;
    Ok(())
}

/// As soon as it is protected again it is killed again.
#[test]
fn chat_through_a_hundred_kills() -> Result<()> {
    let mut random = host()?;
    let scratch = Scratch::new("irc")?;
    let (service, address) = chat(&scratch)?;
    let load = irc::start(address, &small_chat())?;
    let plan = KillPlan {
        wait: (Duration::ZERO, Duration::from_millis(60)),
        ..KillPlan::new(Target::Service, 100)
    };
    survive(service, load, &plan, &mut random)?;
    Ok(())
}

#[test]
fn chat_through_segmentation_faults() -> Result<()> {
    let mut random = host()?;
    let scratch = Scratch::new("irc")?;
    let (service, address) = chat(&scratch)?;
    let load = irc::start(address, &small_chat())?;
    let plan = KillPlan {
        signal: Signal::SIGSEGV,
        ..KillPlan::new(Target::Service, 5)
    };
    survive(service, load, &plan, &mut random)?;
    Ok(())
}

#[test]
fn a_stream_through_ten_kills() -> Result<()> {
    let mut random = host()?;
    let scratch = Scratch::new("icecast")?;
    let service = Service::start(&Launch::new("icecast", config::icecast(scratch.path())?))?;
    let address = service.listening(config::ICECAST_PORT)?;
    let load = icecast::start(address, &icecast::Options::default())?;
    survive(
        service,
        load,
        &KillPlan::new(Target::Service, 10),
        &mut random,
    )?;
    Ok(())
}

#[test]
fn counters_through_ten_kills() -> Result<()> {
    let mut random = host()?;
    let scratch = Scratch::new("redis")?;
    let service = Service::start(&Launch::new("redis", config::redis(scratch.path())))?;
    let address = service.listening(config::REDIS_PORT)?;
    let load = redis::start(address, &redis::Options::default())?;
    survive(
        service,
        load,
        &KillPlan::new(Target::Service, 10),
        &mut random,
    )?;
    Ok(())
}

#[test]
fn churn_through_ten_kills() -> Result<()> {
    let mut random = host()?;
    let (service, address) = own_server("churn-server")?;
    let load = churn::start(address, 6)?;
    survive(
        service,
        load,
        &KillPlan::new(Target::Service, 10),
        &mut random,
    )?;
    Ok(())
}

#[test]
fn a_download_through_five_kills() -> Result<()> {
    transfer_through_kills(bulk::Direction::Download)
}

#[test]
fn an_upload_through_five_kills() -> Result<()> {
    transfer_through_kills(bulk::Direction::Upload)
}

/// A gigabyte at the speed of the loopback device; should it arrive before all kills have been
/// made, others follow, so that each kill meets one.
fn transfer_through_kills(direction: bulk::Direction) -> Result<()> {
    const TRANSFER_BYTES: u64 = 1 << 30;
    let mut random = host()?;
    let (service, address) = own_server("bulk-server")?;
    let plan = KillPlan::new(Target::Service, 5);
    std::thread::scope(|scope| -> Result<()> {
        let kills = scope.spawn(|| service.kill_repeatedly(&plan, &mut random, |_| {}));
        while !kills.is_finished() {
            clean(&bulk::start(address, direction, 1, TRANSFER_BYTES)?.wait())?;
        }
        match kills.join() {
            Ok(kills) => ensure!(kills?.len() == plan.times),
            Err(_) => anyhow::bail!("the killing thread panicked"),
        }
        Ok(())
    })?;
    service.stop()?;
    Ok(())
}

/// A connection on which nothing moves while the service dies is as good afterwards as before.
#[test]
fn an_idle_connection_outlives_its_server() -> Result<()> {
    let mut random = host()?;
    let (service, address) = own_server("echo-server")?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    for word in ["before", "after-", "second"] {
        stream.write_all(word.as_bytes())?;
        let mut answer = [0; 6];
        stream.read_exact(&mut answer)?;
        ensure!(answer == word.as_bytes(), "{word} was answered {answer:?}");
        service.kill_repeatedly(&KillPlan::new(Target::Service, 1), &mut random, |_| {})?;
    }
    service.stop()?;
    Ok(())
}

/// What a service prints is output: each line once and in order, whatever happens meanwhile.
#[test]
fn printed_lines_are_neither_lost_nor_doubled() -> Result<()> {
    const LINES: u64 = 1500;
    let mut random = host()?;
    let launch = Launch::new("ticker", config::own_program("ticker", LINES)?);
    let mut service = Service::start(&launch)?;
    service.kill_repeatedly(&KillPlan::new(Target::Service, 3), &mut random, |_| {})?;
    let ended = service.wait_end()?;
    ensure!(ended == Ended::Exit(5), "{ended:?}");
    let (printed, errors) = service.printed();
    let lines: Vec<&str> = printed
        .lines()
        .filter(|line| line.starts_with("line "))
        .collect();
    let expected: Vec<String> = (0..LINES).map(|number| format!("line {number}")).collect();
    ensure!(lines == expected, "standard output: {printed}");
    let lines: Vec<&str> = errors
        .lines()
        .filter(|line| line.starts_with("error line "))
        .collect();
    let expected: Vec<String> = (0..LINES)
        .step_by(10)
        .map(|number| format!("error line {number}"))
        .collect();
    ensure!(lines == expected, "standard error: {errors}");
    service.assert_gone()
}

/// An input that kills every replica ends the service, with the reason, and not in a loop.
#[test]
fn a_bug_that_kills_every_replica_is_given_up() -> Result<()> {
    host()?;
    let (mut service, address) = own_server("churn-server")?;
    TcpStream::connect(address)?.write_all(b"x\n")?;
    let ended = service.wait_end()?;
    ensure!(
        !matches!(ended, Ended::Exit(0) | Ended::Signal(_)),
        "{ended:?}"
    );
    let (_, errors) = service.printed();
    ensure!(!errors.trim().is_empty(), "no reason was given");
    println!("ended with {ended:?}: {errors}");
    service.assert_gone()
}

/// The replica was killed before it was needed, the second fault: the service is lost, and what was
/// tried in vain is said.
#[test]
fn a_takeover_that_fails_says_why() -> Result<()> {
    host()?;
    let (mut service, _) = own_server("echo-server")?;
    let standby = service.status()?.standby_pid;
    let replica = |(pid, _): &(i32, String)| {
        let grandparent = parent_of(*pid).and_then(parent_of);
        grandparent.is_some_and(|grandparent| Some(grandparent) == standby)
    };
    let replica = service.processes().into_iter().find(replica);
    let (replica, _) = replica.context("no replica")?;
    send(replica, Signal::SIGKILL)?;
    service.kill(Target::Service, Signal::SIGKILL)?;
    let ended = service.wait_end()?;
    ensure!(ended == Ended::Exit(78), "{ended:?}: {}", service.story());
    let (_, errors) = service.printed();
    let why = "could not be brought to life: ";
    ensure!(errors.contains(why), "{errors}");
    service.assert_gone()
}

fn parent_of(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    parent.trim().parse().ok()
}

/// Two services on one host share nothing.
#[test]
fn the_death_of_one_service_is_nothing_to_another() -> Result<()> {
    let mut random = host()?;
    let (first, first_address) = own_server("echo-server")?;
    let (second, second_address) = own_server("churn-server")?;
    ensure!(first_address.ip() != second_address.ip());
    let load = churn::start(second_address, 2)?;
    let plan = KillPlan::new(Target::Service, 3);
    first.kill_repeatedly(&plan, &mut random, |_| {})?;
    let status = second.status()?;
    ensure!(
        status.takeovers == 0 && status.is_protected(),
        "{}",
        status.whole
    );
    second.kill_repeatedly(&plan, &mut random, |_| {})?;
    clean(&load.finish())?;
    second.stop_beside_others()?;
    first.stop()?;
    Ok(())
}

/// Whoever waits for a lock can get it when the service dies, and may keep it: the replica goes on
/// without, which is told.
#[test]
fn a_lock_that_another_process_waits_for_is_no_reason_to_die() -> Result<()> {
    host()?;
    let scratch = Scratch::new("contended")?;
    let file = scratch.path().join("lock");
    let hold = format!(
        "exec 9>{}; flock 9; exec sleep 1000",
        file.to_string_lossy()
    );
    let command = vec!["/bin/sh".to_owned(), "-c".to_owned(), hold];
    let service = Service::start(&Launch::new("contended", command))?;
    service.wait_protected()?;
    let mut other = std::process::Command::new("flock")
        .arg("--no-fork")
        .arg(&file)
        .args(["sleep", "1000"])
        .spawn()?;
    let waits = || -> Result<bool> {
        let locks = std::fs::read_to_string("/proc/locks")?;
        let own = format!(" {} ", other.id());
        let mut lines = locks.lines();
        Ok(lines.any(|line| line.contains("->") && line.contains(&own)))
    };
    wait_until("somebody who waits for the lock", PATIENCE, || {
        Ok(waits()?.then_some(()))
    })?;
    service.kill(Target::Service, Signal::SIGKILL)?;
    let status = service.wait_for("a takeover", |status| {
        status.takeovers == 1 && status.is_protected()
    })?;
    let cause = status.whole["last_takeover_cause"].as_str().unwrap_or("");
    // Both were woken for it, and either can come first.
    let is_lost = cause.contains("without its lock on");
    ensure!(is_lost != waits()?, "{cause}");
    other.kill()?;
    other.wait()?;
    service.stop()?;
    Ok(())
}
