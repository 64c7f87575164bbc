//! `unbroken-bench ROOT [--short] [--rounds N] [--draw] [--only NAME]...`: what `cargo xtask bench` runs, built with
//! optimisation because it is also the load.

use std::path::PathBuf;
use std::process::ExitCode;

use unbroken_bench::{Options, names, run};

const ROUNDS: usize = 3;

fn main() -> ExitCode {
    let Some(options) = parse(std::env::args().skip(1)) else {
        eprintln!(
            "usage: unbroken-bench ROOT [--short] [--rounds N] [--draw] [--only NAME]...\nNAME is one of {}",
            names().join(", ")
        );
        return ExitCode::from(2);
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("bench: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Options> {
    let root = words.next().map(PathBuf::from);
    let mut options = Options {
        root: root.filter(|root| root.join("Cargo.toml").is_file())?,
        only: Vec::new(),
        short: false,
        draw: false,
        rounds: ROUNDS,
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--rounds" => {
                options.rounds = words.next()?.parse().ok().filter(|rounds| *rounds > 0)?
            }
            "--draw" => options.draw = true,
            "--short" => {
                options.short = true;
                options.rounds = 1;
            }
            "--only" => options.only.push(words.next()?),
            _ => return None,
        }
    }
    Some(options)
}
