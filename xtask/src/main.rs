//! Every developer's chore: `cargo xtask TASK`.

mod bench;
mod build;
mod demo;
mod fuzz;
mod packages;
mod suite;
mod table;
mod tools;
mod torture;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask TASK

  demo     a chat server with 20 clients and a streaming server with 10 listeners, each killed ten
           times under load, with a live table of what the clients see; fails if any lost
           anything, got anything twice, or had to reconnect
  test     formatting, lints, unit tests, the scenario suite over real servers, and the promises
           about figures
  bench    every workload with and without protection, in turn; a report with plots in
           target/bench/report.html, and docs/FIGURES.md; `bench --help`
  torture  faults by the thousand against every server of the tests; `torture --help`
  fuzz     decoders of bytes from elsewhere, with bytes that are almost right; `fuzz --help`

They need root, install the Debian packages they lack, and build what they need:

  sudo -E env PATH=$PATH cargo xtask demo";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["bench", options @ ..] => bench::run(options),
        ["demo"] => demo::run(),
        ["test"] => suite::run(),
        ["fuzz", words @ ..] => fuzz::run(words),
        ["torture", words @ ..] => torture::run(words),
        ["--help" | "-h" | "help"] | ["demo" | "test", "--help" | "-h"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("xtask: {cause:#}");
            ExitCode::FAILURE
        }
    }
}
