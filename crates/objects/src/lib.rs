//! Kernel objects, one file a kind: captured from a descriptor, restored to one, side by side.
//!
//! Capture works on a fresh duplicate of the service's descriptor, taken while the service is
//! stopped and closed before it goes on: a kept duplicate would keep pipes and sockets open
//! (KERNEL.md, Kept duplicates). Restore runs on a thread that stands in the replica's namespaces.
//! [`table::Mirror`] knows which descriptors there are, and which of them share a description.
#![forbid(unsafe_code)]

mod classify;
pub mod device;
pub mod directory;
pub mod epoll;
mod error;
pub mod eventfd;
pub mod file;
pub mod listener;
pub mod memfd;
pub mod pipe;
pub mod proc_file;
pub mod refuse;
pub mod signalfd;
pub mod socket;
pub mod socket_options;
pub mod table;
pub mod tcp;
pub mod timerfd;
pub mod udp;
pub mod unix;

pub use classify::{Kind, classify};
pub(crate) use error::Context;
pub use error::Error;
