//! POSIX timers and interval timers. As with timerfds, every expiration is due at a time that the
//! guest knows, so what comes must agree with the clock.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use unbroken_guests::raw::monotonic_ns;
use unbroken_guests::signals::{self, mask};
use unbroken_guests::timer::{Itimer, PosixTimer, itimer, set_itimer};
use unbroken_guests::{Guest, PATIENCE, Place, eventually, main as run, same};

const INTERVAL_NS: u64 = 9_000_000;
const SOON_NS: u64 = 700_000_000;
const FAR_NS: u64 = 3_600_000_000_000;

struct Timers {
    /// Made and deleted, so that the numbers of the others are not 0, 1, 2.
    interval: PosixTimer,
    start_ns: u64,
    once: PosixTimer,
    once_due_ns: u64,
    silent: PosixTimer,
    silent_due_ns: u64,
    disarmed: PosixTimer,
    /// Signal a thread that has ended.
    orphan: PosixTimer,
    orphan_due_ns: u64,
    fired: PosixTimer,
    real_due_ns: u64,
    profiling: u64,
}

impl Guest for Timers {
    fn set_up(_: &Place) -> Result<Self> {
        mask(
            libc::SIG_BLOCK,
            &[
                libc::SIGRTMIN() + 7,
                libc::SIGRTMIN() + 8,
                libc::SIGALRM,
                libc::SIGPROF,
            ],
        )?;
        let gone: Vec<_> = (0..3)
            .map(|_| PosixTimer::silent())
            .collect::<std::io::Result<_>>()?;
        let timers = Self {
            interval: PosixTimer::signalling(libc::SIGRTMIN() + 7, 0x1_2345_6789)?,
            start_ns: 0,
            once: PosixTimer::signalling_this_thread(libc::SIGRTMIN() + 8, 42)?,
            once_due_ns: 0,
            silent: PosixTimer::silent()?,
            silent_due_ns: 0,
            disarmed: PosixTimer::silent()?,
            orphan: of_ended_thread()?,
            orphan_due_ns: 0,
            fired: of_ended_thread()?,
            real_due_ns: 0,
            profiling: 0,
        };
        drop(gone);
        let mut timers = timers;
        timers.arm()?;
        Ok(timers)
    }

    fn check(&mut self) -> Result<()> {
        self.interval().context("interval")?;
        self.once().context("once")?;
        let (_, interval_ns) = self.silent.left()?;
        same("interval of the silent timer", interval_ns, 5 * FAR_NS)?;
        self.deadline("the silent timer", self.silent_due_ns, || {
            Ok(self.silent.left()?.0)
        })?;
        let (_, interval_ns) = self.orphan.left()?;
        same("interval of the timer for nobody", interval_ns, FAR_NS)?;
        self.deadline("the timer for nobody", self.orphan_due_ns, || {
            Ok(self.orphan.left()?.0)
        })?;
        eventually("the end of the other timer for nobody", || {
            Ok(self.fired.left()? == (0, 0))
        })?;
        same("the disarmed timer", self.disarmed.left()?, (0, 0))?;
        let real = itimer(libc::ITIMER_REAL)?;
        same("interval of ITIMER_REAL", real.interval_us, 0)?;
        self.deadline("ITIMER_REAL", self.real_due_ns, || {
            Ok(itimer(libc::ITIMER_REAL)?.left_us * 1000)
        })?;
        let profiling = itimer(libc::ITIMER_PROF)?;
        same(
            "interval of ITIMER_PROF",
            profiling.interval_us,
            5_000_000_000,
        )?;
        // It counts processor time, of which a guest that waits uses little; a tick is 10 ms.
        ensure!(
            (self.profiling - 2_000_000..=self.profiling + 20_000).contains(&profiling.left_us),
            "ITIMER_PROF has {} us of {} left",
            profiling.left_us,
            self.profiling
        );
        same("ITIMER_VIRTUAL", itimer(libc::ITIMER_VIRTUAL)?.left_us, 0)?;
        self.arm()
    }
}

impl Timers {
    fn arm(&mut self) -> Result<()> {
        self.start_ns = monotonic_ns()? + INTERVAL_NS;
        self.interval.set_at(self.start_ns, INTERVAL_NS)?;
        self.once_due_ns = monotonic_ns()? + SOON_NS;
        self.once.set_at(self.once_due_ns, 0)?;
        self.silent_due_ns = monotonic_ns()? + FAR_NS;
        self.silent.set_in(FAR_NS, 5 * FAR_NS)?;
        self.orphan_due_ns = monotonic_ns()? + FAR_NS;
        self.orphan.set_at(self.orphan_due_ns, FAR_NS)?;
        self.fired.set_in(SOON_NS, 0)?;
        self.real_due_ns = monotonic_ns()? + FAR_NS;
        set_itimer(
            libc::ITIMER_REAL,
            Itimer {
                left_us: FAR_NS / 1000,
                interval_us: 0,
            },
        )?;
        self.profiling = 4_000_000_000;
        set_itimer(
            libc::ITIMER_PROF,
            Itimer {
                left_us: self.profiling,
                interval_us: 5_000_000_000,
            },
        )?;
        Ok(())
    }

    /// Every expiration is signalled or counted as an overrun; but for the signal that was pending
    /// at the move, whose overruns the kernel tells nobody before it is taken.
    fn interval(&mut self) -> Result<()> {
        let signal = libc::SIGRTMIN() + 7;
        let due = |now_ns: u64| (now_ns - self.start_ns) / INTERVAL_NS + 1;
        eventually("a signal of the interval timer", || {
            let taken = signals::take(&[signal])?;
            if let Some(taken) = taken {
                same("value", taken.value, 0x1_2345_6789)?;
                same("code", taken.code, libc::SI_TIMER)?;
            }
            Ok(taken.is_some())
        })?;
        // The next one that is due is awaited, so that nothing waits when counting begins.
        let counted_from = due(monotonic_ns()?);
        eventually("the next signals", || {
            let mut last = None;
            while let Some(taken) = signals::take(&[signal])? {
                last = Some(taken);
            }
            Ok(last.is_some() && due(monotonic_ns()?) > counted_from)
        })?;
        let start = due(monotonic_ns()?);
        std::thread::sleep(Duration::from_nanos(20 * INTERVAL_NS));
        let before = due(monotonic_ns()?);
        signals::take(&[signal])?.context("it no longer fires")?;
        let counted = 1 + self.interval.overrun()? as u64;
        let after = due(monotonic_ns()?);
        // One may be due and its interrupt not yet taken, at either end.
        ensure!(
            (before - start - 1..=after - start + 1).contains(&counted),
            "{counted} expirations, {} were due",
            before - start
        );
        self.interval.set_in(0, 0)?;
        while signals::take(&[signal])?.is_some() {}
        Ok(())
    }

    fn once(&self) -> Result<()> {
        let signal = libc::SIGRTMIN() + 8;
        let mut taken = None;
        eventually("its signal", || {
            taken = signals::take(&[signal])?;
            Ok(taken.is_some())
        })?;
        same("value", taken.map(|taken| taken.value), Some(42))?;
        ensure!(monotonic_ns()? >= self.once_due_ns, "it fired too early");
        same("again", signals::take(&[signal])?, None)
    }

    /// A rest that was restored as a rest would move the deadline with each takeover.
    /// Reading clock and rest is no one step: on a busy machine the nearest of several is right.
    fn deadline(&self, name: &str, due_ns: u64, left_ns: impl Fn() -> Result<u64>) -> Result<()> {
        let mut off_ns = u64::MAX;
        for _ in 0..100 {
            let found_ns = monotonic_ns()? + left_ns()?;
            off_ns = off_ns.min(found_ns.abs_diff(due_ns));
        }
        ensure!(
            off_ns < PATIENCE.as_nanos() as u64 / 1000,
            "{name} moved by {off_ns} ns"
        );
        Ok(())
    }
}

fn of_ended_thread() -> Result<PosixTimer> {
    let signal = libc::SIGRTMIN() + 7;
    let made = std::thread::spawn(move || PosixTimer::signalling_this_thread(signal, 1)).join();
    Ok(made.map_err(|_| anyhow::anyhow!("the thread panicked"))??)
}

fn main() -> ExitCode {
    run::<Timers>()
}
