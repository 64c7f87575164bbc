//! `unbroken-clients LOAD ADDRESS:PORT [SECONDS]`: runs one load against a server by hand and
//! prints what it saw as JSON; exits with 1 when anything was lost, doubled or broken.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use unbroken_clients::{ClientError, Report, bulk, churn, icecast, irc, latency, redis};

const USAGE: &str = "usage: unbroken-clients irc|icecast|redis|churn|download|upload|latency ADDRESS:PORT [SECONDS]";
const TRANSFER_BYTES: u64 = 256 << 20;
const LATENCY_SAMPLES: usize = 10_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((load, address, seconds)) = parse(&arguments) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let outcome = match load {
        "latency" => latency::measure(address, LATENCY_SAMPLES, 64).map(|found| {
            println!("{}", serde_json::json!(found));
            ExitCode::SUCCESS
        }),
        _ => run(load, address, seconds).map(|report| print(&report)),
    };
    outcome.unwrap_or_else(|cause| {
        eprintln!("{cause}");
        ExitCode::FAILURE
    })
}

fn parse(arguments: &[String]) -> Option<(&str, SocketAddr, u64)> {
    const LOADS: [&str; 7] = [
        "irc", "icecast", "redis", "churn", "download", "upload", "latency",
    ];
    let load = LOADS
        .iter()
        .find(|load| arguments.first().is_some_and(|word| word == *load))?;
    let address = arguments.get(1)?.parse().ok()?;
    let seconds = arguments
        .get(2)
        .map_or(Some(10), |word| word.parse().ok())?;
    Some((load, address, seconds))
}

fn run(load: &str, address: SocketAddr, seconds: u64) -> Result<Report, ClientError> {
    let running = match load {
        "irc" => irc::start(address, &irc::Options::default())?,
        "icecast" => icecast::start(address, &icecast::Options::default())?,
        "redis" => redis::start(address, &redis::Options::default())?,
        "churn" => churn::start(address, 6)?,
        "download" => {
            return Ok(bulk::start(address, bulk::Direction::Download, 1, TRANSFER_BYTES)?.wait());
        }
        _ => return Ok(bulk::start(address, bulk::Direction::Upload, 1, TRANSFER_BYTES)?.wait()),
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end && !running.has_ended() {
        std::thread::park_timeout(end.saturating_duration_since(Instant::now()));
    }
    Ok(running.finish())
}

fn print(report: &Report) -> ExitCode {
    println!(
        "{}",
        serde_json::json!({ "load": report.name, "totals": report.totals })
    );
    if report.verdict().is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
