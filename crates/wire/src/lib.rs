//! The service's only way to the network.
//!
//! Packets come and go over two TUN devices, each behind a virtio network header. [`gate`] holds
//! output until its epoch is committed, [`merge`] joins what then goes; [`flows`] knows what each
//! client was told, [`sent`] what is under way to it; [`craft`] builds the packets that a takeover
//! needs. [`exchange`] keeps the order of steps between all of them.
#![forbid(unsafe_code)]

pub mod craft;
pub mod exchange;
pub mod flows;
pub mod frames;
pub mod gate;
pub mod merge;
pub mod packet;
mod pending;
pub mod sent;
pub mod serial;
pub mod tun;
mod tuple;

pub use tuple::Tuple;
