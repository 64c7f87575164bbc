//! memfds.

use crate::methods::{Capture, Event, Look, Means, Methods, Pollable, Reading};
use crate::restored::{Batch, Phase, Restored, Scene, make_each};
use crate::{Context, Error, description};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::MemoryFile;
use unbroken_image::{FileIdentity, Object};
use unbroken_sys::{descriptor, fdinfo, memfd, timer};

const PREFIX: &str = "/memfd:";
const SUFFIX: &str = " (deleted)";

// include/uapi/linux/fcntl.h
const F_SEAL_EXEC: i32 = 0x0020;
// include/uapi/linux/memfd.h
const MFD_NOEXEC_SEAL: u32 = 0x0008;

pub(crate) const METHODS: Methods = Methods {
    pollable: Pollable::No,
    is_volatile: |_| true,
    look,
    stale_after: |_| Some(Event::MemoryMapChanged),
    ..Methods::new(
        Capture::Descriptor(|reading, fd, means| {
            reading.state = Some(Object::MemoryFile(capture(fd)?));
            reading.watches.open(&means.holders)?;
            reading.watches.refer(&means.holders)
        }),
        &[(Phase::Make, make), (Phase::Mapped, seal_all)],
    )
};

/// No call that writes to a memfd is announced, but the time of change tells of all.
fn look(reading: &mut Reading, _: &mut Means<'_>) -> Result<Look, Error> {
    if reading.watches.read()? {
        return Ok(Look::Unknown);
    }
    match reading.watches.status()? {
        Some((now, before))
            if now.length_bytes == before.length_bytes
                && now.changed_ns == before.changed_ns
                && !is_recent(now.changed_ns) =>
        {
            Ok(Look::Same)
        }
        _ => Ok(Look::Unknown),
    }
}

/// Whether another change could still carry the same time: before multigrain timestamps (Linux
/// 6.13) two changes within one tick of the clock, at most 10 ms, look alike.
fn is_recent(changed_ns: i64) -> bool {
    const TICK_NS: i64 = 10_000_000;
    match timer::now_ns(libc::CLOCK_REALTIME).map(i64::try_from) {
        Ok(Ok(now_ns)) => now_ns - changed_ns < TICK_NS,
        _ => true,
    }
}

/// Reads out a descriptor of ours that names a memfd.
pub fn capture(fd: BorrowedFd<'_>) -> Result<MemoryFile, Error> {
    let path = description::path_of(fd)?;
    let flags = descriptor::status_flags(fd).during("read the flags of", &path)?;
    description::refuse_ownership(fd, flags, &path)?;
    let status = descriptor::status(fd).during("look at", &path)?;
    let name = path
        .strip_prefix(PREFIX)
        .and_then(|name| name.strip_suffix(SUFFIX));
    let position = description::position_of(fd, flags, &path)?;
    Ok(MemoryFile {
        name: name.unwrap_or_default().to_owned(),
        identity: FileIdentity {
            device: status.device,
            inode: status.inode,
        },
        flags,
        ownership: description::ownership_of(&status),
        position,
        length_bytes: status.length_bytes,
        seals: memfd::seals(fd).during("read the seals of", &path)?,
        content: read_content(fd, position, &path)?,
    })
}

/// Looking for data moves the position, which the service shares: it is put back in every case.
fn read_content(
    fd: BorrowedFd<'_>,
    position: u64,
    path: &str,
) -> Result<Vec<(u64, Vec<u8>)>, Error> {
    let content = read_extents(fd, path);
    let offset = i64::try_from(position).unwrap_or(0);
    descriptor::seek(fd, offset, libc::SEEK_SET).during("put back the position of", path)?;
    content
}

fn read_extents(fd: BorrowedFd<'_>, path: &str) -> Result<Vec<(u64, Vec<u8>)>, Error> {
    let mut extents = Vec::new();
    let mut at = 0i64;
    loop {
        let start = match descriptor::seek(fd, at, libc::SEEK_DATA) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(extents),
            other => other.during("find the data of", path)?,
        };
        let end =
            descriptor::seek(fd, start as i64, libc::SEEK_HOLE).during("find the data of", path)?;
        let mut bytes = vec![0; (end - start) as usize];
        read_all_at(fd, &mut bytes, start).during("read", path)?;
        extents.push((start, bytes));
        at = end as i64;
    }
}

fn read_all_at(fd: BorrowedFd<'_>, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match descriptor::read_at(fd, &mut bytes[done..], offset + done as u64)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(())
}

fn make(batch: &Batch<'_>, scene: &Scene, restored: &mut Restored) -> Result<(), Error> {
    make_each(batch, restored, |id, object| match object {
        Object::MemoryFile(state) => {
            let existing = scene.memory_files.get(&id).map(AsFd::as_fd);
            restore(state, existing).map(Some)
        }
        _ => Ok(None),
    })
}

/// A mapping that was made before could be written through, which the kernel does not allow beside a
/// seal against writes. The service is better off without the seal than without its replica.
fn seal_all(batch: &Batch<'_>, _: &Scene, restored: &mut Restored) -> Result<(), Error> {
    for (id, object) in batch {
        if let (Object::MemoryFile(state), Some(descriptor)) =
            (object, restored.descriptors.get(id))
            && let Err(error) = seal(descriptor.as_fd(), state)
        {
            restored
                .shortcomings
                .push(format!("without its seals: {error}"));
        }
    }
    Ok(())
}

/// Makes the memfd, or opens once more the one in `existing`: the memory of the replica has made
/// it already when it is mapped, and descriptions of one memfd share it. The seals come last, by
/// [`seal`], when all content and all mappings are there.
pub fn restore(state: &MemoryFile, existing: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    let name = &state.name;
    let fd = match existing {
        Some(existing) => {
            description::set_ownership(existing, state.ownership, name)?;
            fdinfo::reopen(existing, description::open_flags(state.flags))
                .during("open once more the memfd", name)?
        }
        None => create(state)?,
    };
    description::set_position(fd.as_fd(), state.flags, state.position, name)?;
    Ok(fd)
}

fn create(state: &MemoryFile) -> Result<OwnedFd, Error> {
    let name = &state.name;
    let no_execute = if state.seals & F_SEAL_EXEC != 0 {
        MFD_NOEXEC_SEAL
    } else {
        0
    };
    let path = fdinfo::c_path(name).during("create the memfd", name)?;
    // Without MFD_ALLOW_SEALING it would be sealed against seals from the start; `seal` adds that.
    let fd = memfd::create(&path, libc::MFD_ALLOW_SEALING | no_execute)
        .during("create the memfd", name)?;
    descriptor::truncate(fd.as_fd(), state.length_bytes).during("size the memfd", name)?;
    description::set_ownership(fd.as_fd(), state.ownership, name)?;
    for (start, bytes) in &state.content {
        let mut done = 0;
        while done < bytes.len() {
            done += descriptor::write_at(fd.as_fd(), &bytes[done..], start + done as u64)
                .during("fill the memfd", name)?;
        }
    }
    const WRITABLE: i32 = libc::O_RDWR;
    if state.flags & libc::O_ACCMODE == WRITABLE {
        // O_LARGEFILE and the like stay; only what F_SETFL can change is set.
        descriptor::set_status_flags(fd.as_fd(), state.flags).during("set the flags of", name)?;
        return Ok(fd);
    }
    fdinfo::reopen(fd.as_fd(), description::open_flags(state.flags)).during("open once more", name)
}

/// Puts the seals on, once for each memfd, after everything else. Returns at once when they are
/// there already, as they are for the second description of one memfd.
pub fn seal(fd: BorrowedFd<'_>, state: &MemoryFile) -> Result<(), Error> {
    let present = memfd::seals(fd).during("read the seals of the memfd", &state.name)?;
    let missing = state.seals & !present;
    if missing == 0 {
        return Ok(());
    }
    if descriptor::status_flags(fd).is_ok_and(|flags| flags & libc::O_ACCMODE == libc::O_RDONLY) {
        // Seals need a writable description, even where the service has none left.
        let writable = fdinfo::reopen(fd, libc::O_RDWR).during("open to seal", &state.name)?;
        return memfd::add_seals(writable.as_fd(), missing).during("seal the memfd", &state.name);
    }
    memfd::add_seals(fd, missing).during("seal the memfd", &state.name)
}
