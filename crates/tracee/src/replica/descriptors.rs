//! The descriptor table of a process of the replica.
//!
//! While it waits it holds nothing but its end of a channel. At a takeover descriptors come over
//! that channel, many in one message, each into the lowest free slot: sent in the order of their
//! numbers, with fillers for the free ones between, they land where they belong.

use super::ReplicaError;
use super::calls::{Calls, Expect};
use crate::{HostTid, RemoteAddr, Stopped};
use std::os::fd::BorrowedFd;
use unbroken_image::Fd;
use unbroken_image::object::FileLock;
use unbroken_sys::channel::{Channel, DESCRIPTORS_MAX};
use unbroken_sys::process;

/// Where a waiting process has its end of the channel.
pub const STUB_CHANNEL: i32 = 255;

/// Fillers that are cheaper than a process of their own for what lies behind them.
const FILLERS_MAX: i32 = 256;

/// Messages under way at once: a socket's send buffer holds more than this many.
const MESSAGES_MAX: usize = 24;

/// One descriptor for a process: its number, what it names, and whether exec closes it.
pub type Installed<'a> = (Fd, BorrowedFd<'a>, bool);

/// The control part of one message: struct cmsghdr and the numbers.
const CONTROL_BYTES: usize = 16 + (DESCRIPTORS_MAX * 4).next_multiple_of(8);

/// That of a message with one.
const CONTROL_OF_ONE_BYTES: usize = 16 + 8;

/// Gives a process one descriptor, which lands in its lowest free slot.
pub(super) fn give(
    calls: &mut Calls<'_, '_>,
    channel: &Channel,
    descriptor: BorrowedFd<'_>,
) -> Result<(), ReplicaError> {
    // What does not fit into this batch is tried again in the next, so the message is sent when its
    // receiver stands.
    let control = calls.reserve(CONTROL_OF_ONE_BYTES)?;
    let from = i64::from(STUB_CHANNEL) as u64;
    receive_from(calls, from, (control, CONTROL_OF_ONE_BYTES))?;
    channel
        .send(b"m", &[descriptor])
        .map_err(ReplicaError::own("send a descriptor"))
}

fn receive_from(
    calls: &mut Calls<'_, '_>,
    channel: u64,
    (control, control_bytes): (RemoteAddr, usize),
) -> Result<(), ReplicaError> {
    let data = calls.reserve(8)?;
    let part = calls.words(&[data.0, 8])?;
    // struct msghdr: name, its length, parts, their number, control, its length, flags.
    let message = calls.words(&[0, 0, part.0, 1, control.0, control_bytes as u64, 0])?;
    let arguments = [channel, message.0, 0];
    calls
        .add("recvmsg", libc::SYS_recvmsg, &arguments, Expect::Value(1))
        .map(drop)
}

/// Lays `wanted`, sorted by number, into the empty table of a process, and takes its end of the
/// channel away.
pub(super) fn install(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    channel: &Channel,
    wanted: &[Installed<'_>],
) -> Result<(), ReplicaError> {
    let highest = wanted.last().map_or(0, |(fd, ..)| fd.0);
    let own = move_channel(stopped, leader, highest)?;
    let mut rest = wanted;
    // Everything below is taken.
    let mut next = 0;
    while let Some((first, ..)) = rest.first() {
        if first.0 - next > FILLERS_MAX {
            rest = install_far(stopped, leader, channel, own, next, rest)?;
        } else {
            (rest, next) = install_near(stopped, leader, channel, own, next, rest)?;
        }
    }
    close_unwanted(stopped, leader, wanted, own)
}

/// Lets the table of a process grow ahead of a takeover, so that numbers up to `highest` and the
/// channel behind them fit. A table that several threads share grows only when every processor has
/// passed through the scheduler (fs/file.c, expand_fdtable), which takes some 15 ms. Returns what
/// fits now: numbers below it.
pub(super) fn make_room(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    highest: i32,
) -> Result<i32, ReplicaError> {
    // Tables grow to powers of two.
    let needed = highest.max(STUB_CHANNEL).unsigned_abs() + 2;
    let last = needed.next_power_of_two() - 1;
    let place = u64::from(last);
    // A process that may not have so many says so at the takeover, if it has to.
    let limit = limit_of(leader)?;
    if place < limit {
        let mut calls = Calls::new(stopped, leader);
        duplicate_channel(&mut calls, limit, place)?;
        calls.add("close", libc::SYS_close, &[place], Expect::Success)?;
        calls.run()?;
    }
    Ok(last.cast_signed())
}

/// Makes room for numbers up to `highest`, the channel behind them.
fn move_channel(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    highest: i32,
) -> Result<u64, ReplicaError> {
    let limit = limit_of(leader)?;
    let place = u64::from(highest.max(STUB_CHANNEL).unsigned_abs()) + 1;
    if place >= limit {
        return Err(ReplicaError::TooManyDescriptors {
            missing: place,
            limit,
        });
    }
    let mut calls = Calls::new(stopped, leader);
    duplicate_channel(&mut calls, limit, place)?;
    let from = i64::from(STUB_CHANNEL) as u64;
    calls.add("close", libc::SYS_close, &[from], Expect::Success)?;
    calls.run()?;
    Ok(place)
}

fn limit_of(leader: HostTid) -> Result<u64, ReplicaError> {
    let (_, limit) = process::limit(leader.0, libc::RLIMIT_NOFILE)
        .map_err(ReplicaError::own("read the limit of open files"))?;
    Ok(limit)
}

/// The channel appears under `place`, too, which is free and below `limit`, the highest that the
/// process may set.
fn duplicate_channel(
    calls: &mut Calls<'_, '_>,
    limit: u64,
    place: u64,
) -> Result<(), ReplicaError> {
    let raised = calls.words(&[limit, limit])?;
    let arguments = [0, u64::from(libc::RLIMIT_NOFILE), raised.0, 0];
    calls.add(
        "prlimit64",
        libc::SYS_prlimit64,
        &arguments,
        Expect::Success,
    )?;
    let arguments = [i64::from(STUB_CHANNEL) as u64, libc::F_DUPFD as u64, place];
    calls.add(
        "fcntl(F_DUPFD)",
        libc::SYS_fcntl,
        &arguments,
        Expect::Value(place),
    )?;
    Ok(())
}

/// Lays down a run of descriptors with few holes. Returns what is left and the next free number.
fn install_near<'a, 'fd>(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    channel: &Channel,
    own: u64,
    mut next: i32,
    wanted: &'a [Installed<'fd>],
) -> Result<(&'a [Installed<'fd>], i32), ReplicaError> {
    let mut rest = wanted;
    let mut calls = Calls::new(stopped, leader);
    let control = calls.reserve(CONTROL_BYTES)?;
    for _ in 0..MESSAGES_MAX {
        let mut message = Vec::with_capacity(DESCRIPTORS_MAX);
        while let Some((fd, descriptor, _)) = rest.first()
            && message.len() < DESCRIPTORS_MAX
            && fd.0 - next <= FILLERS_MAX
        {
            message.push(*descriptor);
            if fd.0 == next {
                rest = &rest[1..];
            }
            next += 1;
        }
        if message.is_empty() {
            break;
        }
        receive_from(&mut calls, own, (control, CONTROL_BYTES))?;
        channel
            .send(b"d", &message)
            .map_err(ReplicaError::own("send descriptors"))?;
    }
    calls.run()?;
    Ok((rest, next))
}

/// Lays down descriptors that are far from `next`, the lowest free number: they come there and
/// are moved.
fn install_far<'a, 'fd>(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    channel: &Channel,
    own: u64,
    next: i32,
    wanted: &'a [Installed<'fd>],
) -> Result<&'a [Installed<'fd>], ReplicaError> {
    // As many as fit before the first of them, and into one batch.
    let count = wanted.len().min(64);
    let (now, rest) = wanted.split_at(count);
    let message: Vec<BorrowedFd<'_>> = now.iter().map(|(_, descriptor, _)| *descriptor).collect();
    let mut calls = Calls::new(stopped, leader);
    let control = calls.reserve(CONTROL_BYTES)?;
    receive_from(&mut calls, own, (control, CONTROL_BYTES))?;
    for (came, (fd, ..)) in (next..).zip(now) {
        let (from, to) = (came as u64, fd.0 as u64);
        calls.add("dup2", libc::SYS_dup2, &[from, to], Expect::Value(to))?;
    }
    let last = next as u64 + count as u64 - 1;
    let arguments = [next as u64, last, 0];
    calls.add(
        "close_range",
        libc::SYS_close_range,
        &arguments,
        Expect::Success,
    )?;
    channel
        .send(b"d", &message)
        .map_err(ReplicaError::own("send descriptors"))?;
    calls.run()?;
    Ok(rest)
}

/// Closes the fillers and the channel, and marks what exec closes.
fn close_unwanted(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    wanted: &[Installed<'_>],
    own: u64,
) -> Result<(), ReplicaError> {
    enum Last {
        Close(u64, u64),
        Mark(u64),
    }
    let mut last = Vec::new();
    let mut next = 0;
    for (fd, _, close_on_exec) in wanted {
        let number = fd.0 as u64;
        if next < number {
            last.push(Last::Close(next, number - 1));
        }
        if *close_on_exec {
            last.push(Last::Mark(number));
        }
        next = number + 1;
    }
    last.push(Last::Close(own, own));
    super::calls::for_each(stopped, leader, &last, |calls, item| {
        let (name, number, arguments) = match *item {
            Last::Close(first, last) => ("close_range", libc::SYS_close_range, [first, last, 0]),
            Last::Mark(fd) => {
                let set = [fd, libc::F_SETFD as u64, libc::FD_CLOEXEC as u64];
                ("fcntl(F_SETFD)", libc::SYS_fcntl, set)
            }
        };
        calls
            .add(name, number, &arguments, Expect::Success)
            .map(drop)
    })
}

/// Has the process itself take locks, which then are its own.
pub(super) fn lock_ranges(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    locks: &[(Fd, FileLock)],
) -> Result<Vec<(Fd, FileLock)>, ReplicaError> {
    let results = super::calls::values_of_each(stopped, leader, locks, |calls, (fd, lock)| {
        let kind = if lock.exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        };
        // struct flock: type and whence (SEEK_SET, 0) in the first word, start, length, pid.
        let range = calls.words(&[kind as u64, lock.start, lock.length_bytes, 0])?;
        let arguments = [fd.0 as u64, libc::F_SETLK as u64, range.0];
        calls
            .add(
                "fcntl(F_SETLK)",
                libc::SYS_fcntl,
                &arguments,
                Expect::Anything,
            )
            .map(drop)
    })?;
    let mut taken = Vec::new();
    for (&(fd, lock), result) in locks.iter().zip(results) {
        let errno = -(result as i64) as i32;
        match errno {
            ..=0 => {}
            // fcntl(2): either means that another holds it.
            libc::EAGAIN | libc::EACCES => taken.push((fd, lock)),
            _ => {
                return Err(ReplicaError::Call {
                    call: "fcntl(F_SETLK)",
                    tid: leader,
                    source: std::io::Error::from_raw_os_error(errno),
                });
            }
        }
    }
    Ok(taken)
}
