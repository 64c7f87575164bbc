//! Runs servers, protected or not, in a network namespace of the test's own, kills what should be
//! killed, and looks for what was left behind.
//!
//! The product is driven as a user drives it: the program `unbroken` and its `status --json`
//! (`UNBROKEN_BIN`, or the release build of this workspace). Nothing here depends on its crates.

mod leftovers;
pub mod namespace;
mod plain;
mod process;
mod random;
mod scratch;
mod service;
mod status;
mod unbroken;

pub use leftovers::{Marker, assert_gone, assert_namespace_empty};
pub use nix::sys::signal::Signal;
pub use plain::Plain;
pub use process::{Ended, send, wait_until};
pub use random::Random;
pub use scratch::Scratch;
pub use service::{Kill, KillEvent, KillPlan, Launch, Service, Target};
pub use status::Status;
pub use unbroken::{Outcome, program, run_to_end};

use std::time::Duration;

/// How long a test waits for what must happen. Reached only by a hang: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);
