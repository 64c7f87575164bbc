//! Reading the content of a pipe without taking anything out of it.

use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_sys::{descriptor, pipe};

/// A pipe of ours into which content is copied to be read, and the buffer for it; kept from
/// capture to capture.
pub struct Scratch {
    read: OwnedFd,
    write: OwnedFd,
    capacity_bytes: usize,
    buffer: Vec<u8>,
}

impl Scratch {
    pub fn new() -> Result<Scratch, Error> {
        let (read, write) =
            pipe::pipe(libc::O_NONBLOCK).during("create", "a pipe to copy pipes into")?;
        let capacity_bytes =
            pipe::capacity(read.as_fd()).during("read the capacity of", "a pipe")?;
        Ok(Scratch {
            read,
            write,
            capacity_bytes,
            buffer: Vec::new(),
        })
    }

    /// Copies the content of `from` into the empty scratch pipe; the number of bytes.
    pub(crate) fn copy(
        &mut self,
        from: BorrowedFd<'_>,
        capacity_bytes: usize,
    ) -> Result<usize, Error> {
        // tee copies slots, not bytes: with as many slots as the pipe has, nothing is left out.
        if self.capacity_bytes < capacity_bytes {
            pipe::set_capacity(self.write.as_fd(), capacity_bytes)
                .during("enlarge", "the pipe to copy pipes into")?;
            self.capacity_bytes = capacity_bytes;
        }
        match pipe::tee(from, self.write.as_fd(), i32::MAX as usize) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(0),
            other => other.during("copy the content of", "a pipe"),
        }
    }

    /// Reads one entry out of the scratch pipe: everything there, or one packet.
    pub(crate) fn read_entry(&mut self, most_bytes: usize) -> Result<Vec<u8>, Error> {
        self.buffer.resize(most_bytes.max(self.buffer.len()), 0);
        let count = descriptor::read(self.read.as_fd(), &mut self.buffer[..most_bytes])
            .during("read", "the copy of a pipe")?;
        Ok(self.buffer[..count].to_vec())
    }

    /// What is left in the scratch pipe.
    pub(crate) fn unread_bytes(&self) -> Result<usize, Error> {
        descriptor::unread_bytes(self.read.as_fd()).during("look into", "a pipe's copy")
    }
}
