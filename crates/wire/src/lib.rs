//! The service's only way to the network.
//!
//! Packets come and go over two TUN devices, each behind a virtio network header. [`gate`] holds
//! output until its epoch is committed, [`merge`] joins what then goes; [`flows`] knows what each
//! client was told, [`sent`] what is under way to it; [`craft`] builds the packets that a takeover
//! needs.
#![forbid(unsafe_code)]

pub mod craft;
pub mod flows;
pub mod frames;
pub mod gate;
pub mod merge;
pub mod packet;
pub mod sent;
pub mod serial;
pub mod tun;
mod tuple;

pub use tuple::Tuple;
