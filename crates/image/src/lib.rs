//! What a service is, as data: the one vocabulary that capture, link, replica and takeover share.
//!
//! Nothing here touches the kernel. An [`Epoch`] says how a process tree differs from the epoch
//! before it; applying every epoch in order to an empty tree gives the service's whole state.
#![forbid(unsafe_code)]

mod encoding;
mod epoch;
mod id;
mod memory;
pub mod object;
mod process;
mod thread;

pub use encoding::{DecodeError, decode, encode_into};
pub use epoch::{Birth, DescriptorChange, Epoch, Mark, ProcessDelta};
pub use id::{Descriptor, Fd, ObjectId, Pid, Tid};
pub use memory::{
    AddressRange, Advice, Backing, FileIdentity, Mapping, MemoryDelta, MemoryLayout, PAGE_SIZE,
    PageRun, Protection, Sharing,
};
pub use object::{InterestChange, Object};
pub use process::{
    Credentials, IntervalTimer, NamedDirectory, PosixTimer, ProcessState, SignalAction,
};
pub use thread::{
    AlternateStack, BlockedCall, MemoryPolicy, OwnCredentials, Registers, RestartableSequence,
    RobustList, Scheduling, SignalInfo, ThreadAttributes, ThreadState,
};
