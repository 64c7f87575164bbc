//! `cargo xtask test`: everything that must hold before a change is good.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::bench;
use crate::build;
use crate::packages::{self, install_missing};
use crate::tools::{cargo, require_root, succeeds};

/// Scenarios measure pauses and kill at moments; more than this at a time disturb each other when
/// the test runner cannot limit them by itself (.config/nextest.toml does).
const THREADS_WITHOUT_NEXTEST: &str = "2";

/// A look at the sources: one line a finding, and what to do about it.
struct Check {
    name: &'static str,
    arguments: &'static [&'static str],
    advice: &'static str,
}

const CHECKS: [Check; 2] = [
    Check {
        name: "formatting",
        arguments: &["fmt", "--all", "--check", "--message-format", "short"],
        advice: "these files are not formatted: run `cargo fmt --all`",
    },
    Check {
        name: "lints",
        // Every crate is looked at, also after one that fails.
        arguments: &[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--keep-going",
            "--message-format",
            "short",
            "--",
            "-D",
            "warnings",
        ],
        advice: "in full: `cargo clippy --workspace --all-targets`",
    },
];

/// Runs every step, the tests last so that the runner's own summary ends the output, and fails
/// when any step failed.
pub fn run() -> Result<()> {
    require_root("test")?;
    install_missing(&[
        packages::IPROUTE,
        packages::NFTABLES,
        packages::NGIRCD,
        packages::ICECAST,
        packages::REDIS,
        packages::REDIS_TOOLS,
    ])?;
    let mut failed = Vec::new();
    for check in CHECKS {
        println!("== {}", check.name);
        if !succeeds(&mut cargo(check.arguments))? {
            println!("{}", check.advice);
            failed.push(check.name);
        }
    }
    println!("== build");
    build::product()?;
    build::benchmark()?;
    build::programs()?;
    println!("== promises about figures");
    if bench::measure(&["--short"]).is_err() {
        failed.push("promises about figures");
    }
    println!("== tests");
    if !succeeds(&mut tests())? {
        failed.push("tests");
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn tests() -> Command {
    let found = cargo(&["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let mut command = if found {
        cargo(&[
            "nextest",
            "run",
            "--cargo-quiet",
            "--workspace",
            "--no-fail-fast",
        ])
    } else {
        let mut command = cargo(&["test", "--workspace", "--no-fail-fast"]);
        command.env("RUST_TEST_THREADS", THREADS_WITHOUT_NEXTEST);
        command
    };
    // An error that a test returns says what is wrong; thirty frames of the test runner under each
    // say nothing. Panics keep their backtraces, and whoever sets this gets both.
    if std::env::var_os("RUST_LIB_BACKTRACE").is_none() {
        command.env("RUST_LIB_BACKTRACE", "0");
    }
    command
}
