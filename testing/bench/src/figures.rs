//! docs/FIGURES.md: the last full run, for whoever reads the sources.

use std::fmt::Write;

use crate::model::{Better, Measured, Section, Spread};
use crate::targets::{self, Verdict};
use crate::text::{bytes, duration_us, number};

/// The document.
pub fn markdown(measured: &Measured) -> String {
    let mut text = String::from(
        "# Figures\n\nWritten by `cargo xtask bench`; do not edit. The same with plots: \
         target/bench/report.html. How it is measured: TESTING.md.\n\n",
    );
    if let Some(first) = measured.sections.first() {
        let _ = writeln!(text, "Machine: {}.\n", first.taken.machine);
    }
    if let Some(disturbance) = measured.disturbance() {
        let _ = writeln!(text, "**{disturbance}**\n");
    }
    text.push_str("| section | measured at | sources |\n|---|---|---|\n");
    for section in &measured.sections {
        let taken = &section.taken;
        let _ = writeln!(
            text,
            "| {} | {} | {} |",
            section.name, taken.at, taken.commit
        );
    }
    text.push_str(
        "\n## Targets\n\n| figure | target | RRC | measured | |\n|---|---|---|---|---|\n",
    );
    for target in targets::all(measured) {
        let verdict = match target.verdict {
            Verdict::Met => "met",
            Verdict::NotMet => "**not met**",
            Verdict::NotMeasured => "not measured",
            Verdict::Later => "later",
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {verdict} |",
            target.what, target.wanted, target.rrc, target.measured
        );
    }
    for section in &measured.sections {
        section_markdown(&mut text, section);
    }
    text
}

fn section_markdown(text: &mut String, section: &Section) {
    let _ = write!(text, "\n## {}\n\n{}\n", section.title, section.about);
    for note in section.disturbed.iter().chain(&section.notes) {
        let _ = write!(text, "\n{note}\n");
    }
    for failure in &section.failures {
        // A failure may bring the end of a log with it.
        let line = failure.lines().next().unwrap_or_default();
        let _ = write!(text, "\nfailed: {line}\n");
    }
    comparisons(text, section);
    profiles(text, section);
    sweeps(text, section);
}

fn comparisons(text: &mut String, section: &Section) {
    if section.comparisons.is_empty() {
        return;
    }
    text.push_str(
        "\n| case | figure | unprotected | protected | kept / added (spread) | cores busy, server's and \
         others |\n|---|---|---|---|---|---|\n",
    );
    for row in &section.comparisons {
        let middle = |values: &[f64]| {
            let middle = Spread::of(values).map(|spread| number(spread.middle));
            middle.map_or("failed".into(), |middle| format!("{middle} {}", row.unit))
        };
        let effect = match row.better {
            Better::Higher => row.ratios().map(|ratio| {
                let percent = |share: f64| number((share * 1000.0).round() / 10.0);
                format!(
                    "{} % ({} to {})",
                    percent(ratio.middle),
                    percent(ratio.least),
                    percent(ratio.most)
                )
            }),
            Better::Lower => row.differences().map(|more| {
                let shown = [more.middle, more.least, more.most].map(number);
                format!("{} {} ({} to {})", shown[0], row.unit, shown[1], shown[2])
            }),
        };
        let busy = |busy: crate::cores::Busy| {
            format!("{:.0}, {:.0} %", busy.service * 100.0, busy.others * 100.0)
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} → {} |",
            row.case,
            row.measure,
            middle(&row.unprotected),
            middle(&row.protected),
            effect.unwrap_or("-".into()),
            busy(row.busy_unprotected),
            busy(row.busy_protected)
        );
    }
}

fn profiles(text: &mut String, section: &Section) {
    if section.profiles.is_empty() {
        return;
    }
    text.push_str(
        "\n| protected | pause p50 / p99 | held p50 / p99 | epochs/s | pages, bytes an epoch | longest \
         steps, p50 |\n|---|---|---|---|---|---|\n",
    );
    for profile in &section.profiles {
        let mut steps = profile.steps_us.clone();
        steps.sort_by(|one, other| other.1.p50.total_cmp(&one.1.p50));
        let steps: Vec<String> = steps
            .iter()
            .take(4)
            .map(|(name, times)| format!("{name} {}", duration_us(times.p50)))
            .collect();
        let pair = |times: crate::model::Times| {
            format!("{} / {}", duration_us(times.p50), duration_us(times.p99))
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {}, {} | {} |",
            profile.case,
            pair(profile.pause_us),
            pair(profile.hold_us),
            number(profile.epochs_per_s),
            number(profile.dirty_pages_per_epoch),
            bytes(profile.bytes_per_epoch),
            steps.join(", ")
        );
    }
}

fn sweeps(text: &mut String, section: &Section) {
    for sweep in &section.sweeps {
        let mut all: Vec<f64> = Vec::new();
        for (x, _) in sweep.lines.iter().flat_map(|line| &line.points) {
            if !all.contains(x) {
                all.push(*x);
            }
        }
        all.sort_by(f64::total_cmp);
        let heads: Vec<String> = all.iter().map(|x| number(*x)).collect();
        let _ = write!(
            text,
            "\n{} ({}) by {}:\n\n| | {} |\n|---|{}\n",
            sweep.title,
            sweep.y,
            sweep.x,
            heads.join(" | "),
            "---|".repeat(all.len())
        );
        for line in &sweep.lines {
            let at = |x: &f64| line.points.iter().find(|point| point.0 == *x);
            let cells: Vec<String> = all
                .iter()
                .map(|x| at(x).map_or("-".into(), |point| number(point.1)))
                .collect();
            let _ = writeln!(text, "| {} | {} |", line.name, cells.join(" | "));
        }
    }
}
