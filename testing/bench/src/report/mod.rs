//! report.html: one page that holds all it needs, light or dark as the reader's system is.

mod failovers;
mod plot;
mod rows;
mod scale;

use std::fmt::Write;

use crate::model::{BarSet, Measured, Section};
use crate::targets::{self, Target, Verdict};

const STYLE: &str = include_str!("style.css");

/// The page.
pub fn html(measured: &Measured) -> String {
    let mut body = String::from("<main><h1>What protection costs</h1>");
    let machine = measured
        .sections
        .first()
        .map(|section| section.taken.machine.as_str());
    let _ = write!(
        body,
        "<p>Each workload ran unprotected and protected, in turn, on the same machine with the same \
         pin: the server on one core; clients, standby and all else on the other. The unprotected \
         server is reached over loopback. What counts are the ratios. Two cores are few: where the \
         other core is full, it and not the server is the limit, and both have to share it; so how \
         busy each core was stands with every figure.</p><p class=\"soft\">{}</p>",
        escape(machine.unwrap_or("nothing was measured"))
    );
    if let Some(disturbance) = measured.disturbance() {
        let _ = write!(body, "<p class=\"failed\">{}</p>", escape(&disturbance));
    }
    body.push_str("<nav><a href=\"#targets\">Targets</a>");
    for section in &measured.sections {
        let _ = write!(
            body,
            "<a href=\"#{}\">{}</a>",
            escape(&section.name),
            escape(&section.title)
        );
    }
    body.push_str("<a href=\"report.json\">all numbers</a></nav>");
    let stalls = measured.section("stalls");
    let machine_gaps = stalls.and_then(|stalls| stalls.histograms.first()?.sets.first());
    body.push_str(&target_tiles(&targets::all(measured)));
    for section in &measured.sections {
        body.push_str(&section_html(section, machine_gaps));
    }
    body.push_str("</main>");
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><title>unbroken: what protection costs\
         </title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
}

fn target_tiles(targets: &[Target]) -> String {
    let mut html = String::from(
        "<section id=\"targets\"><h2>Targets</h2><p class=\"soft\">Each target of the design beside \
         what was measured, and beside what RRC (Zhou and Tamir, 2022), the best system of the kind, \
         has published for its own machines.</p><div class=\"tiles\">",
    );
    for target in targets {
        let (class, word) = match target.verdict {
            Verdict::Met => ("met", "met"),
            Verdict::NotMet => ("not", "not met"),
            Verdict::NotMeasured => ("later", "not measured"),
            Verdict::Later => ("later", "later"),
        };
        let _ = write!(
            html,
            "<div class=\"tile {class}\"><div class=\"what\">{}</div><b>{}</b><div class=\"soft\">target \
             {}</div><div class=\"soft\">RRC {}</div><div class=\"verdict\">{word}</div></div>",
            escape(target.what),
            escape(&target.measured),
            escape(target.wanted),
            escape(target.rrc)
        );
    }
    html.push_str("</div></section>");
    html
}

fn section_html(section: &Section, machine: Option<&BarSet>) -> String {
    let mut html = format!(
        "<section id=\"{}\"><h2>{}</h2><p>{}</p>",
        escape(&section.name),
        escape(&section.title),
        escape(&section.about)
    );
    if let Some(disturbance) = &section.disturbed {
        let _ = write!(html, "<p class=\"failed\">{}</p>", escape(disturbance));
    }
    for note in &section.notes {
        let _ = write!(html, "<p class=\"soft\">{}</p>", escape(note));
    }
    for failure in &section.failures {
        let _ = write!(html, "<p class=\"failed\">failed: {}</p>", escape(failure));
    }
    html.push_str(&rows::kept(section));
    html.push_str(&rows::times(section));
    let mut plots = String::new();
    plots.extend(
        section
            .histograms
            .iter()
            .filter(|bars| !bars.sets.is_empty())
            .map(plot::histogram),
    );
    plots.extend(section.sweeps.iter().map(plot::sweep));
    if !plots.is_empty() {
        let _ = write!(html, "<div class=\"plots\">{plots}</div>");
    }
    html.push_str(&failovers::all(section));
    html.push_str(&rows::profiles(section, machine));
    let taken = &section.taken;
    let _ = write!(
        html,
        "<p class=\"soft\">{} at {}, in {:.0} s</p></section>",
        escape(&taken.commit),
        escape(&taken.at),
        taken.seconds
    );
    html
}

/// Text as it may stand in the page.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cores::Busy;
    use crate::model::{Bars, Better, Comparison, Failover, Line, Profile, Sweep, Times};

    fn comparison(better: Better, protected: &[f64]) -> Comparison {
        Comparison {
            case: "1 <client>".into(),
            measure: "answers".into(),
            unit: "us".into(),
            better,
            unprotected: vec![10.0, 0.0],
            protected: protected.to_vec(),
            busy_unprotected: Busy::default(),
            busy_protected: Busy::default(),
        }
    }

    /// One of everything, with the numbers that drawings trip over.
    fn section() -> Section {
        let zeros = Times::default();
        Section {
            name: "x".into(),
            comparisons: vec![
                comparison(Better::Higher, &[5.0, 4.0]),
                comparison(Better::Lower, &[5.0, 4.0]),
                comparison(Better::Lower, &[]),
            ],
            profiles: vec![Profile {
                case: "x".into(),
                pause_us: zeros,
                hold_us: zeros,
                steps_us: vec![("stop".into(), zeros)],
                pause_bars: Vec::new(),
                hold_bars: vec![(1.0, 1.0)],
                epochs_per_s: 0.0,
                dirty_pages_per_epoch: 0.0,
                bytes_per_epoch: 0.0,
                connections: 0,
                resident_bytes: 0,
            }],
            sweeps: vec![Sweep {
                title: "a & b".into(),
                x: "x".into(),
                y: "y".into(),
                lines: vec![Line {
                    name: "none".into(),
                    points: vec![(1.0, 0.0)],
                }],
            }],
            failovers: vec![Failover {
                title: "kill".into(),
                takeover_ms: None,
                protected_again_ms: 1.0,
                clients: vec![vec![-1.0, 2.0], Vec::new()],
                gaps_ms: vec![3.0, 0.0],
                usual_gap_ms: 1.0,
            }],
            histograms: vec![Bars {
                title: "empty".into(),
                x: "us".into(),
                sets: Vec::new(),
            }],
            failures: vec!["broke".into()],
            ..Section::default()
        }
    }

    #[test]
    fn a_page_of_anything_is_whole() {
        let measured = Measured {
            sections: vec![section()],
            torture: None,
        };
        let page = html(&measured);
        for wrong in ["NaN", "inf%", "<client>", "a & b", "http://", "https://"] {
            assert!(!page.contains(wrong), "{wrong} in the page");
        }
        for tag in ["section", "svg", "details", "div", "figure", "g"] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert!(page.contains("failed: broke") && page.contains("kill"));
    }
}
