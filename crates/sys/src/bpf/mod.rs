//! Many sockets read in one pass, by a small program that the kernel runs over them.
//!
//! [`SocketProgram`] is the way in. [`btf`] finds out where this kernel keeps the numbers of a
//! connection, [`program`] makes the instructions that read them, [`record`] is what they leave,
//! and [`call`] speaks bpf(2).

mod btf;
mod call;
mod program;
mod record;
mod sockets;

pub use record::Record;
pub use sockets::{SocketProgram, SocketReader};
