//! Bringing a filled replica to life: everything that could not stand before, in an order in which
//! nothing undoes or needs what comes later (KERNEL.md, Order of a revival).

use super::ProcessReplica;
use super::ReplicaError;
use super::attributes::{set_attributes, set_resources};
use super::calls::{Calls, Expect, for_each};
use super::timers::{self, Clock};
use crate::{HostTid, Stopped, blob, survey};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use unbroken_image::{Pid, ProcessState, SignalAction, SignalInfo, ThreadState};

const SIGNAL_SET_BYTES: u64 = 8;
const SIGTRAP_BIT: u64 = 1 << (libc::SIGTRAP - 1);

/// Does it for every process, parents first. Leaves all threads stopped, their registers loaded.
pub(super) fn go_live(
    stopped: &mut Stopped<'_>,
    processes: &BTreeMap<Pid, ProcessReplica>,
    now_ns: u64,
) -> Result<(), ReplicaError> {
    // What is left of a timer is counted from when it is armed, which is milliseconds from now: a
    // rest as of now would move the deadline with each takeover.
    let clock = Clock::at(now_ns);
    for (&pid, process) in processes {
        let state = process.state.as_ref().ok_or(ReplicaError::Incomplete {
            what: "process state",
            tid: unbroken_image::Tid(pid.0),
        })?;
        go_live_process(stopped, pid, process, state, &clock)?;
    }
    Ok(())
}

fn go_live_process(
    stopped: &mut Stopped<'_>,
    pid: Pid,
    process: &ProcessReplica,
    state: &ProcessState,
    clock: &Clock,
) -> Result<(), ReplicaError> {
    let standing = stopped.process(pid)?;
    let leader = standing.leader();
    let threads: Vec<(HostTid, &ThreadState)> = standing
        .threads()
        .filter_map(|thread| Some((thread.host_tid, process.threads.get(&thread.tid)?)))
        .collect();
    process.memory.lock(stopped, leader)?;
    set_signal_actions(stopped, leader, &state.signal_actions)?;
    set_process_state(stopped, leader, state)?;
    timers::create(stopped, leader, &state.posix_timers)?;
    adjust_out_of_memory_score(leader, state.oom_score_adjust)?;
    set_coredump_filter(leader, state.coredump_filter)?;
    for &(tid, thread) in &threads {
        if let Some(attributes) = &thread.attributes {
            stopped.set_stack_disarms_itself(tid, attributes.alternate_stack.disarms_itself);
            set_resources(stopped, tid, attributes)?;
            set_attributes(stopped, tid, attributes, &state.credentials)?;
        }
    }
    // A change of credentials has cleared it (kernel/cred.c, commit_creds).
    set_dumpable(stopped, leader, state.dumpable)?;
    for &(tid, thread) in &threads {
        // Nothing is delivered before all is in place; the traps of the blob must be.
        stopped.set_signal_mask(tid, !SIGTRAP_BIT)?;
        queue_signals(stopped, tid, &thread.pending, |calls, signal, info| {
            let arguments = [pid.0 as u64, thread.tid.0 as u64, signal, info];
            calls.add(
                "rt_tgsigqueueinfo",
                libc::SYS_rt_tgsigqueueinfo,
                &arguments,
                Expect::Success,
            )
        })?;
    }
    queue_signals(
        stopped,
        leader,
        &state.shared_pending,
        |calls, signal, info| {
            let arguments = [pid.0 as u64, signal, info];
            calls.add(
                "rt_sigqueueinfo",
                libc::SYS_rt_sigqueueinfo,
                &arguments,
                Expect::Success,
            )
        },
    )?;
    timers::arm(stopped, leader, pid, state, clock)?;
    adopt_signals(stopped, pid, leader, state)?;
    for &(tid, thread) in &threads {
        if let Some(extended) = &thread.extended_state {
            stopped.set_extended_state(tid, extended)?;
        }
        stopped.set_signal_mask(tid, thread.signal_mask)?;
        stopped.set_image_registers(tid, &thread.registers, thread.blocked_call)?;
    }
    Ok(())
}

/// All signals but two that have no action, and SIGTRAP, which the blob still needs.
fn set_signal_actions(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    actions: &[SignalAction],
) -> Result<(), ReplicaError> {
    let actions: Vec<(i32, SignalAction)> = (1..).zip(actions.iter().copied()).collect();
    for_each(
        stopped,
        leader,
        &actions,
        |calls, &(signal, action)| match signal {
            libc::SIGKILL | libc::SIGSTOP | libc::SIGTRAP => Ok(()),
            _ => set_signal_action(calls, signal, action),
        },
    )
}

fn set_signal_action(
    calls: &mut Calls<'_, '_>,
    signal: i32,
    action: SignalAction,
) -> Result<(), ReplicaError> {
    let SignalAction {
        handler,
        flags,
        restorer,
        mask,
    } = action;
    let action = calls.words(&[handler, flags, restorer, mask])?;
    let arguments = [signal as u64, action.0, 0, SIGNAL_SET_BYTES];
    calls
        .add(
            "rt_sigaction",
            libc::SYS_rt_sigaction,
            &arguments,
            Expect::Success,
        )
        .map(drop)
}

/// The action of SIGTRAP, and which signal the blob may use from now on.
///
/// A trap in a process that ignores SIGTRAP makes the kernel forget that (kernel/signal.c,
/// force_sig_info_to_task), so this call must be the one after which there are no more traps: it
/// is made by the way for live processes.
fn adopt_signals(
    stopped: &mut Stopped<'_>,
    pid: Pid,
    leader: HostTid,
    state: &ProcessState,
) -> Result<(), ReplicaError> {
    let handled = survey::handled_signals(&state.signal_actions);
    let process = stopped.process(pid)?;
    let host_pid = process.host_pid;
    let vdso = blob::find_vdso(host_pid, process.memory())?;
    stopped
        .tree
        .set_notice(host_pid, blob::notice_for(handled), vdso);
    let action = state
        .signal_actions
        .get(libc::SIGTRAP as usize - 1)
        .copied()
        .unwrap_or_default();
    if action == SignalAction::default() {
        return Ok(());
    }
    let SignalAction {
        handler,
        flags,
        restorer,
        mask,
    } = action;
    let mut batch = stopped.remote(leader);
    let words = [handler, flags, restorer, mask];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let action = batch.scratch(&bytes)?;
    let call = batch.call(
        libc::SYS_rt_sigaction,
        &[libc::SIGTRAP as u64, action.0, 0, SIGNAL_SET_BYTES],
    )?;
    let results = batch.run()?;
    results
        .get(call)
        .map(drop)
        .map_err(|source| ReplicaError::Call {
            call: "rt_sigaction",
            tid: leader,
            source,
        })
}

fn set_process_state(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    state: &ProcessState,
) -> Result<(), ReplicaError> {
    for_each(
        stopped,
        leader,
        &(0u64..).zip(&state.limits).collect::<Vec<_>>(),
        |calls, &(resource, &(soft, hard))| {
            let limit = calls.words(&[soft, hard])?;
            let arguments = [0, resource, limit.0, 0];
            calls
                .add(
                    "prlimit64",
                    libc::SYS_prlimit64,
                    &arguments,
                    Expect::Success,
                )
                .map(drop)
        },
    )?;
    let mut calls = Calls::new(stopped, leader);
    let on = u64::from;
    let group = state.process_group as u64;
    // A group whose leader has ended cannot be joined.
    calls.add("setpgid", libc::SYS_setpgid, &[0, group], Expect::Anything)?;
    calls.add(
        "umask",
        libc::SYS_umask,
        &[u64::from(state.umask)],
        Expect::Success,
    )?;
    let personality = [u64::from(state.personality)];
    calls.add(
        "personality",
        libc::SYS_personality,
        &personality,
        Expect::Success,
    )?;
    let huge_pages_disabled = u64::from(state.huge_pages_disabled);
    for (option, value, flags) in [
        (libc::PR_SET_CHILD_SUBREAPER, on(state.child_subreaper), 0),
        (
            libc::PR_SET_THP_DISABLE,
            huge_pages_disabled & 1,
            huge_pages_disabled & !1,
        ),
    ] {
        let arguments = [option as u64, value, flags, 0, 0];
        calls.add("prctl", libc::SYS_prctl, &arguments, Expect::Success)?;
    }
    // Needs a capability that the service had when it asked for it.
    if state.memory_merge {
        let arguments = [libc::PR_SET_MEMORY_MERGE as u64, 1, 0, 0, 0];
        calls.add(
            "prctl(PR_SET_MEMORY_MERGE)",
            libc::SYS_prctl,
            &arguments,
            Expect::Success,
        )?;
    }
    calls.run().map(drop)
}

/// Lowering it needs a capability that root may lack; the default of the other then stays.
fn adjust_out_of_memory_score(leader: HostTid, score: i32) -> Result<(), ReplicaError> {
    let path = format!("/proc/{leader}/oom_score_adj");
    let is = std::fs::read_to_string(&path).unwrap_or_default();
    if is.trim() == score.to_string() {
        return Ok(());
    }
    match std::fs::write(&path, score.to_string()) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        other => other.map_err(ReplicaError::own("write oom_score_adj")),
    }
}

fn set_coredump_filter(leader: HostTid, filter: Option<u32>) -> Result<(), ReplicaError> {
    let Some(filter) = filter else {
        return Ok(());
    };
    std::fs::write(
        format!("/proc/{leader}/coredump_filter"),
        format!("{filter:#x}"),
    )
    .map_err(ReplicaError::own("write coredump_filter"))
}

fn set_dumpable(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    dumpable: i32,
) -> Result<(), ReplicaError> {
    // 2, "for root only", is what the change of credentials leaves; it cannot be asked for.
    if !matches!(dumpable, 0 | 1) {
        return Ok(());
    }
    let mut calls = Calls::new(stopped, leader);
    let arguments = [libc::PR_SET_DUMPABLE as u64, dumpable as u64, 0, 0, 0];
    calls.add(
        "prctl(PR_SET_DUMPABLE)",
        libc::SYS_prctl,
        &arguments,
        Expect::Success,
    )?;
    calls.run().map(drop)
}

/// Queues signals as they were, by `send`. Only the process itself may claim that a signal came
/// from the kernel (rt_sigqueueinfo(2)).
fn queue_signals(
    stopped: &mut Stopped<'_>,
    tid: HostTid,
    signals: &[SignalInfo],
    send: impl Fn(&mut Calls<'_, '_>, u64, u64) -> Result<crate::BatchedCall, ReplicaError>,
) -> Result<(), ReplicaError> {
    for_each(stopped, tid, signals, |calls, signal| {
        let info = calls.bytes(&signal.0)?;
        send(calls, signal.signal() as u64, info.0).map(drop)
    })
}
