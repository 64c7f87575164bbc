//! The node: the one crate where the service, the wire, the epochs and the standby meet.
#![forbid(unsafe_code)]
//! The node: the only crate that meets everything.

pub mod board;
pub mod bundle;
pub mod channel;
pub mod clock;
pub mod config;
pub mod control;
pub mod directory;
pub mod handshake;
pub mod log;
pub mod record;

pub mod notify;
pub mod publish;
pub mod stage;
#[cfg(test)]
mod test_root;
