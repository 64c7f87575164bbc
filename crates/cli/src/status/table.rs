//! `status` for people: one line a service, or everything about one.

use super::Service;
use std::fmt::Write;
use unbroken_node::status_page::{Percentiles, ServiceState};
use unbroken_node::steps::EpochStep;

const HEADINGS: [&str; 9] = [
    "NAME",
    "STATE",
    "ADDRESS",
    "CLIENTS",
    "TAKEOVERS",
    "LAST",
    "PAUSE p50/p99",
    "HELD p50/p99",
    "EPOCHS/S",
];

/// One line a service, under it the reason when there is something to say.
pub fn overview(services: &[Service], in_colour: bool) -> String {
    if services.is_empty() {
        return "No service is running.\n".into();
    }
    let rows: Vec<[String; 9]> = services.iter().map(row).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(HEADINGS[column].len())
    };
    let widths: [usize; 9] = std::array::from_fn(width);
    let mut text = String::new();
    line(&mut text, &HEADINGS.map(String::from), &widths, None);
    for (service, row) in services.iter().zip(&rows) {
        let colour = in_colour.then(|| colour(service.page.state));
        line(&mut text, row, &widths, colour);
        if let Some(remark) = remark(service) {
            let _ = writeln!(text, "  {remark}");
        }
    }
    text
}

fn row(service: &Service) -> [String; 9] {
    let page = &service.page;
    [
        page.name.clone(),
        page.state.name().into(),
        page.address.split(", ").next().unwrap_or_default().into(),
        service.connections.to_string(),
        page.takeovers.to_string(),
        page.last_takeover_us.map_or("-".into(), duration_us),
        pair(&page.pause),
        pair(&page.hold),
        format!("{:.0}", page.recent.epochs_per_s),
    ]
}

fn line(text: &mut String, cells: &[String; 9], widths: &[usize; 9], colour: Option<&str>) {
    let mut line = String::new();
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let padding = " ".repeat(width - cell.chars().count() + 2);
        match colour {
            Some(colour) if column == 1 => {
                let _ = write!(line, "{colour}{cell}{PLAIN}{padding}");
            }
            _ => line.extend([cell.as_str(), &padding]),
        }
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

const PLAIN: &str = "\x1b[0m";

/// Green, yellow and red of a terminal's own palette.
fn colour(state: ServiceState) -> &'static str {
    match state {
        ServiceState::Protected => "\x1b[32m",
        ServiceState::Starting | ServiceState::Syncing | ServiceState::TakingOver => "\x1b[33m",
        ServiceState::Unprotected | ServiceState::Failed => "\x1b[31m",
    }
}

/// What a user must know beyond the state's name.
fn remark(service: &Service) -> Option<String> {
    let page = &service.page;
    let reason = page.reason.as_str();
    let duration = page
        .unprotected_for_ns
        .map(|ns| format!("without a replica for {}", duration_us(ns / 1000)));
    match (duration, reason) {
        (None, "") => None,
        (None, reason) => Some(reason.into()),
        (Some(duration), "") => Some(duration),
        (Some(duration), reason) => Some(format!("{duration}: {reason}")),
    }
}

/// Everything about one service, one line each.
pub fn detail(service: &Service, in_colour: bool) -> String {
    let page = &service.page;
    let state = match in_colour {
        true => format!("{}{}{PLAIN}", colour(page.state), page.state.name()),
        false => page.state.name().into(),
    };
    let pid = |pid: Option<i32>| pid.map_or("-".into(), |pid| pid.to_string());
    let pids: Vec<String> = page.service_pids.iter().map(i32::to_string).collect();
    let mut lines = vec![
        ("name", page.name.clone()),
        ("state", state),
        ("command", page.command.clone()),
        ("address", page.address.clone()),
    ];
    lines.extend(remark(service).map(|remark| ("remark", remark)));
    if !page.published.is_empty() {
        lines.push(("published", page.published.clone()));
    }
    lines.extend(page.exit.map(|code| ("exit code", code.to_string())));
    lines.extend([
        ("service pids", pids.join(" ")),
        ("primary pid", pid(page.primary_pid)),
        ("standby pid", pid(page.standby_pid)),
        ("clients", service.connections.to_string()),
        ("resident", bytes(service.resident_bytes as f64)),
        (
            "takeovers",
            match page.last_takeover_us {
                Some(last) => format!(
                    "{}, the last in {}: {}",
                    page.takeovers,
                    duration_us(last),
                    page.last_takeover_cause.as_deref().unwrap_or_default()
                ),
                None => page.takeovers.to_string(),
            },
        ),
        ("unprotected", duration_us(page.unprotected_total_ns / 1000)),
        ("term", page.term.to_string()),
        (
            "epoch",
            format!(
                "{}, {:.0} a second, each {:.1} pages and {}",
                page.epoch,
                page.recent.epochs_per_s,
                page.recent.dirty_pages_per_epoch,
                bytes(page.recent.bytes_per_epoch),
            ),
        ),
        ("pause", times(&page.pause)),
        ("output held", times(&page.hold)),
        ("epoch steps", steps(&page.steps)),
    ]);
    lines.iter().fold(String::new(), |mut text, (key, value)| {
        let _ = writeln!(text, "{key:<13} {value}");
        text
    })
}

fn times(times: &Percentiles) -> String {
    if times.samples == 0 {
        return "-".into();
    }
    let [p50, p99, max] =
        [times.p50_ns, times.p99_ns, times.max_ns].map(|ns| duration_us(ns / 1000));
    format!("p50 {p50}, p99 {p99}, max {max}")
}

/// The median of each step of an epoch.
fn steps(steps: &[Percentiles]) -> String {
    if steps.iter().all(|lasted| lasted.samples == 0) {
        return "-".into();
    }
    let named = EpochStep::ALL.into_iter().zip(steps);
    let each = named.map(|(step, lasted)| format!("{} {}", step.name(), lasted.p50_ns / 1000));
    format!("{} us", each.collect::<Vec<_>>().join(", "))
}

/// `p50/p99` in microseconds, the unit in which they are promised.
fn pair(times: &Percentiles) -> String {
    match times.samples {
        0 => "-".into(),
        _ => format!("{}/{} us", times.p50_ns / 1000, times.p99_ns / 1000),
    }
}

/// A time in the unit that a reader would choose.
fn duration_us(us: u64) -> String {
    const SECOND_US: u64 = 1_000_000;
    match us {
        0..1_000 => format!("{us} us"),
        1_000..SECOND_US => format!("{:.1} ms", us as f64 / 1e3),
        SECOND_US..60_000_000 => format!("{:.1} s", us as f64 / 1e6),
        _ => {
            let seconds = us / SECOND_US;
            let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
            match hours {
                0 => format!("{minutes} min {} s", seconds % 60),
                1..48 => format!("{hours} h {minutes} min"),
                _ => format!("{} d {} h", hours / 24, hours % 24),
            }
        }
    }
}

fn bytes(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value:.0} B"),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn columns_line_up_and_reasons_follow() {
        let text = overview(&[samples::protected(), samples::unprotected()], false);
        assert_eq!(
            text,
            "NAME          STATE        ADDRESS     CLIENTS  TAKEOVERS  LAST    PAUSE p50/p99  HELD p50/p99  EPOCHS/S\n\
             chat          protected    10.211.0.2  20       2          875 us  48/190 us      90/380 us     210\n\
             web-server-1  unprotected  10.211.0.2  20       0          -       -              -             210\n  \
             without a replica for 12.3 s: the standby was killed by signal 9\n"
        );
        assert_eq!(overview(&[], false), "No service is running.\n");
    }

    #[test]
    fn colour_changes_nothing_else() {
        let services = [samples::protected(), samples::unprotected()];
        let coloured = overview(&services, true);
        assert!(coloured.contains("\x1b[32mprotected\x1b[0m"));
        let plain = ["\x1b[32m", "\x1b[31m", PLAIN]
            .iter()
            .fold(coloured, |text, code| text.replace(code, ""));
        assert_eq!(plain, overview(&services, false));
    }

    #[test]
    fn detail_says_everything() {
        let text = detail(&samples::unprotected(), false);
        for part in [
            "state         unprotected\n",
            "remark        without a replica for 12.3 s: the standby was killed by signal 9\n",
            "service pids  103 104\n",
            "standby pid   -\n",
            "resident      9.0 MiB\n",
            "unprotected   1.5 s\n",
            "each 12.5 pages and 50.0 KiB\n",
            "pause         -\n",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }

    #[test]
    fn units() {
        assert_eq!(duration_us(999), "999 us");
        assert_eq!(duration_us(1_500), "1.5 ms");
        assert_eq!(duration_us(61_000_000), "1 min 1 s");
        assert_eq!(duration_us(7_260_000_000), "2 h 1 min");
        assert_eq!(duration_us(200_000_000_000), "2 d 7 h");
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(1536.0), "1.5 KiB");
    }
}
