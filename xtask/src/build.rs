//! What a task needs built. One line of arguments for each, which is also what a person types to see
//! the whole of a failure.

use anyhow::{Result, bail};

use crate::tools::{cargo, succeeds};

/// The product, as it is used.
const PRODUCT: &[&str] = &["--release", "--bin", "unbroken"];
/// The benchmark and the servers that it starts by name. It is also the load, so all of them with
/// optimisation.
const BENCHMARK: &[&str] = &[
    "--release",
    "--package",
    "unbroken-bench",
    "--package",
    "unbroken-clients",
    "--bins",
];
/// What tests start by name.
const PROGRAMS: &[&str] = &["--workspace", "--bins"];

pub fn product() -> Result<()> {
    println!("building unbroken (release)");
    build(PRODUCT)
}

pub fn benchmark() -> Result<()> {
    build(BENCHMARK)
}

pub fn programs() -> Result<()> {
    build(PROGRAMS)
}

fn build(what: &[&str]) -> Result<()> {
    let mut command = cargo(&["build", "--quiet", "--message-format", "short"]);
    if !succeeds(command.args(what))? {
        bail!(
            "the build failed; in full: `cargo build {}`",
            what.join(" ")
        );
    }
    Ok(())
}
