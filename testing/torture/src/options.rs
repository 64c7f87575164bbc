//! What is asked of a run.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::fault;
use crate::load::Server;

pub const USAGE: &str = "\
usage: cargo xtask torture [OPTIONS]

  --faults N     this many (1000)
  --seed N       the seed of an earlier run, to have the same faults again
  --from N       begin with this fault of the seed rather than with the first; give a multiple of
                 --each, or --server: the first fault of a session draws its server
  --server NAME  torture this one alone: ngircd, icecast, redis, churn, echo, download, upload, or
                 the name of a guest
  --only TEXT    only faults that have this in their name, such as \"standby paused\"
  --parallel N   this many services at once (2)
  --each N       faults a service lives through before another is started (25)
  --hygiene      one service for all faults, and at the end how much it held early and late
  --stop         end at the first failure; otherwise the run goes on

Failures, and what was SLOW (survived, but protected again only after more than 5 s, which fails
nothing), are kept in target/torture.";

/// How many faults, against whom.
#[derive(Debug, Clone)]
pub struct Options {
    pub faults: u64,
    pub seed: u64,
    pub from: u64,
    pub(crate) server: Option<Server>,
    pub(crate) only: String,
    pub parallel: usize,
    /// Faults a service.
    pub each: u64,
    pub hygiene: bool,
    pub stop: bool,
    /// Where failures are kept, each in a directory of its own.
    pub evidence: PathBuf,
}

impl Options {
    /// From the words of a command line; failures are kept below `evidence`.
    pub fn parse(words: &[&str], evidence: PathBuf) -> Result<Self> {
        let mut options = Self {
            faults: 1000,
            seed: seed_of_the_clock(),
            from: 0,
            server: None,
            only: String::new(),
            parallel: 2,
            each: 25,
            hygiene: false,
            stop: false,
            evidence,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || {
                words
                    .next()
                    .with_context(|| format!("{word} needs a value\n\n{USAGE}"))
            };
            match *word {
                "--faults" => options.faults = number(value()?)?,
                "--seed" => options.seed = number(value()?)?,
                "--from" => options.from = number(value()?)?,
                "--only" => options.only = only(value()?)?,
                "--each" => options.each = number(value()?)?.max(1),
                "--parallel" => options.parallel = number(value()?)?.clamp(1, 64) as usize,
                "--server" => {
                    let name = value()?;
                    let server = Server::named(name);
                    options.server = Some(server.with_context(|| format!("no server {name}"))?);
                }
                "--hygiene" => options.hygiene = true,
                "--stop" => options.stop = true,
                _ => bail!("{word} is no option of torture\n\n{USAGE}"),
            }
        }
        if options.hygiene {
            options.each = options.faults;
        }
        let own = options.evidence.join(format!("seed-{}", options.seed));
        options.evidence = own;
        Ok(options)
    }
}

fn number(word: &str) -> Result<u64> {
    word.parse()
        .with_context(|| format!("{word:?} is no number\n\n{USAGE}"))
}

/// A part of the name of some fault.
fn only(text: &str) -> Result<String> {
    if !fault::is_drawn(text) {
        bail!("no fault has {text:?} in its name");
    }
    Ok(text.to_string())
}

fn seed_of_the_clock() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    // Short enough to be typed again.
    since.as_millis() as u64 % 1_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_options() {
        let words = [
            "--faults", "50", "--seed", "7", "--server", "redis", "--stop",
        ];
        let options = Options::parse(&words, PathBuf::from("kept")).unwrap();
        assert_eq!((options.faults, options.seed, options.stop), (50, 7, true));
        assert_eq!(options.server, Some(Server::Counters));
        assert_eq!(options.evidence, PathBuf::from("kept/seed-7"));
    }

    #[test]
    fn what_is_no_option_is_refused_with_the_usage() {
        for words in [
            ["--faults", "many"],
            ["--fault", "1"],
            ["--server", "unknown"],
        ] {
            assert!(Options::parse(&words, PathBuf::new()).is_err(), "{words:?}");
        }
    }
}
