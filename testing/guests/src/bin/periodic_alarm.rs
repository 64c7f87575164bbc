//! `setitimer(2)` with an interval: its signal is blocked, and pending nearly always, and the timer
//! goes on whenever it is taken.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use unbroken_guests::signals::{self, mask};
use unbroken_guests::timer::{Itimer, itimer, set_itimer};
use unbroken_guests::{Guest, Place, eventually, main as run, same};

const INTERVAL_US: u64 = 20_000;

struct Periodic;

impl Guest for Periodic {
    fn set_up(_: &Place) -> Result<Self> {
        mask(libc::SIG_BLOCK, &[libc::SIGALRM])?;
        let timer = Itimer {
            left_us: INTERVAL_US,
            interval_us: INTERVAL_US,
        };
        set_itimer(libc::ITIMER_REAL, timer)?;
        Ok(Self)
    }

    fn check(&mut self) -> Result<()> {
        ring("the first signal")?;
        let start = Instant::now();
        for _ in 0..4 {
            ring("a signal after it")?;
        }
        // The first two may have been close to each other.
        let least = Duration::from_micros(3 * INTERVAL_US - INTERVAL_US / 2);
        ensure!(
            start.elapsed() >= least,
            "four signals in {:?}",
            start.elapsed()
        );
        let timer = itimer(libc::ITIMER_REAL)?;
        same("interval", timer.interval_us, INTERVAL_US)?;
        // It is met with its signal pending.
        std::thread::sleep(Duration::from_micros(2 * INTERVAL_US));
        Ok(())
    }
}

fn ring(what: &str) -> Result<()> {
    eventually(what, || {
        let taken = signals::take(&[libc::SIGALRM])?;
        if let Some(taken) = taken {
            same("code", taken.code, libc::SI_KERNEL)?;
        }
        Ok(taken.is_some())
    })
    .context("the timer has stopped")
}

fn main() -> ExitCode {
    run::<Periodic>()
}
