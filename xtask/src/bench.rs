//! `cargo xtask bench`: what protection costs, measured beside the same servers without it.

use std::process::Command;

use anyhow::{Result, bail};

use crate::packages::{self, install_missing};
use crate::tools::{build_release, cargo, require_root, root, succeeds};

/// Installs, builds, and measures; `options` are those of the program `unbroken-bench`.
pub fn run(options: &[&str]) -> Result<()> {
    require_root("bench")?;
    install_missing(&[
        packages::IPROUTE,
        packages::NGIRCD,
        packages::ICECAST,
        packages::REDIS,
        packages::REDIS_TOOLS,
        packages::MEMCACHED,
        packages::NGINX,
        packages::WRK,
    ])?;
    build()?;
    measure(options)
}

/// The product, the benchmark, and the servers that it starts by name; the benchmark is also the
/// load, so all of them with optimisation.
pub fn build() -> Result<()> {
    build_release()?;
    let programs = [
        "build",
        "--release",
        "--quiet",
        "--message-format",
        "short",
        "--package",
        "unbroken-bench",
        "--package",
        "unbroken-clients",
        "--bins",
    ];
    if !succeeds(&mut cargo(&programs))? {
        bail!("the build failed; in full: `cargo build --release -p unbroken-bench --bins`");
    }
    Ok(())
}

/// Runs the benchmark that was built.
pub fn measure(options: &[&str]) -> Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root().join("target"), Into::into);
    let mut bench = Command::new(target.join("release/unbroken-bench"));
    bench.arg(root()).args(options);
    if !succeeds(&mut bench)? {
        bail!("the benchmark failed: see above");
    }
    Ok(())
}
