//! Clocks through the vDSO, `sched_getcpu` through rseq, and a program's view of time: what is
//! monotonic never goes back, in any thread, across any move; and sleeps end when they should.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use unbroken_guests::raw::{self, clock_ns, current_processor, monotonic_ns};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, same};

const SLEEP_NS: u64 = 900_000_000;

struct Clocks {
    last: Vec<(libc::clockid_t, u64)>,
    /// A thread that reads the clock all the time, and how often it went back.
    went_back: Arc<AtomicU64>,
    readings: Arc<AtomicU64>,
    _stop: Arc<AtomicBool>,
    sleeper: Receiver<u64>,
    woken_from_ns: u64,
}

const CLOCKS: [libc::clockid_t; 5] = [
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_MONOTONIC_RAW,
    libc::CLOCK_MONOTONIC_COARSE,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_REALTIME,
];

impl Guest for Clocks {
    fn set_up(_: &Place) -> Result<Self> {
        let (went_back, readings) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let (backwards, count, end) = (
            Arc::clone(&went_back),
            Arc::clone(&readings),
            Arc::clone(&stop),
        );
        std::thread::spawn(move || {
            let mut last = 0;
            while !end.load(Ordering::Relaxed) {
                // A hundred in a row, so that stops fall into the vDSO.
                for _ in 0..100 {
                    let now = monotonic_ns().unwrap_or(0);
                    backwards.fetch_add(u64::from(now < last), Ordering::Relaxed);
                    last = now;
                }
                count.fetch_add(100, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let mut clocks = Self {
            last: Vec::new(),
            went_back,
            readings,
            _stop: stop,
            sleeper: channel().1,
            woken_from_ns: 0,
        };
        clocks.arm()?;
        Ok(clocks)
    }

    fn check(&mut self) -> Result<()> {
        for (clock, last) in &self.last {
            let now = clock_ns(*clock)?;
            ensure!(now >= *last, "clock {clock} went back from {last} to {now}");
            // The vDSO agrees with the kernel.
            let by_call = raw::clock_by_call_ns(*clock)?;
            ensure!(
                by_call >= now,
                "clock {clock}: {now} by the vDSO, then {by_call} by the kernel"
            );
        }
        same(
            "backward steps in the other thread",
            self.went_back.load(Ordering::Relaxed),
            0,
        )?;
        let before = self.readings.load(Ordering::Relaxed);
        unbroken_guests::eventually("more readings", || {
            Ok(self.readings.load(Ordering::Relaxed) > before)
        })?;
        let processor = current_processor().context("sched_getcpu")?;
        ensure!(processor < 4096, "processor {processor}");
        let woken_ns = self
            .sleeper
            .recv_timeout(PATIENCE)
            .context("a sleep that never ends")?;
        ensure!(
            woken_ns >= self.woken_from_ns,
            "a sleep ended {} ns early",
            self.woken_from_ns - woken_ns
        );
        self.arm()
    }
}

impl Clocks {
    fn arm(&mut self) -> Result<()> {
        self.last = CLOCKS
            .map(|clock| clock_ns(clock).map(|now| (clock, now)))
            .into_iter()
            .collect::<std::io::Result<_>>()?;
        let (tell, told) = channel();
        self.sleeper = told;
        self.woken_from_ns = monotonic_ns()? + SLEEP_NS;
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_nanos(SLEEP_NS));
            tell.send(monotonic_ns().unwrap_or(0))
        });
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Clocks>()
}
