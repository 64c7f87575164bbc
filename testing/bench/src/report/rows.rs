//! Comparisons and profiles as rows with a bar each: they flow, so a phone can show them.

use super::scale::Scale;
use super::{escape, plot};
use crate::cores::Busy;
use crate::model::{BarSet, Bars, Better, Comparison, Profile, Section, Spread, Times};
use crate::text::{bytes, duration_us, number};

/// A share above this is drawn as this.
const SHARE_MOST: f64 = 1.2;

/// What of each throughput was kept.
pub fn kept(section: &Section) -> String {
    let rows = || {
        section
            .comparisons
            .iter()
            .filter(|row| row.better == Better::Higher)
    };
    if rows().next().is_none() {
        return String::new();
    }
    let mut html = String::from("<h3>Kept of what the unprotected server does</h3>");
    html.extend(rows().map(kept_row));
    html
}

fn kept_row(row: &Comparison) -> String {
    let Some(ratio) = row.ratios() else {
        return unpaired(row);
    };
    let percent = |share: f64| share.min(SHARE_MOST) / SHARE_MOST * 100.0;
    let bar = format!(
        "<div class=\"fill\" style=\"width:{:.1}%\"></div><div class=\"span\" \
         style=\"left:{:.1}%;width:{:.1}%\"></div>",
        percent(ratio.middle),
        percent(ratio.least),
        percent(ratio.most) - percent(ratio.least)
    );
    let values = format!(
        "<b>{:.0} %</b> ({:.0} to {:.0}) · {} → {} {}",
        ratio.middle * 100.0,
        ratio.least * 100.0,
        ratio.most * 100.0,
        middle(&row.unprotected),
        middle(&row.protected),
        escape(&row.unit)
    );
    framed(row, &values, &bar)
}

/// Each time without and with protection, on one axis for all of the section.
pub fn times(section: &Section) -> String {
    let rows = || {
        section
            .comparisons
            .iter()
            .filter(|row| row.better == Better::Lower)
    };
    if rows().next().is_none() {
        return String::new();
    }
    let in_us = |row: &Comparison| if row.unit == "ms" { 1e3 } else { 1.0 };
    let scale = Scale::by_factors(rows().flat_map(|row| {
        let all = row.unprotected.iter().chain(&row.protected);
        all.map(move |value| value * in_us(row))
    }));
    let mut html = String::from("<h3>Times: without (grey) and with protection</h3>");
    html.push_str(&axis(scale));
    html.extend(rows().map(|row| times_row(row, scale, in_us(row))));
    html
}

fn times_row(row: &Comparison, scale: Scale, factor: f64) -> String {
    let (Some(without), Some(with), Some(more)) = (
        Spread::of(&row.unprotected),
        Spread::of(&row.protected),
        row.differences(),
    ) else {
        return unpaired(row);
    };
    let place = |value: f64| scale.at(value * factor) * 100.0;
    let (plain, kept) = (place(without.middle), place(with.middle));
    let bar = format!(
        "<div class=\"bridge\" style=\"left:{:.1}%;width:{:.1}%\"></div><div class=\"span\" \
         style=\"left:{:.1}%;width:{:.1}%\"></div><div class=\"dot plain\" style=\"left:{plain:.1}%\">\
         </div><div class=\"dot with\" style=\"left:{kept:.1}%\"></div>",
        plain.min(kept),
        (kept - plain).abs(),
        place(with.least),
        place(with.most) - place(with.least),
    );
    let shown = |value: f64| duration_us(value * factor);
    let values = format!(
        "<b>{}{}</b> ({} to {}) · {} → {}",
        if more.middle < 0.0 { "" } else { "+" },
        shown(more.middle),
        shown(more.least),
        shown(more.most),
        shown(without.middle),
        shown(with.middle)
    );
    framed(row, &values, &bar)
}

fn framed(row: &Comparison, values: &str, bar: &str) -> String {
    format!(
        "<div class=\"row\"><div class=\"head\"><span>{}, {}</span><span class=\"values\">{values}</span>\
         </div><div class=\"track\">{bar}</div><div class=\"soft\">server's core and others busy: {} → \
         {}</div></div>",
        escape(&row.case),
        escape(&row.measure),
        busy(row.busy_unprotected),
        busy(row.busy_protected)
    )
}

/// A row of which one side is missing.
fn unpaired(row: &Comparison) -> String {
    format!(
        "<div class=\"row\"><div class=\"head\"><span>{}, {}</span><span class=\"values\">unprotected {} {}, \
         protected: failed</span></div></div>",
        escape(&row.case),
        escape(&row.measure),
        middle(&row.unprotected),
        escape(&row.unit)
    )
}

fn middle(values: &[f64]) -> String {
    Spread::of(values).map_or("-".into(), |spread| number(spread.middle))
}

fn busy(busy: Busy) -> String {
    format!(
        "{:.0} % and {:.0} %",
        busy.service * 100.0,
        busy.others * 100.0
    )
}

/// Where the time of each epoch goes. `machine` is what the machine does to an idle core.
pub fn profiles(section: &Section, machine: Option<&BarSet>) -> String {
    let mut html = String::new();
    for profile in &section.profiles {
        html.push_str(&profile_html(profile, machine));
    }
    if html.is_empty() {
        return html;
    }
    format!(
        "<details><summary>Where the time of an epoch goes: p50 (bar), p99 (ring), longest (grey \
         ring)</summary>{html}</details>"
    )
}

fn profile_html(profile: &Profile, machine: Option<&BarSet>) -> String {
    let mut lines = vec![
        ("pause".to_string(), profile.pause_us),
        ("output held".to_string(), profile.hold_us),
    ];
    let steps = profile.steps_us.iter();
    lines.extend(steps.map(|(name, times)| (format!("step: {name}"), *times)));
    let scale = Scale::by_factors(lines.iter().flat_map(|(_, times)| [times.p50, times.max]));
    let mut html = format!(
        "<h3>{}: {} epochs/s of {} and {} pages; {} resident, {} connections</h3>",
        escape(&profile.case),
        number(profile.epochs_per_s),
        bytes(profile.bytes_per_epoch),
        number(profile.dirty_pages_per_epoch),
        bytes(profile.resident_bytes as f64),
        profile.connections
    );
    html.push_str(&axis(scale));
    for (name, times) in &lines {
        html.push_str(&profile_row(name, times, scale));
    }
    let set = |name: &str, bars: &[(f64, f64)]| BarSet {
        name: name.into(),
        bars: bars.to_vec(),
    };
    let mut sets = vec![
        set("pause", &profile.pause_bars),
        set("output held", &profile.hold_bars),
    ];
    sets.extend(machine.cloned());
    sets.retain(|set| !set.bars.is_empty());
    if !sets.is_empty() {
        html.push_str(&plot::histogram(&Bars {
            title: "Pauses and holds, beside what the machine does to an idle core".into(),
            x: "us".into(),
            sets,
        }));
    }
    html
}

fn axis(scale: Scale) -> String {
    let ticks = scale.ticks();
    let ticks = ticks.iter();
    let ticks: String = ticks
        .map(|tick| format!("<span>{}</span>", duration_us(*tick)))
        .collect();
    format!("<div class=\"axis\">{ticks}</div>")
}

fn profile_row(name: &str, times: &Times, scale: Scale) -> String {
    let place = |value: f64| scale.at(value) * 100.0;
    format!(
        "<div class=\"row\"><div class=\"head\"><span>{}</span><span class=\"values\"><b>{}</b> · {} · {}\
         </span></div><div class=\"track\"><div class=\"fill\" style=\"width:{:.1}%\"></div><div \
         class=\"dot p99\" style=\"left:{:.1}%\"></div><div class=\"dot max\" style=\"left:{:.1}%\"></div>\
         </div></div>",
        escape(name),
        duration_us(times.p50),
        duration_us(times.p99),
        duration_us(times.max),
        place(times.p50),
        place(times.p99),
        place(times.max)
    )
}
