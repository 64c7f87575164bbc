//! The few commands of `bpf(2)` that the reader needs, with the parts of `union bpf_attr`
//! (include/uapi/linux/bpf.h) that each of them takes.
//!
//! Every block hands the kernel a `repr(C)` structure without padding together with its size. What
//! the structure points to is borrowed by the caller until the call returns, and the kernel only
//! reads it, but for the log, which is a mutable slice. A descriptor that a command returns is new.
#![allow(unsafe_code)]

use super::instruction::Instruction;
use crate::descriptor::check;
use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;

const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;

/// How much the verifier may say about a program that it refuses.
const LOG_BYTES: usize = 16384;

/// A command that returns a descriptor.
///
/// # Safety
/// `attributes` is what `command` takes, without padding, and what it points to may be read, or
/// written where the command writes, until the call returns.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the size is that of the structure; the caller vouches for the rest.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    let fd = check(result as libc::c_int)?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

#[repr(C)]
struct LoadProgram {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_length: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_kind: u32,
    types: u32,
    function_record_bytes: u32,
    functions: u64,
    function_count: u32,
    line_record_bytes: u32,
    lines: u64,
    line_count: u32,
    attach_type: u32,
}

/// Loads an iterator over what the kernel's function `target` (its number in the kernel's types)
/// goes over. When the verifier refuses it, the error ends in what it said last.
pub(super) fn load_iterator(instructions: &[Instruction], target: u32) -> io::Result<OwnedFd> {
    // Helpers of the kernel that write to its files want a licence that the GPL can live with.
    const LICENSE: &CStr = c"Dual MIT/GPL";
    let mut attributes = LoadProgram {
        kind: BPF_PROG_TYPE_TRACING,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: 0,
        log_length: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"unbroken_reader\0",
        interface: 0,
        attach_kind: BPF_TRACE_ITER,
        types: 0,
        function_record_bytes: 0,
        functions: 0,
        function_count: 0,
        line_record_bytes: 0,
        lines: 0,
        line_count: 0,
        attach_type: target,
    };
    // SAFETY: BPF_PROG_LOAD reads `instruction_count` instructions and a string that ends.
    let refused = match unsafe { bpf(BPF_PROG_LOAD, &attributes) } {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    let mut log = vec![0u8; LOG_BYTES];
    attributes.log_level = 1;
    attributes.log_length = log.len() as u32;
    attributes.log = log.as_mut_ptr() as u64;
    // SAFETY: as above; the kernel writes at most `log_length` bytes to `log`, which is ours.
    match unsafe { bpf(BPF_PROG_LOAD, &attributes) } {
        Ok(program) => Ok(program),
        Err(_) => Err(with_last_words(refused, &log)),
    }
}

/// The verifier ends with a line of statistics; the one before it says what is wrong.
fn with_last_words(error: io::Error, log: &[u8]) -> io::Error {
    let end = log.iter().position(|byte| *byte == 0);
    let text = String::from_utf8_lossy(&log[..end.unwrap_or(log.len())]).into_owned();
    let said = text
        .lines()
        .rev()
        .find(|line| !line.is_empty() && !line.starts_with("processed "));
    match said {
        Some(said) => io::Error::new(error.kind(), format!("{error} ({said})")),
        None => error,
    }
}

/// What an iterator goes over, by numbers of our pid namespace.
pub(super) enum Attached {
    /// The files of this thread.
    FilesOf(i32),
    /// The threads of this process.
    Process(i32),
}

/// Ties an iterator to what it goes over.
pub(super) fn attach(program: BorrowedFd<'_>, to: Attached) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_kind: u32,
        flags: u32,
        iterator: u64,
        iterator_length: u32,
        reserved: u32,
    }
    // `union bpf_iter_link_info`: tid, pid, pidfd.
    let task = match to {
        Attached::FilesOf(tid) => [tid.cast_unsigned(), 0, 0],
        Attached::Process(pid) => [0, pid.cast_unsigned(), 0],
    };
    let attributes = Attributes {
        program: raw(program),
        target: 0,
        attach_kind: BPF_TRACE_ITER,
        flags: 0,
        iterator: task.as_ptr() as u64,
        iterator_length: size_of_val(&task) as u32,
        reserved: 0,
    };
    // SAFETY: the kernel reads `iterator_length` bytes of `iterator`, which is `task`.
    unsafe { bpf(BPF_LINK_CREATE, &attributes) }
}

/// A file whose reading runs the attached iterator once.
pub(super) fn open_pass(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        link: u32,
        flags: u32,
    }
    let attributes = Attributes {
        link: raw(link),
        flags: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_ITER_CREATE, &attributes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_reason_is_found_in_its_log() {
        let error = || io::Error::from_raw_os_error(libc::EACCES);
        let log = b"0: R1=ctx()\nR7 invalid mem access\nprocessed 3 insns\n\0\0rubbish";
        let text = with_last_words(error(), log).to_string();
        assert!(text.ends_with("(R7 invalid mem access)"), "{text}");
        assert_eq!(
            with_last_words(error(), &[]).raw_os_error(),
            Some(libc::EACCES)
        );
    }
}
