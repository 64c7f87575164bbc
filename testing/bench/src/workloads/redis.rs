//! A key-value store pressed by its own benchmark: one command each a round trip, and pipelines.

use std::net::SocketAddr;

use anyhow::Result;
use unbroken_clients::config;

use crate::bench::{Bench, Reading, Served};
use crate::model::Section;
use crate::subject::Side;
use crate::text::count;
use crate::tool::{self, redis_row};

/// Requests of each connection in the first look, from which the number is reckoned that fills the
/// window; one connection that waits for each answer is slow.
const PROBE_REQUESTS: u64 = 500;

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let served = Served {
        name: "redis",
        port: config::REDIS_PORT,
        command: &|directory| Ok(config::redis(directory)),
    };
    let connections: &[usize] = if bench.short { &[50] } else { &[1, 50, 200] };
    let pipelines: &[u64] = if bench.short { &[16] } else { &[1, 16] };
    for connections in connections {
        for pipeline in pipelines {
            let case = format!("{}, pipeline {pipeline}", count(*connections, "connection"));
            // By side: how many requests fill the window.
            let mut requests = [None; 2];
            let probe = PROBE_REQUESTS * (*connections as u64).min(20);
            bench.compare(section, &served, &case, |subject, side| {
                let press = |requests| press(subject.address(), *connections, *pipeline, requests);
                let known = &mut requests[usize::from(side == Side::Protected)];
                let requests = match known {
                    Some(requests) => *requests,
                    None => {
                        let probed = redis_row(&press(probe)?, "GET")?;
                        let fill = probed.per_s * bench.window().as_secs_f64() / 2.0;
                        *known.insert((fill as u64).max(probe))
                    }
                };
                let (printed, busy) = bench.watch_program(subject, || press(requests))?;
                let mut readings = Vec::new();
                for command in ["GET", "SET"] {
                    let row = redis_row(&printed, command)?;
                    readings.push(Reading::higher(command, "/s", row.per_s, busy));
                    let name = |part| format!("{command} time {part}");
                    readings.push(Reading::lower(name("p50"), "us", row.p50_us, busy));
                    readings.push(Reading::lower(name("p99"), "us", row.p99_us, busy));
                }
                Ok(readings)
            });
        }
    }
    Ok(())
}

fn press(at: SocketAddr, connections: usize, pipeline: u64, requests: u64) -> Result<String> {
    let arguments = [
        "-h",
        &at.ip().to_string(),
        "-p",
        &at.port().to_string(),
        "-c",
        &connections.to_string(),
        "-P",
        &pipeline.to_string(),
        "-n",
        &requests.to_string(),
        "-t",
        "get,set",
        "-r",
        "10000",
        "-d",
        "64",
        "--csv",
    ]
    .map(String::from);
    tool::run("redis-benchmark", &arguments)
}
