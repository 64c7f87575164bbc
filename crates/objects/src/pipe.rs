//! Pipes and FIFOs: content, packet borders, capacity, and ends that belong together.

use crate::methods::{Capture, Inode, Look, Means, Methods, Reading};
use crate::restored::{Batch, Phase, Restored, Scene};
use crate::scratch::Scratch;
use crate::{Context, Error, description};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::{Pipe, PipeEnd};
use unbroken_image::{FileIdentity, Object, ObjectId};
use unbroken_sys::{descriptor, fdinfo, pipe};

pub(crate) const METHODS: Methods = Methods {
    inode: Inode::OfAllEnds,
    // A write end has no state of its own but flags.
    is_volatile: |object| matches!(object, Object::PipeEnd(end) if end.pipe.is_some()),
    look,
    ..Methods::new(Capture::Descriptor(read), &[(Phase::Make, make)])
};

fn read(reading: &mut Reading, fd: BorrowedFd<'_>, means: &mut Means<'_>) -> Result<(), Error> {
    let state = capture(fd, &mut means.tools.scratch)?;
    refuse_end_outside(fd, &state, means.other_ends)?;
    if state.fifo_path.is_some() {
        reading.watches.refer(&means.holders)?;
    }
    reading.state = Some(Object::PipeEnd(state));
    Ok(())
}

fn look(reading: &mut Reading, means: &mut Means<'_>) -> Result<Look, Error> {
    let Some(Object::PipeEnd(PipeEnd {
        pipe: Some(known), ..
    })) = &mut reading.state
    else {
        return Ok(Look::Same);
    };
    let Some(fd) = means.holders.duplicate()? else {
        return Ok(Look::Unknown);
    };
    let unread = descriptor::unread_bytes(fd.as_fd()).during("look into", "a pipe")?;
    if unread == 0 && known.content.is_empty() {
        return Ok(Look::Same);
    }
    let now = capture_content(fd.as_fd(), &mut means.tools.scratch)?;
    if now == *known {
        return Ok(Look::Same);
    }
    *known = now;
    Ok(Look::Refreshed)
}

/// Refuses a pipe whose other end some process outside the service has open. No state tells of it:
/// the kernel says whether there is any other end at all.
fn refuse_end_outside(
    fd: BorrowedFd<'_>,
    state: &PipeEnd,
    other_ends: &[OwnedFd],
) -> Result<(), Error> {
    let access = state.flags & libc::O_ACCMODE;
    if access == libc::O_RDWR {
        return Ok(());
    }
    for other in other_ends {
        let flags =
            descriptor::status_flags(other.as_fd()).during("read the flags of", "a pipe")?;
        if flags & libc::O_ACCMODE != access {
            return Ok(());
        }
    }
    let (events, closed) = match access {
        libc::O_RDONLY => (libc::POLLIN, libc::POLLHUP),
        _ => (libc::POLLOUT, libc::POLLERR),
    };
    let ready = descriptor::poll_now(fd, events).during("poll", "a pipe")?;
    // A FIFO that never had a writer shows no hang-up, and nothing can have come through it.
    let is_unused = state.fifo_path.is_some() && ready == 0 && access == libc::O_RDONLY;
    if ready & closed != 0 || is_unused {
        return Ok(());
    }
    let what = match &state.fifo_path {
        Some(path) => format!("the FIFO {path}"),
        None => format!("a pipe with inode {}", state.identity.inode),
    };
    Err(Error::refused(
        what,
        "a process outside the service holds its other end; start that process as part of the \
         service, or give the service /dev/null or a file instead",
    ))
}

/// Reads out a descriptor of ours that names one end of a pipe or FIFO, without taking anything
/// out of it.
pub fn capture(fd: BorrowedFd<'_>, scratch: &mut Scratch) -> Result<PipeEnd, Error> {
    let flags = descriptor::status_flags(fd).during("read the flags of", "a pipe")?;
    description::refuse_ownership(fd, flags, "a pipe")?;
    let status = descriptor::status(fd).during("look at", "a pipe")?;
    let path = description::path_of(fd)?;
    let fifo_path = (!path.starts_with("pipe:")).then_some(path);
    let pipe = match flags & libc::O_ACCMODE {
        libc::O_WRONLY => None,
        _ => Some(capture_content(fd, scratch)?),
    };
    Ok(PipeEnd {
        identity: FileIdentity {
            device: status.device,
            inode: status.inode,
        },
        flags,
        ownership: description::ownership_of(&status),
        pipe,
        fifo_path,
    })
}

/// The content of the pipe behind a read end, and its shape.
fn capture_content(fd: BorrowedFd<'_>, scratch: &mut Scratch) -> Result<Pipe, Error> {
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
    let left = scratch.unread_bytes()?;
    if left > 0 {
        scratch.read_entry(left)?;
    }
    Ok(left == 0)
}

fn make(batch: &Batch<'_>, scene: &Scene, restored: &mut Restored) -> Result<(), Error> {
    let mut pipes: BTreeMap<FileIdentity, Vec<(ObjectId, &PipeEnd)>> = BTreeMap::new();
    for (id, object) in batch {
        if let Object::PipeEnd(state) = object {
            pipes.entry(state.identity).or_default().push((*id, state));
        }
    }
    for ends in pipes.into_values() {
        let states: Vec<&PipeEnd> = ends.iter().map(|(_, state)| *state).collect();
        let descriptors = restore_group(&states, scene.reference(states[0].identity))?;
        let ids = ends.iter().map(|(id, _)| *id);
        restored.descriptors.extend(ids.zip(descriptors));
    }
    Ok(())
}

/// Makes one pipe, or opens the FIFO of `reference`, with all the ends in `ends` (which name the same
/// one), in their order.
/// Read ends whose pipe has no writer among them report end of file after the content, write ends
/// without a reader `EPIPE`, as the originals did.
pub fn restore_group(
    ends: &[&PipeEnd],
    reference: Option<BorrowedFd<'_>>,
) -> Result<Vec<OwnedFd>, Error> {
    let Some(first) = ends.first() else {
        return Ok(Vec::new());
    };
    if let Some(stranger) = ends.iter().find(|end| end.identity != first.identity) {
        return Err(Error::differs(
            format!("pipe {}", first.identity.inode),
            format!("pipe {} was given as an end of it", stranger.identity.inode),
        ));
    }
    let state = ends.iter().find_map(|end| end.pipe.as_ref());
    match &first.fifo_path {
        Some(path) => restore_fifo((path, reference), ends, state),
        None => restore_pipe(ends, state),
    }
}

fn restore_pipe(ends: &[&PipeEnd], state: Option<&Pipe>) -> Result<Vec<OwnedFd>, Error> {
    let (read, write) = pipe::pipe(libc::O_NONBLOCK).during("create", "a pipe")?;
    if let Some(state) = state {
        fill(write.as_fd(), state)?;
    }
    if let Some(first) = ends.first() {
        description::set_ownership(write.as_fd(), first.ownership, "a pipe")?;
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
    (path, reference): (&str, Option<BorrowedFd<'_>>),
    ends: &[&PipeEnd],
    state: Option<&Pipe>,
) -> Result<Vec<OwnedFd>, Error> {
    let Some(reference) = reference else {
        return Err(Error::differs(path, "nothing refers to the FIFO"));
    };
    // Reading and writing at once: no open of a FIFO waits for the other side then.
    let anchor = fdinfo::reopen(reference, libc::O_RDWR | libc::O_NONBLOCK)
        .during("open once more", path)?;
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
            let fd = fdinfo::reopen(reference, access | libc::O_NONBLOCK)
                .during("open once more", path)?;
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
