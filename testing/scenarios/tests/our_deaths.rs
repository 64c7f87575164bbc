//! Any process of ours may die at any moment; and a takeover may be planned.

use anyhow::{Result, ensure};
use unbroken_clients::{churn, irc};
use unbroken_harness::{Kill, KillPlan, PATIENCE, Scratch, Signal, Target};
use unbroken_scenarios::{chat, clean, host, own_server, small_chat, survive};

fn chat_through(target: Target, times: usize) -> Result<Vec<Kill>> {
    let mut random = host()?;
    let scratch = Scratch::new("irc")?;
    let (service, address) = chat(&scratch)?;
    let load = irc::start(address, &small_chat())?;
    survive(service, load, &KillPlan::new(target, times), &mut random)
}

#[test]
fn chat_through_deaths_of_the_primary() -> Result<()> {
    let kills = chat_through(Target::Primary, 5)?;
    ensure!(
        kills.iter().all(|kill| kill.takeover_ms.is_some()),
        "{kills:?}"
    );
    Ok(())
}

#[test]
fn chat_through_deaths_of_the_standby() -> Result<()> {
    let kills = chat_through(Target::Standby, 5)?;
    ensure!(
        kills.iter().all(|kill| kill.takeover_ms.is_none()),
        "{kills:?}"
    );
    Ok(())
}

#[test]
fn chat_through_the_death_of_the_front() -> Result<()> {
    chat_through(Target::Front, 1)?;
    Ok(())
}

/// Whoever dies next is drawn by lot: service, primary and standby in any order.
#[test]
fn churn_through_deaths_of_anyone() -> Result<()> {
    let mut random = host()?;
    let (service, address) = own_server("churn-server")?;
    let load = churn::start(address, 3)?;
    for _ in 0..8 {
        let targets = [Target::Service, Target::Primary, Target::Standby];
        let target = targets[(random.draw() % 3) as usize];
        println!("next: {target:?}");
        service.kill_repeatedly(&KillPlan::new(target, 1), &mut random, |_| {})?;
    }
    clean(&load.finish())?;
    service.stop()?;
    Ok(())
}

#[test]
fn planned_takeovers_lose_nothing() -> Result<()> {
    host()?;
    let scratch = Scratch::new("irc")?;
    let (service, address) = chat(&scratch)?;
    let load = irc::start(address, &small_chat())?;
    for _ in 0..3 {
        let before = service.wait_protected()?;
        let outcome = service.ask(&["switchover", service.name()], PATIENCE)?;
        ensure!(outcome.code() == Some(0), "switchover: {outcome:?}");
        let after = service.wait_for("the other side", |status| {
            status.term > before.term && status.is_protected()
        })?;
        ensure!(after.primary_pid != before.primary_pid, "{}", after.whole);
    }
    clean(&load.finish())?;
    service.stop()?;
    Ok(())
}

/// With the standby stopped rather than dead the service may pause, but it must not lie: what
/// clients were told stands in a state that survives the primary.
#[test]
fn a_primary_that_dies_beside_a_stopped_standby_loses_nothing() -> Result<()> {
    host()?;
    let scratch = Scratch::new("irc")?;
    let (service, address) = chat(&scratch)?;
    let load = irc::start(address, &small_chat())?;
    let before = service.kill(Target::Standby, Signal::SIGSTOP)?;
    service.kill(Target::Primary, Signal::SIGKILL)?;
    if let Some(standby) = before.standby_pid {
        // Not through `kill`: the standby may be the primary by now.
        unbroken_harness::send(standby, Signal::SIGCONT)?;
    }
    service.wait_for("the takeover", |status| {
        status.is_protected() && status.takeovers > before.takeovers
    })?;
    clean(&load.finish())?;
    service.stop()?;
    Ok(())
}
