//! Which core does what, and how busy each of them is.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The calling thread.
const THIS_THREAD: Pid = Pid::from_raw(0);

/// The cores of this machine as the product divides them: the service has the first one that we
/// may use, everything else the others.
#[derive(Debug, Clone)]
pub struct Cores {
    all: Vec<usize>,
}

/// What was done with the time of a window, in parts of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Busy {
    /// Of the service's core.
    pub service: f64,
    /// Of the other cores, taken together.
    pub others: f64,
    /// Of all of them, what the hypervisor gave to somebody else.
    pub stolen: f64,
}

/// Times of each core since the machine was started, in ticks.
#[derive(Debug, Clone, Copy, Default)]
struct Ticks {
    busy: u64,
    stolen: u64,
    all: u64,
}

/// The start of a window.
#[derive(Debug)]
pub struct Since(Vec<Ticks>);

impl Cores {
    pub fn find() -> Result<Self> {
        let allowed = sched_getaffinity(THIS_THREAD).context("cannot read our own cores")?;
        let all = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false));
        Ok(Self { all: all.collect() })
    }

    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// The calling thread, and what it starts from now on, on the service's core alone.
    pub fn only_service(&self) -> Result<()> {
        bind(&self.all[..1])
    }

    /// The calling thread, and what it starts from now on, on every core but the service's.
    pub fn only_others(&self) -> Result<()> {
        bind(if self.count() > 1 {
            &self.all[1..]
        } else {
            &self.all
        })
    }

    /// On all of them: what the product needs to divide them itself.
    pub fn everywhere(&self) -> Result<()> {
        bind(&self.all)
    }

    pub fn since_now(&self) -> Result<Since> {
        self.ticks().map(Since)
    }

    /// How busy the cores were since then.
    pub fn busy(&self, since: &Since) -> Result<Busy> {
        let now = self.ticks()?;
        let share = |from: usize, until: usize, part: fn(&Ticks) -> u64| {
            let sum = |ticks: &[Ticks], part: fn(&Ticks) -> u64| {
                ticks[from..until].iter().map(part).sum::<u64>()
            };
            let all = sum(&now, |ticks| ticks.all) - sum(&since.0, |ticks| ticks.all);
            (sum(&now, part) - sum(&since.0, part)) as f64 / all.max(1) as f64
        };
        let count = self.count();
        let first_other = 1.min(count - 1);
        Ok(Busy {
            service: share(0, 1, |ticks| ticks.busy),
            others: share(first_other, count, |ticks| ticks.busy),
            stolen: share(0, count, |ticks| ticks.stolen),
        })
    }

    fn ticks(&self) -> Result<Vec<Ticks>> {
        let stat = std::fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let of_core = |core: &usize| {
            let prefix = format!("cpu{core} ");
            let line = stat.lines().find_map(|line| line.strip_prefix(&prefix));
            line.map(parse_ticks)
        };
        let found = self.all.iter().map(of_core).collect::<Option<Vec<_>>>();
        found.context("/proc/stat lacks one of our cores")
    }
}

fn bind(cores: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    sched_setaffinity(THIS_THREAD, &set).with_context(|| format!("cannot bind to cores {cores:?}"))
}

/// user nice system idle iowait irq softirq steal (proc(5)). What is nice gives way to whatever is
/// measured and counts as idle.
fn parse_ticks(line: &str) -> Ticks {
    let numbers: Vec<u64> = line
        .split_whitespace()
        .map(|word| word.parse().unwrap_or(0))
        .collect();
    let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
    let busy = at(0) + at(2) + at(5) + at(6);
    let stolen = at(7);
    Ticks {
        busy,
        stolen,
        all: busy + stolen + at(1) + at(3) + at(4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_a_line() {
        let ticks = parse_ticks("10 1 5 100 4 0 2 3 0 0");
        assert_eq!((ticks.busy, ticks.stolen, ticks.all), (17, 3, 125));
    }

    #[test]
    fn a_spinning_thread_is_seen() {
        let cores = Cores::find().unwrap();
        cores.only_service().unwrap();
        let since = cores.since_now().unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed().as_millis() < 100 {}
        assert!(cores.busy(&since).unwrap().service > 0.3);
    }
}
