//! Kernel objects, one file a kind: captured from a descriptor, restored to one, side by side. What
//! is done with each kind stands in one table, [`kinds`](crate::Kind), which [`table::Mirror`] and
//! [`restore`] go by.
//!
//! Capture works on a fresh duplicate of the service's descriptor, taken while the service is
//! stopped and closed before it goes on: a kept duplicate would keep pipes and sockets open
//! (KERNEL.md, Kept duplicates). Restore runs on a thread that stands in the replica's namespaces.
//! [`table::Mirror`] knows which descriptors there are, and which of them share a description.
#![forbid(unsafe_code)]

mod classify;
mod description;
pub mod device;
pub mod directory;
pub mod epoll;
mod error;
pub mod eventfd;
pub mod file;
mod kinds;
pub mod listener;
pub mod memfd;
mod methods;
mod output;
pub mod pipe;
mod proc_file;
mod restore;
mod restored;
mod scratch;
pub mod signalfd;
pub mod socket_options;
pub mod table;
pub mod tcp;
pub mod timerfd;
pub mod udp;
pub mod unix;
mod watch;

pub use classify::classify;
pub(crate) use error::Context;
pub use error::Error;
pub use kinds::{Kind, support_table};
pub use methods::Event;
pub use restore::restore;
pub use restored::{Phase, Restored, Scene};
pub use scratch::Scratch;
