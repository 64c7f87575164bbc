//! What is kept of a failure, in a directory of its own.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use unbroken_harness::Service;

use crate::fault::Planned;

/// A failure and all that led to it.
#[derive(Debug)]
pub struct Case<'a> {
    pub seed: u64,
    pub number: u64,
    pub server: &'static str,
    /// The faults of this service, the last of which failed.
    pub faults: &'a [(u64, Planned)],
    pub cause: String,
    /// What the clients saw.
    pub seen: String,
    /// What `status` said before the fault.
    pub before: String,
}

/// Writes everything that can be had now, before anything is cleaned up; returns the directory.
pub fn keep(root: &Path, case: &Case<'_>, service: &Service) -> Result<PathBuf> {
    let place = root.join(format!("fault-{}", case.number));
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let status = match service.status() {
        Ok(status) => format!("{:#}", status.whole),
        Err(cause) => format!("{cause:#}"),
    };
    let (stdout, stderr) = service.printed();
    let texts = [
        ("case", describe(case)),
        ("clients", case.seen.clone()),
        ("status-before", case.before.clone()),
        ("status-after", status),
        ("log", service.log_text()),
        ("stdout", stdout),
        ("stderr", stderr),
        ("processes", processes(service)),
    ];
    for (name, text) in texts {
        fs::write(place.join(name), text)?;
    }
    // The figures of the last epochs, as the product keeps them; gone when it has cleaned up.
    let page = Path::new("/run/unbroken")
        .join(service.name())
        .join("status-page");
    let _ = fs::copy(page, place.join("status-page"));
    Ok(place)
}

fn describe(case: &Case<'_>) -> String {
    let mut text = format!(
        "seed {}, fault {}, server {}\n{}\n\nthe faults of this service:\n",
        case.seed, case.number, case.server, case.cause
    );
    for (number, planned) in case.faults {
        let _ = writeln!(text, "{number}: {planned}");
    }
    text
}

/// Every process of the service and of ours for it, and where each thread of it stands.
fn processes(service: &Service) -> String {
    let mut text = String::new();
    for (pid, line) in service.processes() {
        let _ = writeln!(text, "== {pid}: {line}");
        let read = |path: String| fs::read_to_string(path).unwrap_or_default();
        let status = read(format!("/proc/{pid}/status"));
        let kept = ["State", "PPid", "TracerPid", "NSpid", "SigPnd", "ShdPnd"];
        for line in status
            .lines()
            .filter(|line| kept.iter().any(|key| line.starts_with(key)))
        {
            let _ = writeln!(text, "{line}");
        }
        let threads = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        for thread in threads {
            let place = thread.path().display().to_string();
            let _ = writeln!(
                text,
                "thread {} {}: {}\n{}",
                thread.file_name().to_string_lossy(),
                read(format!("{place}/comm")).trim(),
                read(format!("{place}/syscall")).trim(),
                read(format!("{place}/stack")),
            );
        }
    }
    text
}
