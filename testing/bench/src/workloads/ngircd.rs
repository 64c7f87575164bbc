//! A chat server with everybody in one channel: each message goes to all others.

use anyhow::Result;
use unbroken_clients::config;
use unbroken_clients::irc::{self, Options};

use crate::bench::{Bench, Reading, Served, finish};
use crate::model::Section;
use crate::text::count;

/// Messages of the whole swarm that somebody has still to hear: enough that the swarm is limited by
/// the server and not by how long one message takes, too few to fill what the server keeps for a
/// slow client, whom it would throw out.
const UNHEARD: u64 = 256;

pub const PRESSED: &str = "delivered, pressed";
pub const AT_MOST_OF_IT: &str = "delivered at 80 %";
pub const AT_HALF: &str = "delivered at 50 %";

pub fn run(bench: &Bench, section: &mut Section) -> Result<()> {
    let sizes: &[usize] = if bench.short { &[20] } else { &[20, 200, 1000] };
    for clients in sizes {
        let case = count(*clients, "client");
        // What the unprotected server delivers when pressed, measured first: the other loads are
        // parts of it, the same for both sides.
        let mut capacity_per_s = None;
        let served = Served {
            name: "ngircd",
            port: config::IRC_PORT,
            command: &|directory| Ok(config::ngircd(directory)?),
        };
        bench.compare(section, &served, &case, |subject, _| {
            let options = Options {
                clients: *clients,
                rate_per_s: 0.1,
                ..Options::default()
            };
            let (running, pace) = irc::start_paced(subject.address(), &options)?;
            pace.limit_unheard(UNHEARD);
            let capacity = match capacity_per_s {
                Some(capacity) => capacity,
                None => {
                    pace.saturate();
                    let found = bench.watch(subject, &running, "pressed")?.received_per_s;
                    *capacity_per_s.insert(found)
                }
            };
            // What is still under way belongs to no other load.
            pace.limit_unheard(0);
            bench.settle(&running);
            pace.limit_unheard(UNHEARD);
            let hearers = (clients - 1) as f64;
            let rate = |share: f64| capacity * share / hearers / *clients as f64;
            pace.set_rate(rate(0.5));
            let half = bench.watch(subject, &running, "at 50 %")?;
            pace.set_rate(rate(0.8));
            let most = bench.watch(subject, &running, "at 80 %")?;
            pace.saturate();
            let full = bench.watch(subject, &running, "pressed")?;
            finish(running)?;
            let mut readings = vec![
                Reading::higher(PRESSED, "/s", full.received_per_s, full.busy),
                Reading::higher(AT_MOST_OF_IT, "/s", most.received_per_s, most.busy),
                Reading::higher(AT_HALF, "/s", half.received_per_s, half.busy),
            ];
            readings.extend(half.latencies("delay at 50 %"));
            Ok(readings)
        });
    }
    Ok(())
}
