#![forbid(unsafe_code)]

pub mod listener;
pub mod socket;
pub mod socket_options;
pub mod tcp;
pub mod udp;
pub mod unix;
