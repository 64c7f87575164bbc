//! Counts of what the processes of a service hold, sampled between faults: none may only grow.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Result, bail};
use unbroken_harness::{Service, Status, namespace};

/// Fewer takeovers than this show no trend.
const SAMPLES_FOR_A_TREND: usize = 30;

/// Kernel objects of which a takeover makes and ends some. Counted on the whole machine, where others
/// work too: they are shown and fail nothing.
const SLABS: [&str; 9] = [
    "net_namespace",
    "mnt_cache",
    "nsproxy",
    "task_struct",
    "mm_struct",
    "pid",
    "TCP",
    "filp",
    "userfaultfd_ctx_cache",
];
const MACHINE: &str = "machine: ";

/// Counts by what is counted.
pub type Sample = BTreeMap<String, u64>;

/// The samples of one service, in order.
#[derive(Debug, Default)]
pub struct Ledger {
    samples: Vec<Sample>,
}

/// Counts what there is now.
pub fn sample(service: &Service, status: &Status) -> Sample {
    let mut found = Sample::new();
    let roles = [
        ("primary", status.primary_pid),
        ("standby", status.standby_pid),
        ("service", status.service_pids.first().copied()),
    ];
    for (role, pid) in roles {
        if let Some(pid) = pid {
            count_process(role, pid, &mut found);
        }
    }
    let processes = service.processes();
    found.insert("processes".into(), processes.len() as u64);
    let namespaces: BTreeSet<String> = processes
        .iter()
        .flat_map(|(pid, _)| namespaces_of(*pid))
        .collect();
    found.insert("namespaces".into(), namespaces.len() as u64);
    found.insert(
        "devices, routes, tables".into(),
        namespace::residue().map_or(0, |lines| lines.len() as u64),
    );
    found.insert(
        "entries of /dev/shm".into(),
        shared_memory_of(service.name()),
    );
    count_slabs(&mut found);
    found
}

/// Only root may see them; without them the rest is counted all the same.
fn count_slabs(found: &mut Sample) {
    let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    for line in slabs.lines() {
        let mut fields = line.split_whitespace();
        let (name, count) = (fields.next().unwrap_or_default(), fields.next());
        if let (true, Some(Ok(count))) = (SLABS.contains(&name), count.map(str::parse)) {
            found.insert(format!("{MACHINE}{name}"), count);
        }
    }
}

fn count_process(role: &str, pid: i32, found: &mut Sample) {
    let entries = |directory: &str| {
        fs::read_dir(format!("/proc/{pid}/{directory}")).map_or(0, |list| list.count() as u64)
    };
    let lines = |file: &str| {
        fs::read_to_string(format!("/proc/{pid}/{file}"))
            .map_or(0, |text| text.lines().count() as u64)
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let anonymous = status.lines().find_map(|line| {
        let value = line.strip_prefix("RssAnon:")?;
        value.split_whitespace().next()?.parse().ok()
    });
    let counts = [
        ("descriptors", entries("fd")),
        ("threads", entries("task")),
        ("mappings", lines("maps")),
        ("mounts", lines("mountinfo")),
        ("KiB of its own", anonymous.unwrap_or(0)),
    ];
    for (what, count) in counts {
        found.insert(format!("{role}: {what}"), count);
    }
}

/// Every namespace that a process is in or holds open.
fn namespaces_of(pid: i32) -> Vec<String> {
    let mut found = Vec::new();
    for directory in ["ns", "fd"] {
        let entries = fs::read_dir(format!("/proc/{pid}/{directory}"));
        for entry in entries.into_iter().flatten().flatten() {
            if let Ok(target) = fs::read_link(entry.path()) {
                let target = target.to_string_lossy().into_owned();
                if ["mnt:", "net:", "pid:", "ipc:"]
                    .iter()
                    .any(|kind| target.starts_with(kind))
                {
                    found.push(target);
                }
            }
        }
    }
    found
}

fn shared_memory_of(name: &str) -> u64 {
    let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().contains(name));
    ours.count() as u64
}

impl Ledger {
    pub fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// For each count: the least and the most of the first third, and of the last.
    pub fn trends(&self) -> Vec<Trend> {
        let third = self.samples.len() / 3;
        if third == 0 {
            return Vec::new();
        }
        let names: BTreeSet<&String> = self.samples.iter().flat_map(BTreeMap::keys).collect();
        let range = |samples: &[Sample], name: &str| {
            let values = samples
                .iter()
                .filter_map(|sample| sample.get(name).copied());
            let values: Vec<u64> = values.collect();
            let least = values.iter().min().copied().unwrap_or(0);
            (least, values.iter().max().copied().unwrap_or(0))
        };
        names
            .into_iter()
            .map(|name| Trend {
                name: name.clone(),
                first: range(&self.samples[..third], name),
                last: range(&self.samples[self.samples.len() - third..], name),
            })
            .collect()
    }

    /// How much was held early and late, when there are enough samples to tell.
    pub fn report(&self) -> Option<String> {
        let count = self.samples.len();
        (count >= SAMPLES_FOR_A_TREND).then(|| {
            let trends: Vec<String> = self
                .trends()
                .iter()
                .map(|trend| format!("  {trend}"))
                .collect();
            format!("held over {count} faults:\n{}", trends.join("\n"))
        })
    }

    /// Fails when a count only grew.
    pub fn assert_no_growth(&self) -> Result<()> {
        if self.samples.len() < SAMPLES_FOR_A_TREND {
            return Ok(());
        }
        let grown: Vec<String> = self
            .trends()
            .iter()
            .filter(|trend| trend.only_grew())
            .map(Trend::to_string)
            .collect();
        if !grown.is_empty() {
            bail!(
                "over {} takeovers: {}",
                self.samples.len(),
                grown.join("; ")
            );
        }
        Ok(())
    }
}

/// How a count moved: (least, most) early and late.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trend {
    pub name: String,
    pub first: (u64, u64),
    pub last: (u64, u64),
}

impl Trend {
    /// All late values lie above all early ones, by more than a service's own life explains.
    fn only_grew(&self) -> bool {
        if self.name.starts_with(MACHINE) {
            return false;
        }
        // A server's memory and descriptors are its own affair: its load decides.
        if self.name.starts_with("service: ") && !self.name.ends_with("mounts") {
            return false;
        }
        let slack = if self.name.contains("KiB") {
            self.first.1 / 4 + 1024
        } else {
            0
        };
        self.last.0 > self.first.1 + slack
    }
}

impl std::fmt::Display for Trend {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "{}: {}-{} at first, {}-{} at last",
            self.name, self.first.0, self.first.1, self.last.0, self.last.1
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(counts: impl Iterator<Item = u64>) -> Ledger {
        let mut ledger = Ledger::default();
        for count in counts {
            ledger.add(Sample::from([("primary: descriptors".to_string(), count)]));
        }
        ledger
    }

    #[test]
    fn what_only_grows_is_found() {
        let grown = ledger((0..60).map(|number| 20 + number / 4)).assert_no_growth();
        assert!(
            grown
                .unwrap_err()
                .to_string()
                .contains("primary: descriptors")
        );
    }

    #[test]
    fn what_comes_and_goes_is_not() {
        ledger((0..60).map(|number| 20 + number % 7))
            .assert_no_growth()
            .unwrap();
        ledger((0..5).map(|number| 20 + number))
            .assert_no_growth()
            .unwrap();
    }
}
