//! What a service left behind on this machine.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::process::wait_until;
use crate::{PATIENCE, namespace};

/// The variable that marks every process started for one service: children inherit it, and a
/// replica has the environment of the service it replicates.
const VARIABLE: &str = "UNBROKEN_TEST";

/// The mark of one service's processes.
#[derive(Debug, Clone)]
pub struct Marker {
    value: String,
}

impl Marker {
    pub fn new(name: &str) -> Self {
        Self {
            value: name.to_string(),
        }
    }

    /// Variable and value for a process to be started.
    pub fn variable(&self) -> (&'static str, &str) {
        (VARIABLE, &self.value)
    }

    /// Every process that has the mark: pid and command line. Zombies have no environment and are
    /// not found: they are their parent's to reap.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let wanted = format!("{VARIABLE}={}", self.value);
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        let pids = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &i32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == wanted.as_bytes())
        })
        .map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            (pid, String::from_utf8_lossy(&line).replace('\0', " "))
        })
        .collect()
    }
}

/// What is left of the service `name` itself that should be gone: processes with its mark, its
/// directory under /run/unbroken, shared memory under its name.
pub(crate) fn leftovers_of_service(name: &str, marker: &Marker) -> Vec<String> {
    let mut found: Vec<String> = marker
        .processes()
        .into_iter()
        .map(|(pid, line)| format!("process {pid}: {line}"))
        .collect();
    let directory = Path::new("/run/unbroken").join(name);
    if directory.exists() {
        found.push(format!("directory {}", directory.display()));
    }
    let shared = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let named = shared.filter(|entry| entry.file_name().to_string_lossy().contains(name));
    found.extend(named.map(|entry| format!("shared memory {}", entry.path().display())));
    found
}

/// Waits until nothing is left of the service `name`, and no device, route or packet filter in the
/// calling thread's namespace.
pub fn assert_gone(name: &str, marker: &Marker) -> Result<()> {
    assert_none_left(name, || {
        let mut found = leftovers_of_service(name, marker);
        found.extend(namespace::residue()?);
        Ok(found)
    })
}

/// Waits until no service has left a device, route or packet filter in the calling thread's
/// namespace.
pub fn assert_namespace_empty() -> Result<()> {
    assert_none_left("all services", namespace::residue)
}

/// Waits until `find` finds nothing more.
pub(crate) fn assert_none_left(
    name: &str,
    mut find: impl FnMut() -> Result<Vec<String>>,
) -> Result<()> {
    let mut found = Vec::new();
    let waited = wait_until("nothing left behind", PATIENCE, || {
        found = find()?;
        Ok(found.is_empty().then_some(()))
    });
    waited.with_context(|| format!("left behind by {name}: {}", found.join("; ")))
}
