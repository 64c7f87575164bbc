//! One line that says how far a run is.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const REDRAW_EVERY: Duration = Duration::from_millis(200);
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Where the line stands.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    planned: u64,
    survived: u64,
    failed: u64,
    in_place: bool,
    drawn: Option<Instant>,
}

impl Progress {
    pub fn new(planned: u64) -> Self {
        Self {
            started: Instant::now(),
            planned,
            survived: 0,
            failed: 0,
            in_place: std::io::stdout().is_terminal(),
            drawn: None,
        }
    }

    pub fn survived(&mut self) {
        self.survived += 1;
    }

    /// Counts a failure and prints what is known of it, above the line.
    pub fn failed(&mut self, text: &str) {
        self.failed += 1;
        self.print(text);
    }

    /// Prints something that is not the line itself.
    pub fn print(&mut self, text: &str) {
        let clear = if self.in_place { "\r\x1b[K" } else { "" };
        write_out(&format!("{clear}{text}\n"));
        self.drawn = None;
    }

    /// Draws when it is time to.
    pub fn draw(&mut self) {
        let every = if self.in_place {
            REDRAW_EVERY
        } else {
            LINE_EVERY
        };
        if self.drawn.is_some_and(|drawn| drawn.elapsed() < every) {
            return;
        }
        self.drawn = Some(Instant::now());
        let line = self.line(self.started.elapsed());
        write_out(&if self.in_place {
            format!("\r\x1b[K{line}")
        } else {
            format!("{line}\n")
        });
    }

    fn line(&self, elapsed: Duration) -> String {
        let done = self.survived + self.failed;
        let minutes = elapsed.as_secs_f64() / 60.0;
        let a_minute = done as f64 / minutes.max(1e-9);
        let left = self.planned.saturating_sub(done) as f64 / a_minute.max(1e-9);
        let left = if done == 0 {
            "?".to_string()
        } else {
            format!("{left:.1} min")
        };
        format!(
            "{done}/{} faults, survived {}, failed {}, {a_minute:.0} a minute, {left} left",
            self.planned, self.survived, self.failed
        )
    }
}

fn write_out(text: &str) {
    let mut out = std::io::stdout().lock();
    // A closed pipe must not end the run: its exit code still counts.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_far_it_is() {
        let mut progress = Progress::new(100);
        assert!(progress.line(Duration::from_secs(1)).ends_with("? left"));
        for _ in 0..25 {
            progress.survived();
        }
        let line = progress.line(Duration::from_secs(30));
        assert_eq!(
            line,
            "25/100 faults, survived 25, failed 0, 50 a minute, 1.5 min left"
        );
    }
}
