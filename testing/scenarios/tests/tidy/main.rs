//! The house rules that a program can hold (docs/TESTING.md lists them).

mod circles;
mod names;
mod walls;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const LONGEST_FILE_LINES: usize = 600;

/// Every Rust file under version control or about to be: path within the workspace, and text.
fn sources() -> Result<Vec<(String, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let output = Command::new("git")
        .current_dir(&root)
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "*.rs",
        ])
        .output()
        .context("cannot run git")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let names = String::from_utf8(output.stdout)?;
    let paths: Vec<PathBuf> = names.lines().map(|name| root.join(name)).collect();
    let read = |(name, path): (&str, &PathBuf)| {
        let text = std::fs::read_to_string(path).ok()?;
        Some((name.to_string(), text))
    };
    let sources: Vec<_> = names.lines().zip(&paths).filter_map(read).collect();
    ensure!(
        sources.len() > 10,
        "git listed only {} files",
        sources.len()
    );
    Ok(sources)
}

/// `file:line: text` of every line that `offends`.
fn offences(files: impl Fn(&str) -> bool, offends: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (name, text) in sources()?.into_iter().filter(|(name, _)| files(name)) {
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| offends(line)) {
            found.push(format!("{name}:{number}: {}", line.trim()));
        }
    }
    Ok(found)
}

fn assert_none(rule: &str, found: &[String]) -> Result<()> {
    ensure!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
    Ok(())
}

#[test]
fn no_files_of_a_crate_go_round_in_a_circle() -> Result<()> {
    let sources: BTreeMap<String, String> = sources()?.into_iter().collect();
    let is_root = |name: &&String| {
        name.ends_with("/src/lib.rs")
            || name.ends_with("/src/main.rs")
            || name.contains("/src/bin/")
    };
    let mut found = Vec::new();
    for root in sources.keys().filter(is_root) {
        let circles = circles::of_crate(root, &sources)?;
        found.extend(circles.into_iter().flat_map(|circle| circle.uses));
    }
    assert_none("files of a crate go round in a circle", &found)
}

#[test]
fn crates_use_those_that_they_may() -> Result<()> {
    assert_none("a crate uses one that it may not", &walls::trespasses()?)
}

fn is_product(name: &str) -> bool {
    name.starts_with("crates/") && name.contains("/src/")
}

#[test]
fn no_file_has_outgrown_a_room() -> Result<()> {
    let long: Vec<String> = sources()?
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > LONGEST_FILE_LINES)
        .map(|(name, lines)| format!("{name}: {lines} lines"))
        .collect();
    assert_none("a file has at most 600 lines", &long)
}

#[test]
fn unsafe_code_lives_in_sys_alone() -> Result<()> {
    // Put together here so that this file does not offend itself.
    let forms = ["{", "fn", "impl", "extern"].map(|what| format!("{} {what}", "unsafe"));
    // Guests speak to the kernel raw: half of what they keep has no safe wrapper.
    let may = ["crates/sys/", "testing/guests/"];
    let product = |name: &str| !may.iter().any(|place| name.starts_with(place));
    let code = |line: &str| !line.trim_start().starts_with("//");
    let found = offences(product, |line| {
        code(line) && forms.iter().any(|form| line.contains(form.as_str()))
    })?;
    assert_none(
        "unsafe code is in crates/sys and in testing/guests alone",
        &found,
    )
}

#[test]
fn nothing_is_left_for_later() -> Result<()> {
    let notes = ["TO-DO", "FIX-ME", "X-X-X", "to-do!(", "un-implemented!("]
        .map(|word| word.replace('-', ""));
    let found = offences(
        |_| true,
        |line| notes.iter().any(|note| line.contains(note.as_str())),
    )?;
    assert_none("no stubs and no notes to ourselves", &found)
}

/// The one sleep that waits for nothing, as file and line. It gives the core away for the length
/// of a vDSO call: one thread of a stopped tree must come out of user code that cannot be left half
/// done, no event says when it has, and the caller looks again afterwards. To yield instead gives
/// it whole time slices while the rest of the service stands still: 13 ms at p99, against 0.3.
const GIVES_THE_CORE_AWAY: (&str, &str) = (
    "crates/tracee/src/user_code.rs",
    "std::thread::sleep(moment);",
);

#[test]
fn product_code_never_sleeps() -> Result<()> {
    let forms = ["thread::sleep", "usleep(", "nanosleep(", "park_timeout"];
    let mut found = offences(is_product, |line| {
        forms.iter().any(|form| line.contains(form))
    })?;
    let (file, line) = GIVES_THE_CORE_AWAY;
    let excused = found
        .iter()
        .position(|offence| offence.starts_with(file) && offence.ends_with(&format!(": {line}")))
        .with_context(|| format!("{file} sleeps no more: nothing is to be excused"))?;
    found.remove(excused);
    assert_none("a sleep is a race or an event that was missed", &found)
}

#[test]
fn comments_quote_what_the_handbook_has() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/KERNEL.md");
    let handbook = std::fs::read_to_string(path).context("docs/KERNEL.md")?;
    let headings: Vec<&str> = handbook
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches('#').trim())
        .collect();
    // Put together here so that this file quotes nothing itself.
    let quoting = ["KERNEL.md", ", "].concat();
    let mut found = Vec::new();
    for (name, text) in sources()? {
        let words = text
            .split_whitespace()
            .filter(|word| !matches!(*word, "//" | "///" | "//!"));
        let text = words.collect::<Vec<_>>().join(" ");
        for quoted in text.split(&quoting).skip(1) {
            let heading = quoted.split([')', '.']).next().unwrap_or_default();
            if !headings.contains(&heading) {
                found.push(format!("{name}: {heading}"));
            }
        }
    }
    assert_none(
        "a comment quotes a heading that KERNEL.md does not have",
        &found,
    )
}

#[test]
fn product_code_names_no_server() -> Result<()> {
    let servers = [
        "ngircd",
        "icecast",
        "redis",
        "nginx",
        "memcached",
        "mosquitto",
    ];
    let found = offences(
        |name| name.starts_with("crates/"),
        |line| {
            servers
                .iter()
                .any(|server| line.to_lowercase().contains(server))
        },
    )?;
    assert_none("protection knows no particular server", &found)
}
