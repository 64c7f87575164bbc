//! A web server as one process: small files and large ones, on connections that stay and on one
//! for each request.

use anyhow::Result;
use unbroken_clients::config;

use crate::bench::{Bench, Reading, Served};
use crate::model::Section;
use crate::tool::{self, wrk_result};

/// Connections at a time.
const CONNECTIONS: usize = 20;

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let served = Served {
        name: "nginx",
        port: config::NGINX_PORT,
        command: &|directory| Ok(config::nginx(directory)?),
    };
    for (size, path, large) in [("128 B", "small", false), ("1 MB", "large", true)] {
        for (manner, header) in [
            ("connections stay", "Connection: keep-alive"),
            ("a connection each", "Connection: close"),
        ] {
            let case = format!("{size}, {manner}");
            bench.compare(section, &served, &case, |subject, _| {
                let seconds = bench.window().as_secs_f64().ceil() as u64;
                let arguments = [
                    "--threads",
                    "1",
                    "--connections",
                    &CONNECTIONS.to_string(),
                    "--duration",
                    &format!("{seconds}s"),
                    "--timeout",
                    "10s",
                    "--latency",
                    "--header",
                    header,
                    &format!("http://{}/{path}", subject.address()),
                ]
                .map(String::from);
                let (printed, busy) =
                    bench.watch_program(subject, || tool::run("wrk", &arguments))?;
                let found = wrk_result(&printed)?;
                let amount = if large {
                    let bytes = config::NGINX_LARGE_BYTES as f64;
                    Reading::higher("served", "MB/s", found.per_s * bytes / 1e6, busy)
                } else {
                    Reading::higher("answers", "/s", found.per_s, busy)
                };
                Ok(vec![
                    amount,
                    Reading::lower("answer time p50", "us", found.p50_us, busy),
                    Reading::lower("answer time p99", "us", found.p99_us, busy),
                ])
            });
        }
    }
    Ok(())
}
