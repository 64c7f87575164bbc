//! Where and when something was measured.

use std::path::Path;
use std::process::Command;

use crate::model::Taken;

/// Here and now, of the sources in `root`.
pub fn taken(root: &Path, short: bool) -> Taken {
    Taken {
        at: printed(Command::new("date").args(["--utc", "+%Y-%m-%d %H:%M UTC"])),
        commit: commit(root),
        machine: describe(),
        short,
        seconds: 0.0,
    }
}

/// The commit that was measured; with a plus when files differed from it.
fn commit(root: &Path) -> String {
    let git = |arguments: &[&str]| printed(Command::new("git").current_dir(root).args(arguments));
    let name = git(&["rev-parse", "--short", "HEAD"]);
    let changed = git(&["status", "--porcelain", "--", "crates", "Cargo.lock"]);
    if changed.is_empty() {
        name
    } else {
        format!("{name}+")
    }
}

/// Processor, cores, memory and kernel.
fn describe() -> String {
    let read = |file| std::fs::read_to_string(file).unwrap_or_default();
    let after = |text: &str, word: &str| {
        let line = text.lines().find(|line| line.starts_with(word));
        let value = line.and_then(|line| line.split(':').nth(1));
        value.unwrap_or("unknown").trim().to_string()
    };
    let processor = read("/proc/cpuinfo");
    let cores = processor
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory_kb = after(&read("/proc/meminfo"), "MemTotal");
    let memory_kb: f64 = memory_kb.trim_end_matches(" kB").parse().unwrap_or(0.0);
    let virtual_machine = if processor.contains(" hypervisor") {
        ", a virtual machine"
    } else {
        ""
    };
    format!(
        "{}, {cores} cores, {:.0} GB{virtual_machine}, Linux {}",
        after(&processor, "model name"),
        memory_kb / 1e6,
        read("/proc/sys/kernel/osrelease").trim()
    )
}

fn printed(command: &mut Command) -> String {
    match command.output() {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_string()
        }
        _ => "unknown".into(),
    }
}
