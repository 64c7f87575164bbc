//! `cargo xtask torture`: the entry to testing/torture.

use anyhow::{Result, bail};
use unbroken_torture::{Options, USAGE};

use crate::build;
use crate::packages::{self, install_missing};
use crate::tools::{require_root, target};

pub fn run(words: &[&str]) -> Result<()> {
    if words.iter().any(|word| matches!(*word, "--help" | "-h")) {
        println!("{USAGE}");
        return Ok(());
    }
    let options = Options::parse(words, target().join("torture"))?;
    require_root("torture")?;
    install_missing(&[
        packages::IPROUTE,
        packages::NFTABLES,
        packages::NGIRCD,
        packages::ICECAST,
        packages::REDIS,
    ])?;
    build::product()?;
    build::programs()?;
    let totals = unbroken_torture::run(&options)?;
    if totals.failed() > 0 {
        bail!("seed {}: {} failed", options.seed, totals.failed());
    }
    println!("seed {}: all {} survived", options.seed, totals.survived());
    Ok(())
}
