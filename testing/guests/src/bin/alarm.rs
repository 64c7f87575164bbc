//! `alarm(2)`: what is left of it, and that it rings when it should, once.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};
use unbroken_guests::timer::alarm;
use unbroken_guests::{Guest, Place, main as run, same};

/// Longer than any test.
const FAR_SECONDS: u32 = 10_000;
/// What a busy machine may add to a wait.
const LATE: Duration = Duration::from_secs(15);

struct Alarm {
    set: Instant,
}

impl Guest for Alarm {
    fn set_up(_: &Place) -> Result<Self> {
        rings().thread_block()?;
        same("an alarm of before", alarm(FAR_SECONDS), 0)?;
        Ok(Self {
            set: Instant::now(),
        })
    }

    fn check(&mut self) -> Result<()> {
        let left = alarm(1);
        let soon = Instant::now();
        // The kernel rounds to the nearest second, and never down to none.
        let passed = self.set.elapsed().as_secs_f64();
        let expected = f64::from(FAR_SECONDS) - passed;
        ensure!(
            (f64::from(left) - expected).abs() <= 1.0,
            "{left} s are left and not {expected}"
        );
        same(
            "the signal",
            rings().wait().context("wait")?,
            Signal::SIGALRM,
        )?;
        let waited = soon.elapsed();
        ensure!(
            waited >= Duration::from_millis(990) && waited < LATE,
            "an alarm of one second rang after {waited:?}"
        );
        same("left of one that rang", alarm(FAR_SECONDS), 0)?;
        self.set = Instant::now();
        Ok(())
    }

    /// Sets one that rings during what follows.
    fn step(&mut self, words: &str) -> Result<()> {
        match words {
            "soon" => {
                alarm(1);
                self.set = Instant::now();
                Ok(())
            }
            "rang" => {
                same(
                    "the signal",
                    rings().wait().context("wait")?,
                    Signal::SIGALRM,
                )?;
                ensure!(
                    self.set.elapsed() >= Duration::from_millis(990),
                    "it rang too early"
                );
                same("left of one that rang", alarm(FAR_SECONDS), 0)?;
                self.set = Instant::now();
                Ok(())
            }
            _ => anyhow::bail!("this guest does not know {words:?}"),
        }
    }
}

fn rings() -> SigSet {
    SigSet::from(Signal::SIGALRM)
}

fn main() -> ExitCode {
    run::<Alarm>()
}
