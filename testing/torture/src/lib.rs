//! Faults by the thousand, at random moments, against every server that the tests know; each is
//! followed by a look at every connection. `cargo xtask torture` runs it (docs/TESTING.md).

mod disk;
mod evidence;
mod fault;
mod hygiene;
mod load;
mod memory;
mod options;
mod progress;
mod run;
mod session;
mod strike;

pub use options::{Options, USAGE};
pub use run::{Totals, run};
