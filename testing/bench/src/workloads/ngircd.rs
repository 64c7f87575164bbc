//! A chat server with everybody in one channel: each message goes to all others.

use anyhow::Result;
use unbroken_clients::config;
use unbroken_clients::irc::{self, Options};

use crate::bench::{Bench, Reading, Served, finish};
use crate::model::Section;
use crate::subject::MakeCommand;
use crate::text::count;

/// Messages of the whole swarm that somebody has still to hear, at saturation.
const UNHEARD: u64 = 32;

pub fn served<'a>(command: &'a MakeCommand<'a>) -> Served<'a> {
    Served {
        name: "ngircd",
        port: config::IRC_PORT,
        command,
    }
}

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let sizes: &[usize] = if bench.short { &[20] } else { &[20, 200, 1000] };
    for clients in sizes {
        let case = count(*clients, "client");
        // What the unprotected server delivers when pressed, measured first: the other loads are
        // parts of it, the same for both sides.
        let mut capacity_per_s = None;
        bench.compare(
            section,
            &served(&|directory| Ok(config::ngircd(directory)?)),
            &case,
            |subject, _| {
                let options = Options {
                    clients: *clients,
                    rate_per_s: 0.1,
                    ..Options::default()
                };
                let (running, pace) = irc::start_paced(subject.address(), &options)?;
                pace.saturate(UNHEARD);
                let full = bench.watch(subject, &running, "pressed")?;
                let capacity = *capacity_per_s.get_or_insert(full.received_per_s);
                let hearers = (clients - 1) as f64;
                let rate = |share: f64| capacity * share / hearers / *clients as f64;
                pace.set_rate(rate(0.8));
                let most = bench.watch(subject, &running, "at 80 %")?;
                pace.set_rate(rate(0.5));
                let half = bench.watch(subject, &running, "at 50 %")?;
                finish(running)?;
                let mut readings = vec![
                    Reading::higher("delivered, pressed", "/s", full.received_per_s, full.busy),
                    Reading::higher("delivered at 80 %", "/s", most.received_per_s, most.busy),
                ];
                readings.extend(half.latencies("delay at 50 %"));
                Ok(readings)
            },
        );
    }
    Ok(())
}
