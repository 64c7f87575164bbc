//! The node: the one crate where the service, the wire, the epochs and the standby meet.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod capture;
pub mod channel;
pub mod clock;
pub mod config;
pub mod control;
pub mod directory;
pub mod front;
pub mod handshake;
pub mod inherited;
mod kernel_program;
pub mod log;
mod news;
pub mod notify;
pub mod primary;
pub mod program;
pub mod publish;
pub mod stage;
pub mod standby;
pub mod status_page;
pub mod steps;
pub mod takeover;
#[cfg(test)]
mod test_root;
mod title;
