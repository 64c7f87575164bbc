//! Exact clients: each knows what it must receive, and counts what was lost, doubled, reordered,
//! damaged, and every connection that broke.
//!
//! They know nothing of unbroken and share no code with it, so they can judge it; run against an
//! unprotected server they show what a client normally sees when the server dies.

pub mod bulk;
pub mod churn;
pub mod config;
mod connection;
pub mod content;
pub mod echo;
pub mod icecast;
pub mod irc;
pub mod latency;
pub mod redis;
pub mod requests;
mod running;
mod sequence;
pub mod serve;
pub mod tally;

pub use running::{ClientError, Running};
pub use tally::{Ear, Report, Snapshot, Tally, Timeline};
