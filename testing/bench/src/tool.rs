//! Load generators that others have written, and what they print.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a program to its end and returns what it printed. It has the cores of the calling thread.
pub fn run(program: &str, arguments: &[String]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program}: {}: {} {}",
            output.status,
            printed.trim(),
            why.trim()
        );
    }
    Ok(printed)
}

/// What `redis-benchmark --csv` says of one command.
#[derive(Debug, Clone, PartialEq)]
pub struct RedisRow {
    pub per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// The row of `command` (GET, SET).
pub fn redis_row(printed: &str, command: &str) -> Result<RedisRow> {
    let unquoted = |line: &str| -> Vec<String> {
        line.split(',')
            .map(|cell| cell.trim_matches('"').to_string())
            .collect()
    };
    let mut lines = printed.lines().map(unquoted);
    let heads = lines
        .by_ref()
        .find(|cells| cells.first().is_some_and(|cell| cell == "test"))
        .with_context(|| format!("no table in what redis-benchmark printed: {printed}"))?;
    let row = lines
        .find(|cells| cells.first().is_some_and(|cell| cell == command))
        .with_context(|| format!("no {command} in what redis-benchmark printed: {printed}"))?;
    let cell = |head: &str| -> Result<f64> {
        let column = heads.iter().position(|cell| cell == head);
        let text = column.and_then(|column| row.get(column));
        let text = text.with_context(|| format!("redis-benchmark prints no {head}"))?;
        text.parse()
            .with_context(|| format!("{head} of redis-benchmark: {text}"))
    };
    Ok(RedisRow {
        per_s: cell("rps")?,
        p50_us: cell("p50_latency_ms")? * 1e3,
        p99_us: cell("p99_latency_ms")? * 1e3,
    })
}

/// What `wrk --latency` says.
#[derive(Debug, Clone, PartialEq)]
pub struct WrkResult {
    pub per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// Fails when wrk saw an error of any kind.
pub fn wrk_result(printed: &str) -> Result<WrkResult> {
    let bad = ["Socket errors", "Non-2xx"];
    if let Some(line) = printed
        .lines()
        .find(|line| bad.iter().any(|word| line.contains(word)))
    {
        bail!("wrk: {}", line.trim());
    }
    let after = |word: &str| {
        let line = printed
            .lines()
            .find(|line| line.trim_start().starts_with(word));
        let rest = line.and_then(|line| line.split_whitespace().last());
        rest.with_context(|| format!("wrk printed no {word}: {printed}"))
    };
    let per_s = after("Requests/sec:")?;
    Ok(WrkResult {
        per_s: per_s.parse().with_context(|| format!("wrk: {per_s}"))?,
        p50_us: wrk_time_us(after("50%")?)?,
        p99_us: wrk_time_us(after("99%")?)?,
    })
}

/// A time as wrk writes it: 12.3us, 1.2ms, 3.4s.
fn wrk_time_us(text: &str) -> Result<f64> {
    let (digits, factor) = match text {
        _ if text.ends_with("us") => (text.trim_end_matches("us"), 1.0),
        _ if text.ends_with("ms") => (text.trim_end_matches("ms"), 1e3),
        _ => (text.trim_end_matches('s'), 1e6),
    };
    let value: f64 = digits
        .parse()
        .with_context(|| format!("wrk printed the time {text}"))?;
    Ok(value * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_redis_benchmark() {
        let printed = "\"test\",\"rps\",\"avg_latency_ms\",\"p50_latency_ms\",\"p99_latency_ms\"\n\
                       \"SET\",\"50.5\",\"1\",\"0.031\",\"2\"\n\"GET\",\"60\",\"1\",\"0.5\",\"3\"\n";
        let row = redis_row(printed, "GET").unwrap();
        assert_eq!((row.per_s, row.p50_us, row.p99_us), (60.0, 500.0, 3000.0));
        assert!(redis_row(printed, "INCR").is_err());
    }

    #[test]
    fn a_report_of_wrk() {
        let printed = "  Latency Distribution\n     50%   45.00us\n     90%  1.00ms\n     99%   \
                       1.50ms\nRequests/sec:  19123.45\n";
        let found = wrk_result(printed).unwrap();
        assert_eq!(
            (found.per_s, found.p50_us, found.p99_us),
            (19123.45, 45.0, 1500.0)
        );
        assert!(wrk_result("Socket errors: connect 0, read 3\n").is_err());
    }
}
