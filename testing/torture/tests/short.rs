//! A few faults of one seed, so that torture itself stays whole. `cargo xtask torture` is for the
//! many.

use anyhow::{Result, ensure};
use unbroken_torture::{Options, run};

#[test]
fn a_few_faults_are_survived() -> Result<()> {
    let words = "--seed 11 --faults 12 --each 6 --parallel 1 --stop";
    let words: Vec<&str> = words.split(' ').collect();
    let evidence = std::env::temp_dir().join("unbroken-torture");
    let totals = run(&Options::parse(&words, evidence)?)?;
    ensure!(totals.failed() == 0, "{}", totals.table());
    ensure!(totals.survived() == 12, "{}", totals.table());
    Ok(())
}
