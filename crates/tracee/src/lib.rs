//! Holds a live, traced process tree: stop it, read and change its threads, run system calls in
//! it, follow its memory.
//!
//! Everything here belongs to one thread, the *tracer*: the kernel takes ptrace requests only from
//! the thread that seized. The types are therefore not `Send`; what other threads may do is ring
//! the [`Bell`].
//!
//! - [`Tree`] knows every process and thread and [waits](Tree::wait) for what they do.
//! - [`Stopped`] is the tree while none of it runs; what needs a stopped thread exists only there.
//! - [`ProcessReading`] is what a capture reads of threads.
//! - [`Batch`] runs system calls in a stopped thread, through the [`blob`].
//! - [`survey`] reads what a process is, apart from memory and descriptors.
//! - [`replica`] builds another tree that is like this one.
#![forbid(unsafe_code)]

pub mod blob;
mod blocked;
pub mod dirty;
mod error;
mod host;
pub mod memory_map;
mod proc;
mod reading;
mod remote;
pub mod replica;
mod seize;
pub mod shared_content;
mod stop;
pub mod survey;
mod thread;
mod tree;
mod user_code;
mod userfault;
pub mod write_faults;

pub use dirty::DirtyTracker;
pub use error::TraceError;
pub use host::{HostPid, HostTid};
pub use reading::{ProcessReading, ThreadReading};
pub use remote::{Batch, BatchedCall, RemoteAddr, Results};
pub use stop::Stopped;
pub use thread::{Process, Thread};
pub use tree::{End, Event, IsAnnounced, Tree};
pub use unbroken_sys::wait::{Bell, Death};
pub use write_faults::WriteFaults;
