//! The node: the one crate where the service, the wire, the epochs and the standby meet.
#![forbid(unsafe_code)]

pub mod stage;
