//! The benchmark: every workload unprotected and protected, in turn on the same machine with the
//! same pin, and a report that shows the ratios, their spread, and where the time goes.
//!
//! A run measures all sections or a few (`--only`); report.json keeps the last of each, and
//! report.html and docs/FIGURES.md are drawn from it.

mod bench;
mod cores;
mod failover;
mod figures;
mod histogram;
mod machine;
pub mod model;
mod promises;
mod report;
mod sections;
mod stalls;
mod subject;
mod sweeps;
mod targets;
mod text;
mod tool;
mod totals;
mod workloads;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use unbroken_harness::namespace;

use bench::Bench;
use model::{Measured, Section};

/// What a run is to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// The sections to measure; all when empty.
    pub only: Vec<String>,
    /// Little time for each; with nothing named, only what the promises need.
    pub short: bool,
    /// How often each side of a comparison runs.
    pub rounds: usize,
    /// Measures nothing: draws what was measured anew.
    pub draw: bool,
    /// The root of the workspace.
    pub root: PathBuf,
}

/// The words that `only` knows.
pub fn names() -> Vec<&'static str> {
    sections::ALL.iter().map(|kind| kind.name).collect()
}

/// Measures, and writes the report; says at the end what could not be measured. In the short form
/// fails with the promises that are broken.
pub fn run(options: &Options) -> Result<()> {
    let known = names();
    if let Some(word) = options
        .only
        .iter()
        .find(|word| !known.contains(&word.as_str()))
    {
        bail!("nothing is called {word}; known are {}", known.join(", "));
    }
    if options.draw {
        let place = place(&options.root)?;
        return write_report(&place, options, &read(&place.join("report.json")));
    }
    namespace::enter_new()?;
    raise_descriptor_limit()?;
    let promises_alone = options.short && options.only.is_empty();
    let bench = Bench::new(options.short, promises_alone, options.rounds)?;
    if promises_alone {
        return promises::check(&bench);
    }
    let place = place(&options.root)?;
    let file = place.join(if options.short {
        "short.json"
    } else {
        "report.json"
    });
    let mut measured = read(&file);
    let begun = Instant::now();
    let mut failures = Vec::new();
    for kind in &sections::ALL {
        if !options.only.is_empty() && !options.only.iter().any(|word| word == kind.name) {
            continue;
        }
        println!(
            "{} ({:.0} s so far)",
            kind.title,
            begun.elapsed().as_secs_f64()
        );
        let section = measure(&bench, kind, options);
        failures.extend(
            section
                .failures
                .iter()
                .map(|line| format!("{}: {line}", kind.name)),
        );
        // Another run may have measured another part meanwhile.
        measured = read(&file);
        replace(&mut measured, section);
        write_json(&file, &measured)?;
    }
    if !options.short {
        write_report(&place, options, &measured)?;
    }
    println!("measured in {:.0} s", begun.elapsed().as_secs_f64());
    for line in &failures {
        println!("not measured: {line}");
    }
    Ok(())
}

/// The directory of the report.
fn place(root: &Path) -> Result<PathBuf> {
    let place = root.join("target/bench");
    std::fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    Ok(place)
}

fn measure(bench: &Bench, kind: &sections::Kind, options: &Options) -> Section {
    let begun = Instant::now();
    let mut section = Section {
        name: kind.name.into(),
        title: kind.title.into(),
        about: kind.about.into(),
        taken: machine::taken(&options.root, options.short),
        ..Section::default()
    };
    let outcome = bench.disturbance().and_then(|disturbance| {
        section.disturbed = disturbance;
        (kind.run)(bench, &mut section)
    });
    if let Err(cause) = outcome {
        bench.fail(&mut section, "the whole", &cause);
    }
    section.taken.seconds = begun.elapsed().as_secs_f64();
    section
}

/// The new measurement of a section in the place of the old one.
fn replace(measured: &mut Measured, section: Section) {
    measured.sections.retain(|old| old.name != section.name);
    measured.sections.push(section);
    let place = |name: &str| sections::ALL.iter().position(|kind| kind.name == name);
    measured
        .sections
        .sort_by_key(|section| place(&section.name));
}

/// What was measured before; nothing when there is no such file or it is of another make.
fn read(file: &Path) -> Measured {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

fn write_json(file: &Path, measured: &Measured) -> Result<()> {
    let text = serde_json::to_string_pretty(measured)?;
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// The page beside the numbers, and the document once nothing is missing.
fn write_report(place: &Path, options: &Options, measured: &Measured) -> Result<()> {
    let torture = std::fs::read_to_string(options.root.join("target/torture/last.json"));
    let measured = &Measured {
        torture: torture
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok()),
        ..measured.clone()
    };
    let page = place.join("report.html");
    std::fs::write(&page, report::html(measured))
        .with_context(|| format!("cannot write {}", page.display()))?;
    println!("{}", page.display());
    if measured.sections.len() < sections::ALL.len() {
        println!("docs/FIGURES.md is left as it is: not every section has been measured");
        return Ok(());
    }
    let document = options.root.join("docs/FIGURES.md");
    std::fs::write(&document, figures::markdown(measured))
        .with_context(|| format!("cannot write {}", document.display()))?;
    println!("{}", document.display());
    Ok(())
}

/// Thousands of connections need as many descriptors, here and in the servers, which inherit it.
fn raise_descriptor_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise the limit of descriptors")
}
