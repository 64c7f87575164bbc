//! The least that a server can do: what comes in goes out. Its answer time is the floor of every
//! other, and what protection adds to it is added to all of them.

use anyhow::Result;
use unbroken_clients::config::own_program;
use unbroken_clients::requests::{self, Kind, Options};

use crate::bench::{Bench, Reading, Served, finish};
use crate::histogram::bars;
use crate::model::{BarSet, Bars, Section};

const PORT: u16 = 7000;
const BYTES: usize = 64;

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let served = Served {
        name: "echo",
        port: PORT,
        command: &|_| Ok(own_program("echo-server", PORT)?),
    };
    let mut sets = Vec::new();
    for connections in [1, 20] {
        let case = crate::text::count(connections, "connection");
        bench.compare(section, &served, &case, |subject, side| {
            let options = Options {
                kind: Kind::Echo(BYTES),
                connections,
                active: connections,
                rate_per_s: None,
            };
            let running = requests::start(subject.address(), &options)?;
            let window = bench.watch(subject, &running, "")?;
            finish(running)?;
            if connections == 1 {
                sets.retain(|set: &BarSet| set.name != side.name());
                sets.push(bars(side.name(), &window.latency_ns, 1e3));
            }
            let mut readings = vec![Reading::higher(
                "answers",
                "/s",
                window.received_per_s,
                window.busy,
            )];
            readings.extend(window.latencies("answer time"));
            Ok(readings)
        });
    }
    section.histograms.push(Bars {
        title: "Answer times, one connection".into(),
        x: "us".into(),
        sets,
    });
    Ok(())
}
