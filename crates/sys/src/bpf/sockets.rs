//! Reading many sockets at once.
//!
//! The unsafe blocks let the kernel write records of plain numbers behind the end of a vector, and
//! count them in only as far as it did.
#![allow(unsafe_code)]

use super::call::{self, Attached};
use super::record::Record;
use super::{load_program, program};
use crate::descriptor::check_size;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The kernel has the program that reads TCP sockets. It ends with this value and its readers, or
/// with the process.
#[derive(Debug)]
pub struct SocketProgram {
    program: OwnedFd,
}

impl SocketProgram {
    /// Gives the program to the kernel. Takes some milliseconds.
    ///
    /// # Errors
    /// Says which step was refused, and what would help. What the program does can also be had by
    /// calls on each socket.
    pub fn load() -> io::Result<SocketProgram> {
        let program = load_program("a TCP socket", program::assemble)?;
        Ok(SocketProgram { program })
    }

    /// A reader of one process's sockets.
    ///
    /// # Errors
    /// `NotFound` when there is no thread `tid`.
    pub fn reader(&self, tid: i32) -> io::Result<SocketReader> {
        let link = call::attach(self.program.as_fd(), Attached::FilesOf(tid))?;
        Ok(SocketReader { link })
    }
}

/// Reads the numbers of all TCP sockets that the descriptors of one thread name, of any network
/// namespace, in one pass. It costs a few microseconds, some hundredths of one for every open
/// descriptor, and a tenth for every socket. The process sees nothing of it.
#[derive(Debug)]
pub struct SocketReader {
    link: OwnedFd,
}

/// Room for what the kernel gives at once: an iterator's buffer has eight pages.
const READ_RECORDS: usize = (8 << 12) / size_of::<Record>();

impl SocketReader {
    /// Reads every socket into `records`, whose room is used again, in the order of descriptors;
    /// one that several name comes as often. Of a thread that is gone there are none.
    pub fn read(&self, records: &mut Vec<Record>) -> io::Result<()> {
        records.clear();
        let pass = call::open_pass(self.link.as_fd())?;
        loop {
            let count = read_records(pass.as_fd(), records)?;
            if count == 0 {
                // Without the last record: the kernel did not go through all files.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if records.pop_if(|last| last.is_end()).is_some() {
                return Ok(());
            }
        }
    }
}

/// Reads once, behind the end of `records`; how many came.
fn read_records(pass: BorrowedFd<'_>, records: &mut Vec<Record>) -> io::Result<usize> {
    records.reserve(READ_RECORDS);
    let room = &mut records.spare_capacity_mut()[..READ_RECORDS];
    let room_bytes = READ_RECORDS * size_of::<Record>();
    // SAFETY: `room` is writable for `room_bytes`, and the kernel only writes.
    let result = unsafe { libc::read(pass.as_raw_fd(), room.as_mut_ptr().cast(), room_bytes) };
    let read_bytes = check_size(result)?;
    if !read_bytes.is_multiple_of(size_of::<Record>()) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let count = read_bytes / size_of::<Record>();
    // SAFETY: the kernel wrote `count` whole records there, and any bytes are a valid Record.
    unsafe { records.set_len(records.len() + count) };
    Ok(count)
}
