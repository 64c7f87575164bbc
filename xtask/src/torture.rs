//! `cargo xtask torture`: the entry to testing/torture.

use anyhow::{Result, bail};
use unbroken_torture::{Options, USAGE};

use crate::packages::{self, install_missing};
use crate::tools::{build_programs, build_release, require_root, root};

pub fn run(words: &[&str]) -> Result<()> {
    if words.iter().any(|word| matches!(*word, "--help" | "-h")) {
        println!("{USAGE}");
        return Ok(());
    }
    let options = Options::parse(words, root().join("target/torture"))?;
    require_root("torture")?;
    install_missing(&[
        packages::IPROUTE,
        packages::NFTABLES,
        packages::NGIRCD,
        packages::ICECAST,
        packages::REDIS,
    ])?;
    build_release()?;
    build_programs()?;
    let totals = unbroken_torture::run(&options)?;
    if totals.failed() > 0 {
        bail!("seed {}: {} failed", options.seed, totals.failed());
    }
    println!("seed {}: all {} survived", options.seed, totals.survived());
    Ok(())
}
