//! A cache with four threads of its own, all on the service's core.

use anyhow::Result;
use unbroken_clients::config;
use unbroken_clients::requests::{self, Kind, Options};

use crate::bench::{Bench, Reading, Served, finish};
use crate::model::Section;
use crate::text::count;

const VALUE_BYTES: usize = 100;

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let served = Served {
        name: "memcached",
        port: config::MEMCACHED_PORT,
        command: &|_| Ok(config::memcached()),
    };
    for connections in [1, 50, 200] {
        let case = count(connections, "connection");
        bench.compare(section, &served, &case, |subject, _| {
            let mut readings = Vec::new();
            for (name, kind) in [
                ("get", Kind::MemcachedGet(VALUE_BYTES)),
                ("set", Kind::MemcachedSet(VALUE_BYTES)),
            ] {
                let options = Options {
                    kind,
                    connections,
                    active: connections,
                    rate_per_s: None,
                };
                let running = requests::start(subject.address(), &options)?;
                let window = bench.watch(subject, &running, name)?;
                finish(running)?;
                readings.push(Reading::higher(
                    name,
                    "/s",
                    window.received_per_s,
                    window.busy,
                ));
                readings.extend(window.latencies(&format!("{name} time")));
            }
            Ok(readings)
        });
    }
    Ok(())
}
