//! What the repository promises of its figures, as ratios and counts: `--short` measures them in
//! less than a minute and fails when one is broken. No promise depends on how fast the machine is,
//! how busy, or what its processor can do: each has room, and is broken only when several tries in a
//! row break it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use raw_cpuid::CpuId;
use unbroken_clients::config::own_program;
use unbroken_clients::requests::{self, Kind, Options};

use crate::bench::{Bench, Served, finish};
use crate::model::{Profile, Section};
use crate::subject::{Side, Subject};
use crate::text::{count, number};
use crate::workloads::{ngircd, redis};

const TRIES: usize = 3;
const PORT: u16 = 7000;
const PAGE_BYTES: f64 = 4096.0;
/// Connections of which one is used, and the others only stand there.
const IDLE: usize = 301;

/// On which side of its limit a figure has to be.
#[derive(Debug, Clone, Copy)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

struct Promise {
    what: &'static str,
    limit: Limit,
    measure: fn(&Bench) -> Result<f64>,
}

const PROMISES: [Promise; 8] = [
    Promise {
        what: "epochs that an idle service makes in a second",
        limit: Limit::AtMost(0.0),
        measure: idle_epochs,
    },
    Promise {
        what: "dirty pages of an epoch, one small request at a time",
        limit: Limit::AtMost(16.0),
        measure: |bench| Ok(echo_profile(bench, 1)?.dirty_pages_per_epoch),
    },
    Promise {
        what: "bytes of such an epoch beside its pages and one thread's vector registers",
        // General registers, what the connection moved, and who waits for what. A second thread's
        // vector registers would break it on every processor.
        limit: Limit::AtMost(800.0),
        measure: |bench| bytes_beside(&echo_profile(bench, 1)?),
    },
    Promise {
        what: "dirty pages of such an epoch with 300 idle connections",
        // Here the server itself goes through its list of all of them.
        limit: Limit::AtMost(18.0),
        measure: |bench| Ok(echo_profile(bench, IDLE)?.dirty_pages_per_epoch),
    },
    Promise {
        what: "bytes beside those of such an epoch with 300 idle connections, as a multiple",
        // A hundred and more if the connections were in it.
        limit: Limit::AtMost(2.0),
        measure: |bench| {
            let alone = bytes_beside(&echo_profile(bench, 1)?)?;
            Ok(bytes_beside(&echo_profile(bench, IDLE)?)? / alone)
        },
    },
    Promise {
        what: "kept of redis, 50 connections, pipeline 16",
        limit: Limit::AtLeast(0.05),
        measure: |bench| kept(bench, redis::run, &["GET", "SET"]),
    },
    Promise {
        what: "kept of a chat of 20 clients, pressed",
        limit: Limit::AtLeast(0.1),
        measure: |bench| kept(bench, ngircd::run, &[ngircd::PRESSED]),
    },
    Promise {
        what: "kept of a chat of 20 clients at half of what the server can do",
        limit: Limit::AtLeast(0.4),
        measure: |bench| kept(bench, ngircd::run, &[ngircd::AT_HALF]),
    },
];

impl Limit {
    fn is_kept(self, found: f64) -> bool {
        match self {
            Self::AtMost(limit) => found <= limit,
            Self::AtLeast(limit) => found >= limit,
        }
    }

    fn words(self) -> String {
        match self {
            Self::AtMost(limit) => format!("at most {}", number(limit)),
            Self::AtLeast(limit) => format!("at least {}", number(limit)),
        }
    }
}

/// Measures every promise; fails with those that are broken.
pub fn check(bench: &Bench) -> Result<()> {
    let mut broken = Vec::new();
    for promise in &PROMISES {
        match try_to_keep(bench, promise) {
            Ok(found) => println!(
                "kept: {}: {} ({})",
                promise.what,
                number(found),
                promise.limit.words()
            ),
            Err(why) => {
                println!("BROKEN: {}: {why:#}", promise.what);
                broken.push(promise.what);
            }
        }
    }
    if !broken.is_empty() {
        bail!("promises broken: {}", broken.join("; "));
    }
    Ok(())
}

fn try_to_keep(bench: &Bench, promise: &Promise) -> Result<f64> {
    let mut last = None;
    for _ in 0..TRIES {
        match (promise.measure)(bench) {
            Ok(found) if promise.limit.is_kept(found) => return Ok(found),
            Ok(found) => {
                let words = promise.limit.words();
                last = Some(anyhow::anyhow!(
                    "{} in {TRIES} tries, {words}",
                    number(found)
                ));
            }
            Err(cause) => last = Some(cause),
        }
    }
    Err(last.context("it was never tried")?)
}

fn with_echo<T>(bench: &Bench, measure: impl FnOnce(&Subject) -> Result<T>) -> Result<T> {
    let served = Served {
        name: "echo",
        port: PORT,
        command: &|_| Ok(own_program("echo-server", PORT)?),
    };
    let subject = bench.start(Side::Protected, &served)?;
    let found = measure(&subject)?;
    subject.stop()?;
    Ok(found)
}

/// One connection that was used stays open; nothing happens on it for a second.
fn idle_epochs(bench: &Bench) -> Result<f64> {
    const SECOND: Duration = Duration::from_secs(1);
    with_echo(bench, |subject| {
        let mut stream = TcpStream::connect(subject.address())?;
        let unused = subject.epoch()?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        std::thread::sleep(SECOND);
        let before = subject.epoch()?;
        // A count that stands still whatever happens would say nothing of a second of silence.
        ensure!(
            before > unused,
            "an exchange left the number of the newest epoch at {before}"
        );
        std::thread::sleep(SECOND);
        let more = subject.epoch()?.checked_sub(before);
        Ok(more.context("the number of the newest epoch has fallen")? as f64)
    })
}

/// What the service says of epochs that one connection of so many causes.
fn echo_profile(bench: &Bench, connections: usize) -> Result<Profile> {
    with_echo(bench, |subject| {
        let options = Options {
            kind: Kind::Echo(64),
            connections,
            active: 1,
            rate_per_s: None,
        };
        let running = requests::start(subject.address(), &options)?;
        bench.watch(subject, &running, "")?;
        finish(running)?;
        let profile = subject.take_profiles().pop();
        let of = count(connections, "connection");
        let profile = profile.with_context(|| format!("no figures of {of}"))?;
        // A request that is answered has written something.
        ensure!(
            profile.dirty_pages_per_epoch > 0.0 && profile.bytes_per_epoch > 0.0,
            "the epochs of {of} are counted as empty"
        );
        Ok(profile)
    })
}

/// What an epoch has beside the content of its pages and the vector registers of the one thread
/// that answers. How long those are (`NT_X86_XSTATE`, 576 bytes to 11,008) is up to the processor,
/// and to what the kernel has switched on in it.
fn bytes_beside(profile: &Profile) -> Result<f64> {
    let state = CpuId::new().get_extended_state_info();
    let state = state.context("the processor does not say how long its extended state is")?;
    let registers = f64::from(state.xsave_area_size_enabled_features());
    let bytes = profile.bytes_per_epoch - PAGE_BYTES * profile.dirty_pages_per_epoch - registers;
    ensure!(
        bytes > 0.0,
        "an epoch lacks the {registers} bytes of vector registers"
    );
    Ok(bytes)
}

/// The least that is kept of these figures of a workload's short form.
fn kept(
    bench: &Bench,
    workload: fn(&Bench, &mut Section) -> Result<()>,
    measures: &[&str],
) -> Result<f64> {
    let mut section = Section::default();
    workload(bench, &mut section)?;
    if !section.failures.is_empty() {
        bail!("{}", section.failures.join("; "));
    }
    let rows = section.comparisons.iter();
    let rows = rows.filter(|row| measures.contains(&row.measure.as_str()));
    let ratios: Vec<f64> = rows
        .filter_map(|row| row.ratios())
        .map(|ratio| ratio.middle)
        .collect();
    ratios
        .into_iter()
        .min_by(f64::total_cmp)
        .with_context(|| format!("nothing was measured of {}", measures.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_a_right_side() {
        assert!(Limit::AtMost(2.0).is_kept(2.0) && !Limit::AtMost(2.0).is_kept(2.1));
        assert!(Limit::AtLeast(0.5).is_kept(0.5) && !Limit::AtLeast(0.5).is_kept(f64::NAN));
    }
}
