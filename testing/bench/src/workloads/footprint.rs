//! Pauses of a server of middle size: 100 MB resident and 200 connections, at an even load.

use anyhow::Result;
use unbroken_clients::config;
use unbroken_clients::requests::{self, Kind, Options};

use crate::bench::{Bench, Served, finish};
use crate::model::Section;
use crate::tool;

pub const CASE: &str = "100 MB, 200 connections";
const CONNECTIONS: usize = 200;
const VALUE_BYTES: usize = 100;
const RATE_PER_S: f64 = 5000.0;
/// Keys of the filling: with 512 bytes each they come to about 100 MB.
const KEYS: &str = "150000";

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let served = Served {
        name: "redis",
        port: config::REDIS_PORT,
        command: &|directory| Ok(config::redis(directory)),
    };
    bench.compare(section, &served, CASE, |subject, _| {
        let at = subject.address();
        let fill = [
            "-h",
            &at.ip().to_string(),
            "-p",
            &at.port().to_string(),
            "-t",
            "set",
            "-r",
            KEYS,
            "-n",
            "450000",
            "-d",
            "512",
            "-P",
            "32",
            "-q",
        ]
        .map(String::from);
        tool::run("redis-benchmark", &fill)?;
        let options = Options {
            kind: Kind::RedisSet(VALUE_BYTES),
            connections: CONNECTIONS,
            active: CONNECTIONS,
            rate_per_s: Some(RATE_PER_S),
        };
        let running = requests::start(at, &options)?;
        let window = bench.watch(subject, &running, "")?;
        finish(running)?;
        Ok(window.latencies("SET time").to_vec())
    });
    Ok(())
}
