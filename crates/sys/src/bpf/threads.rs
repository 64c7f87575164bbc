//! Whether a process is at work, asked without stopping it.
//!
//! The program writes one word for each thread that runs or could, and one at the end, so that a
//! reader knows that it has all.
#![allow(unsafe_code)]

use super::btf::Btf;
use super::call::{self, Attached};
use super::instruction::{
    CONTEXT, Program, R0, R1, R2, WRITE_LENGTH, exit, load, put, set, set_value, skip_if_not_zero,
    skip_if_zero, write_out,
};
use super::load_program;
use crate::descriptor::check_size;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// What the program is attached to, and `struct bpf_iter__task`.
const TARGET: &str = "bpf_iter_task";
const CONTEXT_TASK: i16 = 8;

type Word = u64;
const WORD_BYTES: usize = size_of::<Word>();
const LAST: Word = 0;
const RUNS: Word = 1;

/// The kernel has the program that looks at threads.
#[derive(Debug)]
pub struct ThreadProgram {
    program: OwnedFd,
}

impl ThreadProgram {
    /// Gives the program to the kernel. Takes some milliseconds.
    ///
    /// # Errors
    /// Says which step was refused, and what would help.
    pub fn load() -> io::Result<ThreadProgram> {
        let program = load_program("a thread", assemble)?;
        Ok(ThreadProgram { program })
    }

    /// A reader of one process, whose number in our pid namespace is `pid`.
    pub fn reader(&self, pid: i32) -> io::Result<ThreadReader> {
        let link = call::attach(self.program.as_fd(), Attached::Process(pid))?;
        Ok(ThreadReader { link })
    }
}

/// Looks at the threads of one process.
#[derive(Debug)]
pub struct ThreadReader {
    link: OwnedFd,
}

impl ThreadReader {
    /// Whether any thread runs or is about to: those that sleep, stand stopped or have ended do
    /// not. It costs some microseconds; the process sees nothing of it.
    pub fn any_runs(&self) -> io::Result<bool> {
        let pass = call::open_pass(self.link.as_fd())?;
        let mut first = [0; WORD_BYTES];
        // SAFETY: the kernel writes at most so many bytes to the array, which is ours.
        let result =
            unsafe { libc::read(pass.as_raw_fd(), first.as_mut_ptr().cast(), first.len()) };
        match (check_size(result)?, Word::from_ne_bytes(first)) {
            (WORD_BYTES, RUNS) => Ok(true),
            (WORD_BYTES, LAST) => Ok(false),
            (WORD_BYTES, _) => Err(io::ErrorKind::InvalidData.into()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn assemble(types: &Btf<'_>) -> io::Result<Program> {
    let state = types.place(types.structure("task_struct")?, "__state")?;
    let offset = i16::try_from(state.offset_bytes)
        .ok()
        .filter(|_| state.size_bytes == 4)
        .ok_or_else(|| {
            let text = format!("this kernel keeps a thread's state in {state:?}");
            io::Error::new(io::ErrorKind::Unsupported, text)
        })?;
    let word = -(WORD_BYTES as i16);
    let looking = [
        load(4, R1, R2, offset),
        // TASK_RUNNING is 0 (include/linux/sched.h).
        skip_if_not_zero(R1, 1 + WRITE_LENGTH),
        put(word, RUNS as i32),
    ];
    let beginning = [
        set(CONTEXT, R1),
        put(word, LAST as i32),
        load(8, R2, CONTEXT, CONTEXT_TASK),
        skip_if_zero(R2, looking.len()),
    ];
    let ending = [set_value(R0, 0), exit()];
    let instructions = [&beginning[..], &looking, &write_out(WORD_BYTES), &ending].concat();
    Ok(Program {
        instructions,
        target: types.function(TARGET)?,
    })
}
