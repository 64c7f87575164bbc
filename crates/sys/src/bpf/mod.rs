//! Many sockets and threads read in one pass, by small programs that the kernel runs over them.
//!
//! [`SocketProgram`] and [`ThreadProgram`] are the ways in. [`btf`] finds out where this kernel
//! keeps what is read, [`program`] and [`instruction`] make the instructions that read it,
//! [`record`] is what they leave of a socket, and [`call`] speaks bpf(2).

mod btf;
mod call;
mod instruction;
mod program;
mod record;
mod sockets;
mod threads;

pub use record::Record;
pub use sockets::{SocketProgram, SocketReader};
pub use threads::{ThreadProgram, ThreadReader};

use btf::{Btf, KERNEL_TYPES};
use instruction::Program;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

/// Makes an iterator that reads `subject`, and gives it to the kernel.
fn load_program(
    subject: &str,
    assemble: fn(&Btf<'_>) -> io::Result<Program>,
) -> io::Result<OwnedFd> {
    let types = fs::read(KERNEL_TYPES).map_err(|error| {
        let fix = "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y";
        explained(&error, &format!("read {KERNEL_TYPES}"), fix)
    })?;
    let program = Btf::parse(&types)
        .and_then(|types| assemble(&types))
        .map_err(|error| {
            let action = format!("find the parts of {subject} in {KERNEL_TYPES}");
            explained(&error, &action, "boot a newer kernel")
        })?;
    call::load_iterator(&program.instructions, program.target).map_err(|error| {
        let fix = "give CAP_BPF and CAP_PERFMON, and boot without lockdown=confidentiality";
        let action = format!("load a BPF iterator that reads {subject}");
        explained(&error, &action, fix)
    })
}

fn explained(error: &io::Error, action: &str, fix: &str) -> io::Error {
    let text = format!("cannot {action}: {error}; {fix}");
    io::Error::new(error.kind(), text)
}
