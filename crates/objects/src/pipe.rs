//! Pipes and FIFOs: content, packet borders, capacity, and ends that belong together.

use crate::{Context, Error, file};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::{Pipe, PipeEnd};
use unbroken_sys::{descriptor, fdinfo, pipe};

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
    fn copy(&mut self, from: BorrowedFd<'_>, capacity_bytes: usize) -> Result<usize, Error> {
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
    fn read_entry(&mut self, most_bytes: usize) -> Result<Vec<u8>, Error> {
        self.buffer.resize(most_bytes.max(self.buffer.len()), 0);
        let count = descriptor::read(self.read.as_fd(), &mut self.buffer[..most_bytes])
            .during("read", "the copy of a pipe")?;
        Ok(self.buffer[..count].to_vec())
    }
}

/// Reads out a descriptor of ours that names one end of a pipe or FIFO, without taking anything
/// out of it.
pub fn capture(fd: BorrowedFd<'_>, scratch: &mut Scratch) -> Result<PipeEnd, Error> {
    let flags = descriptor::status_flags(fd).during("read the flags of", "a pipe")?;
    file::refuse_ownership(fd, flags, "a pipe")?;
    let status = descriptor::status(fd).during("look at", "a pipe")?;
    let path = file::path_of(fd)?;
    let fifo_path = (!path.starts_with("pipe:")).then_some(path);
    let pipe = match flags & libc::O_ACCMODE {
        libc::O_WRONLY => None,
        _ => Some(capture_content(fd, scratch)?),
    };
    Ok(PipeEnd {
        inode: status.inode,
        flags,
        pipe,
        fifo_path,
    })
}

/// The content of the pipe behind a read end, and its shape.
pub(crate) fn capture_content(fd: BorrowedFd<'_>, scratch: &mut Scratch) -> Result<Pipe, Error> {
    let capacity = pipe::capacity(fd).during("read the capacity of", "a pipe")?;
    let total = scratch.copy(fd, capacity)?;
    let mut content = Vec::new();
    let mut left = total;
    while left > 0 {
        let entry = scratch.read_entry(left)?;
        if entry.is_empty() {
            return Err(Error::Answer {
                operation: "read",
                subject: "the copy of a pipe".to_owned(),
                answer: format!("end of file with {left} bytes left"),
            });
        }
        left -= entry.len();
        content.push(entry);
    }
    let packets = match content.as_slice() {
        [] => false,
        [only] if only.len() > 1 => is_packet(fd, scratch, capacity, only.len())?,
        [_] => false,
        _ => true,
    };
    Ok(Pipe {
        capacity_bytes: capacity as u64,
        content,
        packets,
    })
}

/// Whether the single entry in the pipe is a packet: a read that is one byte short then loses the
/// last byte, which a byte stream keeps.
fn is_packet(
    fd: BorrowedFd<'_>,
    scratch: &mut Scratch,
    capacity: usize,
    length: usize,
) -> Result<bool, Error> {
    scratch.copy(fd, capacity)?;
    scratch.read_entry(length - 1)?;
    let left =
        descriptor::unread_bytes(scratch.read.as_fd()).during("look into", "a pipe's copy")?;
    if left > 0 {
        scratch.read_entry(left)?;
    }
    Ok(left == 0)
}

/// Makes one pipe or FIFO and all the ends in `ends` (which name the same one), in their order.
/// Read ends whose pipe has no writer among them report end of file after the content, write ends
/// without a reader `EPIPE`, as the originals did.
pub fn restore_group(ends: &[&PipeEnd]) -> Result<Vec<OwnedFd>, Error> {
    let Some(first) = ends.first() else {
        return Ok(Vec::new());
    };
    if let Some(stranger) = ends.iter().find(|end| end.inode != first.inode) {
        return Err(Error::differs(
            format!("pipe {}", first.inode),
            format!("pipe {} was given as an end of it", stranger.inode),
        ));
    }
    let state = ends.iter().find_map(|end| end.pipe.as_ref());
    match &first.fifo_path {
        Some(path) => restore_fifo(path, ends, state),
        None => restore_pipe(ends, state),
    }
}

/// [`restore_group`] for the usual case: at most one read end and one write end.
pub fn restore_pair(
    read: Option<&PipeEnd>,
    write: Option<&PipeEnd>,
) -> Result<(Option<OwnedFd>, Option<OwnedFd>), Error> {
    let ends: Vec<&PipeEnd> = read.into_iter().chain(write).collect();
    let mut restored = restore_group(&ends)?.into_iter();
    Ok((
        read.and_then(|_| restored.next()),
        write.and_then(|_| restored.next()),
    ))
}

fn restore_pipe(ends: &[&PipeEnd], state: Option<&Pipe>) -> Result<Vec<OwnedFd>, Error> {
    let (read, write) = pipe::pipe(libc::O_NONBLOCK).during("create", "a pipe")?;
    if let Some(state) = state {
        fill(write.as_fd(), state)?;
    }
    // The two first ends are given away as they are; further descriptions are opened anew.
    let anchors = [
        read.try_clone().during("duplicate", "a pipe")?,
        write.try_clone().during("duplicate", "a pipe")?,
    ];
    let (mut read, mut write) = (Some(read), Some(write));
    ends.iter()
        .map(|end| {
            let access = end.flags & libc::O_ACCMODE;
            let given = match access {
                libc::O_RDONLY => read.take(),
                libc::O_WRONLY => write.take(),
                _ => None,
            };
            let fd = match given {
                Some(fd) => fd,
                None => fdinfo::reopen(anchors[0].as_fd(), access | libc::O_NONBLOCK)
                    .during("open once more", "a pipe")?,
            };
            descriptor::set_status_flags(fd.as_fd(), end.flags)
                .during("set the flags of", "a pipe")?;
            Ok(fd)
        })
        .collect()
}

fn restore_fifo(
    path: &str,
    ends: &[&PipeEnd],
    state: Option<&Pipe>,
) -> Result<Vec<OwnedFd>, Error> {
    let c_path = fdinfo::c_path(path).during("open", path)?;
    // Reading and writing at once: no open of a FIFO waits for the other side then.
    let anchor = descriptor::open(
        None,
        &c_path,
        libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC,
    )
    .during("open", path)?;
    let found = descriptor::status(anchor.as_fd()).during("look at", path)?;
    if found.file_type() != libc::S_IFIFO || found.inode != ends[0].inode {
        return Err(Error::differs(path, "another file has this name now"));
    }
    let left = descriptor::unread_bytes(anchor.as_fd()).during("look into", path)?;
    if left > 0 {
        return Err(Error::differs(
            path,
            "a process outside the service holds it open",
        ));
    }
    if let Some(state) = state {
        fill(anchor.as_fd(), state)?;
    }
    ends.iter()
        .map(|end| {
            let access = end.flags & libc::O_ACCMODE;
            let fd = descriptor::open(None, &c_path, access | libc::O_NONBLOCK | libc::O_CLOEXEC)
                .during("open", path)?;
            descriptor::set_status_flags(fd.as_fd(), end.flags).during("set the flags of", path)?;
            Ok(fd)
        })
        .collect()
}

/// Gives a new, empty pipe its capacity and its content. `write` must not block.
fn fill(write: BorrowedFd<'_>, state: &Pipe) -> Result<(), Error> {
    // The capacity comes first, or the content may not fit. Above the system's limit the kernel
    // wants CAP_SYS_RESOURCE; only a service that had it can have made such a pipe.
    let capacity = usize::try_from(state.capacity_bytes).unwrap_or(usize::MAX);
    pipe::set_capacity(write, capacity).during(
        "raise /proc/sys/fs/pipe-max-size: set the capacity of",
        format_args!("a pipe of {capacity} bytes"),
    )?;
    let mode = if state.packets { libc::O_DIRECT } else { 0 };
    descriptor::set_status_flags(write, libc::O_NONBLOCK | mode)
        .during("set the flags of", "a pipe")?;
    for entry in &state.content {
        let mut done = 0;
        while done < entry.len() {
            done += descriptor::write(write, &entry[done..]).during("fill", "a pipe")?;
        }
    }
    Ok(())
}
