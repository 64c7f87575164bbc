//! What a service left behind on this machine.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::namespace;

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

/// What is left of the service `name` that should be gone: processes with its mark, its directory
/// under /run/unbroken, devices, routes and packet filters in the calling thread's namespace.
pub fn leftovers(name: &str, marker: &Marker) -> Result<Vec<String>> {
    let mut found: Vec<String> = marker
        .processes()
        .into_iter()
        .map(|(pid, line)| format!("process {pid}: {line}"))
        .collect();
    let directory = Path::new("/run/unbroken").join(name);
    if directory.exists() {
        found.push(format!("directory {}", directory.display()));
    }
    found.extend(namespace::residue()?);
    Ok(found)
}
