//! `unbroken-bench ROOT [--short] [--draw] [--only NAME]...`: what `cargo xtask bench` runs, built with
//! optimisation because it is also the load.

use std::process::ExitCode;

use unbroken_bench::{Options, names, run};

fn main() -> ExitCode {
    let Some(options) = parse(std::env::args().skip(1)) else {
        eprintln!(
            "usage: unbroken-bench ROOT [--short] [--draw] [--only NAME]...\nNAME is one of {}",
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
    let mut options = Options {
        root: words.next()?.into(),
        only: Vec::new(),
        short: false,
        draw: false,
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--draw" => options.draw = true,
            "--short" => options.short = true,
            "--only" => options.only.push(words.next()?),
            _ => return None,
        }
    }
    Some(options)
}
