//! Timerfds. Every expiration is due at a time that the guest knows, on a clock that a takeover
//! does not set back: so counts must agree with the clock exactly, whatever the takeover took.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustix::io::read;
use unbroken_guests::raw::monotonic_ns;
use unbroken_guests::{Guest, PATIENCE, Place, main as run, refused, same};

const INTERVAL_NS: u64 = 7_000_000;
const FAR_NS: u64 = 3_600_000_000_000;
/// Longer than a kill waits for, so that most fire on the other side.
const SOON_NS: u64 = 700_000_000;

struct Timers {
    interval: Periodic,
    /// Expirations that are never read before a check.
    unread: Periodic,
    /// So fast that expirations fall between the reads of a capture.
    fast: [Periodic; 2],
    relative: (TimerFd, u64),
    absolute: (TimerFd, u64),
    far: (TimerFd, u64),
    disarmed: TimerFd,
    real: TimerFd,
}

/// Fires at `start`, and each interval after that.
struct Periodic {
    timer: TimerFd,
    interval_ns: u64,
    start_ns: u64,
    seen: u64,
}

impl Guest for Timers {
    fn set_up(_: &Place) -> Result<Self> {
        let new = || TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK);
        let timers = Self {
            interval: Periodic::start(INTERVAL_NS)?,
            unread: Periodic::start(INTERVAL_NS)?,
            fast: [Periodic::start(100_000)?, Periodic::start(1_000_000)?],
            relative: (new()?, 0),
            absolute: (new()?, 0),
            far: (new()?, monotonic_ns()? + FAR_NS),
            disarmed: new()?,
            real: TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC)?,
        };
        let far = Expiration::OneShot(spec(FAR_NS));
        timers.far.0.set(far, TimerSetTimeFlags::empty())?;
        timers.arm()
    }

    fn check(&mut self) -> Result<()> {
        self.interval.check().context("interval")?;
        self.unread.check().context("unread")?;
        for fast in &mut self.fast {
            let interval_ns = fast.interval_ns;
            fast.check()
                .with_context(|| format!("every {interval_ns} ns"))?;
        }
        for (name, (timer, due_ns)) in [("relative", &self.relative), ("absolute", &self.absolute)]
        {
            let mut polled = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
            let count = poll(&mut polled, PollTimeout::try_from(PATIENCE)?)?;
            ensure!(count == 1, "the {name} timer never fired");
            same(name, expirations(timer)?, 1)?;
            ensure!(
                monotonic_ns()? >= *due_ns,
                "the {name} timer fired too early"
            );
            refused(name, expirations(timer), libc::EAGAIN)?;
        }
        let Some(Expiration::OneShot(left)) = self.far.0.get()? else {
            anyhow::bail!("the far timer is not armed once");
        };
        let left_ns = Duration::from(left).as_nanos() as u64;
        // The rest was read after it was armed and before now.
        ensure!(
            left_ns <= FAR_NS,
            "the far timer has more time left than ever"
        );
        let due_ns = monotonic_ns()? + left_ns;
        // Restored from a rest it could drift with each takeover: a deadline does not.
        ensure!(
            due_ns.abs_diff(self.far.1) < INTERVAL_NS,
            "the far timer moved by {} ns",
            due_ns.abs_diff(self.far.1)
        );
        same("disarmed", self.disarmed.get()?, None)?;
        let Some(Expiration::IntervalDelayed(_, every)) = self.real.get()? else {
            anyhow::bail!("the timer on the other clock has no interval");
        };
        same(
            "its interval",
            Duration::from(every),
            Duration::from_nanos(FAR_NS),
        )?;
        let mut anew = Self::set_up(&nowhere())?;
        // These go on: what a takeover loses or doubles adds up.
        std::mem::swap(&mut self.fast, &mut anew.fast);
        *self = anew;
        Ok(())
    }
}

fn nowhere() -> Place {
    let nothing = std::net::Ipv4Addr::UNSPECIFIED;
    Place {
        port: 0,
        directory: "/".into(),
        host: (nothing, 0).into(),
        own: nothing.into(),
    }
}

impl Timers {
    fn arm(mut self) -> Result<Self> {
        let soon = Expiration::OneShot(spec(SOON_NS));
        self.relative.1 = monotonic_ns()? + SOON_NS;
        self.relative.0.set(soon, TimerSetTimeFlags::empty())?;
        self.absolute.1 = monotonic_ns()? + SOON_NS;
        let at = Expiration::OneShot(spec(self.absolute.1));
        self.absolute
            .0
            .set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        let daily = Expiration::Interval(spec(FAR_NS));
        self.real.set(daily, TimerSetTimeFlags::empty())?;
        Ok(self)
    }
}

impl Periodic {
    fn start(interval_ns: u64) -> Result<Self> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
        let start_ns = monotonic_ns()? + interval_ns;
        let every = Expiration::IntervalDelayed(spec(start_ns), spec(interval_ns));
        timer.set(every, TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        Ok(Self {
            timer,
            interval_ns,
            start_ns,
            seen: 0,
        })
    }

    /// All expirations so far, and no others, have come.
    fn check(&mut self) -> Result<()> {
        std::thread::sleep(Duration::from_nanos(2 * self.interval_ns));
        let due = |now_ns: u64| (now_ns - self.start_ns) / self.interval_ns + 1;
        let before = due(monotonic_ns()?);
        self.seen += expirations(&self.timer)?;
        let after = due(monotonic_ns()?);
        // One may be due and its interrupt not yet taken.
        ensure!(
            (before.saturating_sub(1)..=after).contains(&self.seen),
            "{} expirations, {before} to {after} were due",
            self.seen
        );
        Ok(())
    }
}

fn expirations(timer: &TimerFd) -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    read(timer, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn spec(ns: u64) -> TimeSpec {
    TimeSpec::from_duration(Duration::from_nanos(ns))
}

fn main() -> ExitCode {
    run::<Timers>()
}
