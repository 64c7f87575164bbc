//! Processes and threads of the replica: as many as the service has, under the same numbers.

use super::ReplicaError;
use super::calls::{Calls, Expect};
use super::memory::unmap_all;
use crate::{HostTid, Process, Stopped, TraceError};
use unbroken_image::{Birth, Pid, Tid};
use unbroken_sys::signal;
use unbroken_sys::wait::wait;

/// Stage init, in the namespace of the service.
pub(super) const INIT: Pid = Pid(1);

/// What a thread of a process shares with the others (`pthread_create(3)`).
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;

/// linux/rseq.h
const RSEQ_FLAG_UNREGISTER: u64 = 1;

/// linux/membarrier.h: what a process must have registered before it may ask for each kind. Done
/// for all: it is harmless, the kernel has no other way to carry it over, and it is cheap only
/// while there is one thread.
const MEMBARRIER_REGISTRATIONS: [u64; 4] = [1 << 2, 1 << 4, 1 << 6, 1 << 8];

/// Adds a call that makes thread or process `number`, which stands still in its first stop.
fn clone(
    calls: &mut Calls<'_, '_>,
    flags: u64,
    signal: i32,
    number: i32,
) -> Result<(), ReplicaError> {
    let numbers = calls.words(&[u64::from(number.unsigned_abs())])?;
    let expect = Expect::Value(u64::from(number.unsigned_abs()));
    clone_as(calls, flags, signal, (numbers.0, 1), expect)
}

/// The same with its number from the list `numbers` (address and length), or the kernel's choice
/// from an empty one.
fn clone_as(
    calls: &mut Calls<'_, '_>,
    flags: u64,
    signal: i32,
    numbers: (u64, u64),
    expect: Expect,
) -> Result<(), ReplicaError> {
    // struct clone_args (linux/sched.h): flags, pidfd, child_tid, parent_tid, exit_signal, stack,
    // stack_size, tls, set_tid, set_tid_size, cgroup. Without a stack the new thread shares its
    // maker's, which the blob does not use.
    let (numbers, count) = numbers;
    let arguments = [flags, 0, 0, 0, signal as u64, 0, 0, 0, numbers, count, 0];
    let arguments = calls.words(&arguments)?;
    calls
        .add("clone3", libc::SYS_clone3, &[arguments.0, 11 * 8], expect)
        .map(drop)
}

/// Makes the first process, a fork of stage init, as empty as a process can be.
pub(super) fn empty_first(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    channel: u64,
) -> Result<(), ReplicaError> {
    let sequence = stopped.restartable_sequence(leader)?;
    let mut calls = Calls::new(stopped, leader);
    if let Some(area) = sequence {
        // The kernel would write to it at the next switch, and kill for its absence.
        let arguments = [
            area.address,
            u64::from(area.length_bytes),
            RSEQ_FLAG_UNREGISTER,
            u64::from(area.signature),
        ];
        calls.add("rseq", libc::SYS_rseq, &arguments, Expect::Success)?;
    }
    calls.add(
        "set_tid_address",
        libc::SYS_set_tid_address,
        &[0],
        Expect::Success,
    )?;
    calls.add(
        "set_robust_list",
        libc::SYS_set_robust_list,
        &[0, 24],
        Expect::Success,
    )?;
    for command in MEMBARRIER_REGISTRATIONS {
        calls.add(
            "membarrier",
            libc::SYS_membarrier,
            &[command, 0, 0],
            Expect::Anything,
        )?;
    }
    for (first, last) in [(0, channel - 1), (channel + 1, u64::from(u32::MAX))] {
        let arguments = [first, last, 0];
        calls.add(
            "close_range",
            libc::SYS_close_range,
            &arguments,
            Expect::Success,
        )?;
    }
    calls.run()?;
    unmap_all(stopped, leader)
}

/// Makes an empty process. Its parent stands already, or is stage init.
///
/// The session of a daemon, and often its group, are of a process that has ended: that one is made
/// for a moment, so that there is something to be forked from (KERNEL.md, Sessions and groups).
pub(super) fn create_process(stopped: &mut Stopped<'_>, birth: Birth) -> Result<(), ReplicaError> {
    let mut maker = Maker::of_child_of(stopped, birth.parent)?;
    let mut of_the_dead = Vec::new();
    if birth.session != birth.pid {
        if session_of(stopped, maker.pid)? != birth.session {
            maker = maker.replaced_by(stopped, birth.session)?;
            open_session(stopped, maker.pid)?;
            of_the_dead.push(maker.pid);
        }
        let group = birth.process_group;
        if group != birth.pid && !group_stands(stopped, maker.pid, group)? {
            maker = maker.replaced_by(stopped, group)?;
            join_group(stopped, group, group)?;
            of_the_dead.push(group);
        }
    }
    fork(stopped, maker, birth.pid)?;
    if birth.session == birth.pid {
        open_session(stopped, birth.pid)?;
    } else {
        join_group(stopped, birth.pid, birth.process_group)?;
    }
    for pid in of_the_dead {
        end_process(stopped, pid)?;
    }
    let leader = stopped.process(birth.pid)?.leader();
    unmap_all(stopped, leader)
}

/// Who forks a process, and whether as a child or as a sibling.
#[derive(Clone, Copy)]
struct Maker {
    pid: Pid,
    as_sibling: bool,
}

impl Maker {
    /// Stage init makes nothing more: a child of its own does it, as its sibling.
    fn of_child_of(stopped: &Stopped<'_>, parent: Pid) -> Result<Maker, ReplicaError> {
        let as_sibling = parent == INIT;
        let is_maker = |process: &&Process| match as_sibling {
            true => process.parent == INIT,
            false => process.pid == parent,
        };
        let maker = stopped.processes().find(is_maker);
        let maker = maker.ok_or(ReplicaError::UnknownProcess { pid: parent })?;
        Ok(Maker {
            pid: maker.pid,
            as_sibling,
        })
    }

    /// Makes process `pid`, whose siblings the next ones are.
    fn replaced_by(self, stopped: &mut Stopped<'_>, pid: Pid) -> Result<Maker, ReplicaError> {
        fork(stopped, self, pid)?;
        Ok(Maker {
            pid,
            as_sibling: true,
        })
    }
}

/// Makes a process the leader of a session of its own, if it is not.
pub(super) fn open_session(stopped: &mut Stopped<'_>, pid: Pid) -> Result<(), ReplicaError> {
    let leader = stopped.process(pid)?.leader();
    let mut calls = Calls::new(stopped, leader);
    // EPERM: it is one already.
    calls.add("setsid", libc::SYS_setsid, &[], Expect::Anything)?;
    calls.run().map(drop)
}

fn session_of(stopped: &mut Stopped<'_>, pid: Pid) -> Result<Pid, ReplicaError> {
    let leader = stopped.process(pid)?.leader();
    let mut calls = Calls::new(stopped, leader);
    calls.add("getsid", libc::SYS_getsid, &[0], Expect::Success)?;
    let values = calls.run()?;
    Ok(Pid(values.first().copied().unwrap_or(0) as i32))
}

/// Whether a process group has any member, as process `asker` sees it.
fn group_stands(stopped: &mut Stopped<'_>, asker: Pid, group: Pid) -> Result<bool, ReplicaError> {
    let leader = stopped.process(asker)?.leader();
    let mut calls = Calls::new(stopped, leader);
    let members = i64::from(-group.0).cast_unsigned();
    // Signal 0 only asks (kill(2)).
    calls.add("kill", libc::SYS_kill, &[members, 0], Expect::Anything)?;
    Ok(calls.run()?.first() == Some(&0))
}

/// Moves process `pid` into a process group, which it may thereby open.
fn join_group(stopped: &mut Stopped<'_>, pid: Pid, group: Pid) -> Result<(), ReplicaError> {
    let leader = stopped.process(pid)?.leader();
    let mut calls = Calls::new(stopped, leader);
    let arguments = [0, u64::from(group.0.unsigned_abs())];
    calls.add("setpgid", libc::SYS_setpgid, &arguments, Expect::Success)?;
    calls.run().map(drop)
}

fn fork(stopped: &mut Stopped<'_>, maker: Maker, pid: Pid) -> Result<(), ReplicaError> {
    let leader = stopped.process(maker.pid)?.leader();
    let mut calls = Calls::new(stopped, leader);
    if maker.as_sibling {
        // The signal is then the maker's own (clone(2), CLONE_PARENT).
        clone(&mut calls, libc::CLONE_PARENT as u64, 0, pid.0)?;
    } else {
        clone(&mut calls, 0, libc::SIGCHLD, pid.0)?;
    }
    calls.run()?;
    stopped.tree.discard_events();
    Ok(())
}

/// Makes a thread in the process of `leader`.
pub(super) fn create_thread(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    tid: Tid,
) -> Result<(), ReplicaError> {
    let mut calls = Calls::new(stopped, leader);
    clone(&mut calls, THREAD_FLAGS, 0, tid.0)?;
    calls.run()?;
    Ok(())
}

/// Makes a thread that the service has not, under any number that is free.
pub(super) fn create_passing_thread(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
) -> Result<Tid, ReplicaError> {
    let mut calls = Calls::new(stopped, leader);
    clone_as(&mut calls, THREAD_FLAGS, 0, (0, 0), Expect::Success)?;
    let values = calls.run()?;
    Ok(Tid(values.first().copied().unwrap_or(0) as i32))
}

/// Ends a thread that is not its process's first.
pub(super) fn end_thread(stopped: &mut Stopped<'_>, tid: HostTid) -> Result<(), ReplicaError> {
    let mut calls = Calls::new(stopped, tid);
    calls.add("exit", libc::SYS_exit, &[0], Expect::Anything)?;
    match calls.run() {
        Ok(_) | Err(ReplicaError::Trace(TraceError::Died { .. })) => {}
        Err(error) => return Err(error),
    }
    Ok(stopped.tree.settle()?)
}

/// Ends a process and waits until it is gone.
pub(super) fn end_process(stopped: &mut Stopped<'_>, pid: Pid) -> Result<(), ReplicaError> {
    let host_pid = stopped.process(pid)?.host_pid;
    signal::to_process(host_pid.0, libc::SIGKILL).map_err(ReplicaError::own("end a process"))?;
    let tree = &mut *stopped.tree;
    while tree.process(pid).is_some() {
        let report = wait(-1).map_err(ReplicaError::own("wait for the end of a process"))?;
        let Some(report) = report else { break };
        tree.handle(report, true)?;
        tree.release_held()?;
    }
    tree.discard_events();
    Ok(())
}
