//! Small programs that the kernel runs for us: over many sockets or threads in one pass, and
//! wherever a thread begins to wait for a time.
//!
//! [`SocketProgram`], [`ThreadProgram`] and [`DeadlineProgram`] are the ways in. [`btf`] finds out
//! where this kernel keeps what is read, [`program`] and [`instruction`] make the instructions that
//! read it, [`record`] is what they leave of a socket, and [`call`] speaks bpf(2).

mod btf;
mod call;
mod deadlines;
mod instruction;
mod program;
mod record;
mod sockets;
mod threads;

pub use deadlines::{DeadlineProgram, SocketDeadlines, SocketDeadlinesLoader};
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
    let program = assembled(subject, assemble)?;
    call::load_iterator(&program.instructions, program.target)
        .map_err(|error| refused(&error, &format!("load a BPF iterator that reads {subject}")))
}

/// What `assemble` makes of this kernel's types.
fn assembled<T>(subject: &str, assemble: impl Fn(&Btf<'_>) -> io::Result<T>) -> io::Result<T> {
    let types = fs::read(KERNEL_TYPES).map_err(|error| {
        let fix = "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y";
        explained(&error, &format!("read {KERNEL_TYPES}"), fix)
    })?;
    Btf::parse(&types)
        .and_then(|types| assemble(&types))
        .map_err(|error| {
            let action = format!("find the parts of {subject} in {KERNEL_TYPES}");
            explained(&error, &action, "boot a newer kernel")
        })
}

fn refused(error: &io::Error, action: &str) -> io::Error {
    let fix = match error.raw_os_error() {
        // No such tracepoint.
        Some(libc::ENOENT) => "boot a kernel with CONFIG_TRACEPOINTS=y",
        _ => "give CAP_BPF and CAP_PERFMON, and boot without lockdown=confidentiality",
    };
    explained(error, action, fix)
}

fn explained(error: &io::Error, action: &str, fix: &str) -> io::Error {
    let text = format!("cannot {action}: {error}; {fix}");
    io::Error::new(error.kind(), text)
}
