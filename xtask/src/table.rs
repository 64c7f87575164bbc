//! The live table of the demonstration: redrawn in place on a terminal, one line a second and
//! server where there is none.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use unbroken_clients::Snapshot;

const REDRAW_EVERY: Duration = Duration::from_millis(200);
const LINE_EVERY: Duration = Duration::from_secs(1);

/// What a load counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Messages,
    Bytes,
}

/// One server's line.
#[derive(Debug, Clone)]
pub struct Row {
    pub server: &'static str,
    pub state: &'static str,
    pub kills: usize,
    pub kills_planned: usize,
    pub unit: Unit,
    pub totals: Snapshot,
    /// Of every takeover so far.
    pub takeovers_ms: Vec<f64>,
}

/// Where the table stands.
#[derive(Debug)]
pub struct Table {
    in_place: bool,
    lines_drawn: usize,
    drawn_at: Option<Instant>,
}

impl Table {
    pub fn new() -> Self {
        Self {
            in_place: std::io::stdout().is_terminal(),
            lines_drawn: 0,
            drawn_at: None,
        }
    }

    /// Draws when it is time to.
    pub fn draw(&mut self, rows: &[Row]) {
        let every = if self.in_place {
            REDRAW_EVERY
        } else {
            LINE_EVERY
        };
        if self.drawn_at.is_none_or(|drawn| drawn.elapsed() >= every) {
            self.draw_now(rows);
        }
    }

    /// Draws at once.
    pub fn draw_now(&mut self, rows: &[Row]) {
        let first = self.drawn_at.is_none();
        self.drawn_at = Some(Instant::now());
        let mut text = String::new();
        if self.in_place && self.lines_drawn > 0 {
            // Up to the first line, and clear from there to the end of the screen.
            text.push_str(&format!("\x1b[{}A\x1b[J", self.lines_drawn));
        }
        let mut lines = Vec::new();
        if self.in_place || first {
            lines.push(heading());
        }
        lines.extend(rows.iter().map(line));
        self.lines_drawn = lines.len();
        text.push_str(&lines.join("\n"));
        text.push('\n');
        let mut out = std::io::stdout().lock();
        // A closed pipe must not end the demonstration: its exit code still counts.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

fn heading() -> String {
    format!(
        "{:<9} {:<11} {:>6} {:>10} {:>11} {:>7} {:>8} {:>11} {:>12} {:>26}",
        "server",
        "state",
        "kills",
        "sent",
        "received",
        "lost",
        "doubled",
        "reconnects",
        "longest gap",
        "takeover last / p50 / max"
    )
}

fn line(row: &Row) -> String {
    let totals = &row.totals;
    format!(
        "{:<9} {:<11} {:>6} {:>10} {:>11} {:>7} {:>8} {:>11} {:>12} {:>26}",
        row.server,
        row.state,
        format!("{}/{}", row.kills, row.kills_planned),
        amount(row.unit, totals.sent),
        amount(row.unit, totals.received),
        amount(row.unit, totals.lost + totals.damaged),
        amount(row.unit, totals.doubled),
        totals.reconnects,
        format!("{:.1} ms", totals.longest_gap_us as f64 / 1e3),
        takeovers(&row.takeovers_ms),
    )
}

fn amount(unit: Unit, count: u64) -> String {
    match unit {
        Unit::Messages => count.to_string(),
        Unit::Bytes if count < 100_000 => format!("{count} B"),
        Unit::Bytes => format!("{:.1} MB", count as f64 / 1e6),
    }
}

fn takeovers(all_ms: &[f64]) -> String {
    let Some(last) = all_ms.last() else {
        return "-".into();
    };
    let mut sorted = all_ms.to_vec();
    sorted.sort_by(f64::total_cmp);
    let max = sorted.last().unwrap_or(last);
    format!("{last:.1} / {:.1} / {max:.1} ms", sorted[sorted.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stand_under_their_heading() {
        let row = Row {
            server: "ngircd",
            state: "protected",
            kills: 3,
            kills_planned: 10,
            unit: Unit::Bytes,
            totals: Snapshot {
                received: 12_345_678,
                ..Snapshot::default()
            },
            takeovers_ms: vec![0.9, 1.5, 0.8],
        };
        let drawn = line(&row);
        assert_eq!(drawn.chars().count(), heading().chars().count());
        assert!(
            drawn.contains("12.3 MB") && drawn.ends_with("0.8 / 0.9 / 1.5 ms"),
            "{drawn}"
        );
    }
}
