#![forbid(unsafe_code)]
//! The node: the only crate that meets everything.

pub mod channel;
pub mod config;
pub mod handshake;
