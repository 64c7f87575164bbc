//! The servers that are measured, and what is asked of each.

pub mod echo;
pub mod footprint;
pub mod icecast;
pub mod memcached;
pub mod nginx;
pub mod ngircd;
pub mod redis;
