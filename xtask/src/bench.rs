//! `cargo xtask bench`: what protection costs, measured beside the same servers without it.

use std::process::Command;

use anyhow::{Result, bail};

use crate::build;
use crate::packages::{self, install_missing};
use crate::tools::{require_root, root, succeeds, target};

/// The options are those of the program `unbroken-bench`, which is not built yet when this is asked
/// for.
const USAGE: &str = "\
usage: cargo xtask bench [--short] [--rounds N] [--draw] [--only PART]...

  --only PART  measures this part anew, the others stay as they were; may be given again
  --rounds N   how often each side runs (3)
  --short      the promises alone, in less than a minute
  --draw       measures nothing: the report anew from report.json

docs/TESTING.md lists the parts and says how they are measured. The report is
target/bench/report.html, its numbers are in report.json beside it.";

/// Installs, builds, and measures.
pub fn run(options: &[&str]) -> Result<()> {
    if options.iter().any(|word| matches!(*word, "--help" | "-h")) {
        println!("{USAGE}");
        return Ok(());
    }
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
    build::product()?;
    build::benchmark()?;
    measure(options)
}

/// Runs the benchmark that was built.
pub fn measure(options: &[&str]) -> Result<()> {
    let mut bench = Command::new(target().join("release/unbroken-bench"));
    bench.arg(root()).args(options);
    if !succeeds(&mut bench)? {
        bail!("the benchmark failed: see above");
    }
    Ok(())
}
