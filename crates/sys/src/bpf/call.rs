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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;

const BPF_MAP_TYPE_LRU_HASH: u32 = 9;

const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;

/// How much the verifier may say about a program that it refuses.
const LOG_BYTES: usize = 16384;

/// # Safety
/// `attributes` is what `command` takes, without padding, and what it points to may be read, or
/// written where the command writes, until the call returns.
unsafe fn bpf_number<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the size is that of the structure; the caller vouches for the rest.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    check(result as libc::c_int)
}

/// A command that returns a descriptor.
///
/// # Safety
/// As for [`bpf_number`].
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says.
    let fd = unsafe { bpf_number(command, attributes) }?;
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
    load(instructions, BPF_PROG_TYPE_TRACING, BPF_TRACE_ITER, target)
}

/// Loads a program for a tracepoint, and runs it there for as long as the descriptor is open. The
/// error is as that of [`load_iterator`].
pub(super) fn run_at(tracepoint: &CStr, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        name: u64,
        program: u32,
        reserved: u32,
    }
    let program = load(instructions, BPF_PROG_TYPE_RAW_TRACEPOINT, 0, 0)?;
    let attributes = Attributes {
        name: tracepoint.as_ptr() as u64,
        program: raw(program.as_fd()),
        reserved: 0,
    };
    // SAFETY: the name is a string that ends.
    unsafe { bpf(BPF_RAW_TRACEPOINT_OPEN, &attributes) }
}

fn load(
    instructions: &[Instruction],
    kind: u32,
    attach_kind: u32,
    target: u32,
) -> io::Result<OwnedFd> {
    // Helpers of the kernel that write to its files want a licence that the GPL can live with.
    const LICENSE: &CStr = c"Dual MIT/GPL";
    let mut attributes = LoadProgram {
        kind,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: 0,
        log_length: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"unbroken\0\0\0\0\0\0\0\0",
        interface: 0,
        attach_kind,
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

/// Entries of so many words, by a number of four bytes. When there is no room for a new one, one
/// that was not used for long makes room.
#[derive(Debug)]
pub(super) struct Map<const WORDS: usize> {
    fd: OwnedFd,
}

impl<const WORDS: usize> Map<WORDS> {
    pub fn create(entries: u32) -> io::Result<Map<WORDS>> {
        #[repr(C)]
        struct Attributes {
            kind: u32,
            key_bytes: u32,
            value_bytes: u32,
            entries: u32,
        }
        let attributes = Attributes {
            kind: BPF_MAP_TYPE_LRU_HASH,
            key_bytes: size_of::<u32>() as u32,
            value_bytes: size_of::<[u64; WORDS]>() as u32,
            entries,
        };
        // SAFETY: no pointers.
        let fd = unsafe { bpf(BPF_MAP_CREATE, &attributes) }?;
        Ok(Map { fd })
    }

    /// For [`super::instruction::set_map`].
    pub fn descriptor(&self) -> u32 {
        raw(self.fd.as_fd())
    }

    /// The entry of `key`, if there is one.
    pub fn get(&self, key: u32) -> io::Result<Option<[u64; WORDS]>> {
        #[repr(C)]
        struct Attributes {
            map: u32,
            reserved: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let mut value = [0; WORDS];
        let attributes = Attributes {
            map: self.descriptor(),
            reserved: 0,
            key: (&raw const key) as u64,
            value: (&raw mut value) as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads the four bytes of `key` and writes as many to `value` as the map
        // was made for, which are its own.
        match unsafe { bpf_number(BPF_MAP_LOOKUP_ELEM, &attributes) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
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
