//! `cargo xtask test`: everything that must hold before a change is good.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::packages::{self, install_missing};
use crate::tools::{build_release, cargo, require_root, succeeds};

/// Scenarios measure pauses and kill at moments; more than this at a time disturb each other when
/// the test runner cannot limit them by itself (.config/nextest.toml does).
const THREADS_WITHOUT_NEXTEST: &str = "2";

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
    ])?;
    let mut failed = Vec::new();
    for (step, mut command) in [
        ("formatting", cargo(&["fmt", "--all", "--check"])),
        (
            "lints",
            cargo(&[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]),
        ),
    ] {
        println!("== {step}");
        if !succeeds(&mut command)? {
            failed.push(step);
        }
    }
    println!("== build");
    build_release()?;
    // The scenarios start these programs by name.
    if !succeeds(&mut cargo(&["build", "--quiet", "--workspace", "--bins"]))? {
        bail!("the build failed: see above");
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
    if found {
        return cargo(&["nextest", "run", "--workspace", "--no-fail-fast"]);
    }
    let mut command = cargo(&["test", "--workspace", "--no-fail-fast"]);
    command.env("RUST_TEST_THREADS", THREADS_WITHOUT_NEXTEST);
    command
}
