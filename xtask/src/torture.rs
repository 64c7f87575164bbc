//! `cargo xtask torture`: the entry to testing/torture.

use std::process::Command;

use anyhow::{Context, Result, bail};
use unbroken_torture::{Options, Totals, USAGE};

use crate::build;
use crate::packages::{self, install_missing};
use crate::tools::{require_root, target};

/// What the benchmark's table of targets says of torture.
fn record(totals: &Totals, options: &Options) -> Result<()> {
    let printed = |program: &str, arguments: &[&str]| -> String {
        let output = Command::new(program).args(arguments).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        text.unwrap_or_default()
    };
    let (survived, failed, seed) = (totals.survived(), totals.failed(), options.seed);
    let commit = printed("git", &["rev-parse", "--short", "HEAD"]);
    let at = printed("date", &["--utc", "+%Y-%m-%d %H:%M UTC"]);
    let text = format!(
        "{{\"seed\": {seed}, \"survived\": {survived}, \"failed\": {failed}, \
         \"commit\": \"{commit}\", \"at\": \"{at}\"}}\n"
    );
    let file = target().join("torture/last.json");
    std::fs::create_dir_all(target().join("torture"))?;
    std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

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
    record(&totals, &options)?;
    if totals.failed() > 0 {
        bail!("seed {}: {} failed", options.seed, totals.failed());
    }
    println!("seed {}: all {} survived", options.seed, totals.survived());
    Ok(())
}
