//! `cargo xtask fuzz`: the decoders of bytes from elsewhere, for a time.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tools::{cargo, require_root, succeeds};

pub const USAGE: &str = "\
usage: cargo xtask fuzz [--minutes N]

  --minutes N  divided among all decoders (10)

What a decoder cannot bear is printed and written to target/fuzz; the seed that led to it is kept in
testing/fuzz/regressions, and the input belongs into testing/fuzz/corpus.";

/// Every test of a decoder begins with this.
const PREFIX: &str = "fuzz_";
const WHICH: [&str; 6] = [
    "--workspace",
    "--lib",
    "--bins",
    "--tests",
    "--no-fail-fast",
    PREFIX,
];

pub fn run(words: &[&str]) -> Result<()> {
    let minutes = match words {
        [] => 10.0,
        ["--minutes", count] => count.parse::<f64>().context("no number of minutes")?,
        ["--help" | "-h"] => {
            println!("{USAGE}");
            return Ok(());
        }
        _ => bail!("{USAGE}"),
    };
    // Some decoders are reached through sockets and files of the product's own directories.
    require_root("fuzz")?;
    let decoders = count()?;
    let seconds = (minutes * 60.0 / decoders as f64).ceil().max(1.0);
    println!("{decoders} tests of decoders, {seconds} s each");
    let mut tests = background_cargo(&["test", "--quiet"]);
    tests
        .args(WHICH)
        .args(["--", "--test-threads=1", "--nocapture"])
        .env("UNBROKEN_FUZZ_SECONDS", seconds.to_string());
    if !succeeds(&mut tests)? {
        bail!("a decoder failed: see above");
    }
    Ok(())
}

/// How many tests there are.
fn count() -> Result<usize> {
    let mut list = background_cargo(&["test", "--quiet"]);
    list.args(WHICH).args(["--", "--list"]);
    let output = list.output().context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let count = text.lines().filter(|line| line.ends_with(": test")).count();
    if !output.status.success() || count == 0 {
        bail!(
            "no tests: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(count)
}

/// cargo, behind whatever else the machine has to do.
fn background_cargo(arguments: &[&str]) -> Command {
    let plain = cargo(arguments);
    let mut command = Command::new("nice");
    command
        .args(["-n", "19"])
        .arg(plain.get_program())
        .args(plain.get_args());
    if let Some(directory) = plain.get_current_dir() {
        command.current_dir(directory);
    }
    command
}
