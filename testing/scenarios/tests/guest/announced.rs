//! Announced calls end as they would without us, whatever signals and stops meet them.

use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use unbroken_guests::announced::TRIES;
use unbroken_harness::{PATIENCE, Plain, Scratch};
use unbroken_scenarios::{PORT, host};

use super::{Guest, ask, open_to_all};

/// Rounds of all announced calls. `UNBROKEN_ROUNDS=100000` is the nightly form.
fn rounds() -> Result<u64> {
    match std::env::var("UNBROKEN_ROUNDS") {
        Ok(rounds) => rounds.parse().context("UNBROKEN_ROUNDS"),
        Err(_) => Ok(2000),
    }
}

/// So many rounds in one answer.
const ROUNDS_AT_ONCE: u64 = 500;

#[test]
fn announced_calls_are_interrupted_only_where_they_would_be() -> Result<()> {
    let mut guest = Guest::start("interrupted", &[])?;
    guest.set_up_and_check()?;
    let words = format!("rounds {ROUNDS_AT_ONCE}");
    for turn in 0..rounds()?.div_ceil(ROUNDS_AT_ONCE) {
        match turn % 2 {
            0 => guest.tell(&words)?,
            _ => guest.tell_through_kills(&words, 2)?,
        }
    }
    guest.tell("hinder")?;
    guest.wait_unprotected("pidfd")?;
    guest.tell(&words)?;
    guest.stop()
}

/// What the guest expects is what the kernel does.
#[test]
fn announced_calls_are_interrupted_so_without_protection() -> Result<()> {
    let _ = host()?;
    let directory = Scratch::new("plain-interrupted")?;
    open_to_all(directory.path())?;
    let program = unbroken_clients::config::find_own_program("interrupted")?;
    let port = PORT.to_string();
    let command = [program, port.into(), directory.path().into()];
    let command = command.map(|word| word.to_string_lossy().into_owned());
    let plain = Plain::start(&command, PORT, &directory)?;
    let stream = TcpStream::connect(plain.address())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut conversation = std::io::BufReader::new(stream);
    let mut tell = |words: &str| {
        let answer = ask(&mut conversation, words)?;
        ensure!(answer == "ok", "after {words:?}: {answer}");
        Ok(())
    };
    tell("set up")?;
    for _ in 0..rounds()?.div_ceil(ROUNDS_AT_ONCE) {
        tell(&format!("rounds {ROUNDS_AT_ONCE}"))?;
    }
    Ok(())
}

/// A call that the guest does not make proves nothing.
#[test]
fn every_announced_call_is_tried() -> Result<()> {
    let calls = include_str!("../../../../crates/node/src/stage/syscalls.rs");
    let rules = include_str!("../../../../crates/node/src/stage/rules.rs");
    let (_, list) = calls
        .split_once("const ANNOUNCED: &str = \"")
        .context("a list")?;
    let (list, _) = list.split_once("\";").context("its end")?;
    let by_name = list.split_whitespace().filter(|word| *word != "\\");
    // Where an argument decides.
    let by_rule = rules.split("call: \"").skip(1).filter_map(|rule| {
        let (name, rest) = rule.split_once('"')?;
        let rule = rest.split("Rule {").next()?;
        rule.contains("Announced").then_some(name)
    });
    let announced: Vec<&str> = by_name.chain(by_rule).collect();
    ensure!(announced.len() > 90, "{announced:?}");
    let tried: Vec<&str> = TRIES
        .iter()
        .flat_map(|one| one.names.split_whitespace())
        .collect();
    for call in announced {
        ensure!(tried.contains(&call), "{call} is announced and not tried");
    }
    Ok(())
}
