//! What a thread of the replica has of its own, besides registers and signals.

use super::ReplicaError;
use super::calls::{Calls, Expect};
use crate::{HostTid, Stopped};
use unbroken_image::{AlternateStack, Credentials, OwnCredentials, Scheduling, ThreadAttributes};
use unbroken_sys::process;

/// linux/capability.h
const CAPABILITY_VERSION_3: u64 = 0x2008_0522;
/// Capabilities that exist in any kernel up to a word's worth.
const CAPABILITIES: u64 = 64;
/// linux/securebits.h: changes of user change no capabilities.
const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
/// linux/signal.h
const SS_DISABLE: i32 = 2;
const SS_ONSTACK: i32 = 1;
/// linux/prctl.h
const PR_SET_IO_FLUSHER: i32 = 57;
/// linux/ioprio.h
const IOPRIO_WHO_PROCESS: u64 = 1;
/// PR_SPEC_PRCTL of linux/prctl.h.
const SPECULATION_BY_CALL: i32 = 1;

/// What each thread has of its own. Credentials are among it for the kernel, whatever the C
/// library makes of it.
pub(super) fn set_attributes(
    stopped: &mut Stopped<'_>,
    tid: HostTid,
    attributes: &ThreadAttributes,
    credentials: &Credentials,
) -> Result<(), ReplicaError> {
    let mut calls = Calls::new(stopped, tid);
    let AlternateStack {
        address,
        flags,
        length_bytes,
        ..
    } = attributes.alternate_stack;
    // struct stack_t. That a handler runs on it now is a matter of the stack pointer.
    let flags = flags & !SS_ONSTACK;
    let size = if flags & SS_DISABLE != 0 {
        0
    } else {
        length_bytes
    };
    let stack = calls.words(&[address, u64::from(flags as u32), size])?;
    calls.add(
        "sigaltstack",
        libc::SYS_sigaltstack,
        &[stack.0, 0],
        Expect::Success,
    )?;
    let list = &attributes.robust_list;
    let arguments = [list.head, list.length_bytes.max(24)];
    calls.add(
        "set_robust_list",
        libc::SYS_set_robust_list,
        &arguments,
        Expect::Success,
    )?;
    let address = [attributes.clear_child_tid];
    calls.add(
        "set_tid_address",
        libc::SYS_set_tid_address,
        &address,
        Expect::Success,
    )?;
    let nice = [
        libc::PRIO_PROCESS as u64,
        0,
        i64::from(attributes.nice) as u64,
    ];
    calls.add("setpriority", libc::SYS_setpriority, &nice, Expect::Success)?;
    let Scheduling { policy, priority } = attributes.scheduling;
    if policy != libc::SCHED_OTHER {
        let parameters = calls.words(&[priority as u64])?;
        let arguments = [0, policy as u64, parameters.0];
        calls.add(
            "sched_setscheduler",
            libc::SYS_sched_setscheduler,
            &arguments,
            Expect::Success,
        )?;
    }
    let name = calls.string(&attributes.name)?;
    let prctl = |calls: &mut Calls<'_, '_>, option: i32, value: u64| {
        let arguments = [option as u64, value, 0, 0, 0];
        calls.add("prctl", libc::SYS_prctl, &arguments, Expect::Success)
    };
    prctl(&mut calls, libc::PR_SET_NAME, name.0)?;
    prctl(
        &mut calls,
        libc::PR_SET_TIMERSLACK,
        attributes.timer_slack_ns,
    )?;
    if let Some(area) = attributes.restartable_sequence {
        let arguments = [
            area.address,
            u64::from(area.length_bytes),
            u64::from(area.flags),
            u64::from(area.signature),
        ];
        calls.add("rseq", libc::SYS_rseq, &arguments, Expect::Success)?;
    }
    set_credentials(&mut calls, credentials, attributes.credentials)?;
    if attributes.no_new_privileges {
        prctl(&mut calls, libc::PR_SET_NO_NEW_PRIVS, 1)?;
    }
    // A change of credentials would have cleared it.
    prctl(
        &mut calls,
        libc::PR_SET_PDEATHSIG,
        attributes.parent_death_signal as u64,
    )?;
    calls.run().map(drop)
}

/// What few threads have. It needs rights that a change of credentials may take.
pub(super) fn set_resources(
    stopped: &mut Stopped<'_>,
    tid: HostTid,
    attributes: &ThreadAttributes,
) -> Result<(), ReplicaError> {
    let mut calls = Calls::new(stopped, tid);
    if attributes.io_priority != 0 {
        let arguments = [IOPRIO_WHO_PROCESS, 0, attributes.io_priority as u64];
        calls.add(
            "ioprio_set",
            libc::SYS_ioprio_set,
            &arguments,
            Expect::Success,
        )?;
    }
    if let Some(policy) = &attributes.memory_policy {
        let nodes = calls.words(&policy.nodes)?;
        // One bit less is read than it is told (mm/mempolicy.c, get_nodes).
        let bits = policy.nodes.len() as u64 * 64 + 1;
        let arguments = match policy.nodes.is_empty() {
            true => [policy.mode as u64, 0, 0],
            false => [policy.mode as u64, nodes.0, bits],
        };
        calls.add(
            "set_mempolicy",
            libc::SYS_set_mempolicy,
            &arguments,
            Expect::Success,
        )?;
    }
    let mut prctl = |option: i32, arguments: [u64; 2]| {
        let arguments = [option as u64, arguments[0], arguments[1], 0, 0];
        calls.add("prctl", libc::SYS_prctl, &arguments, Expect::Success)
    };
    if attributes.machine_check != libc::PR_MCE_KILL_DEFAULT {
        let how = attributes.machine_check as u64;
        prctl(libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET as u64, how])?;
    }
    if attributes.io_flusher {
        prctl(PR_SET_IO_FLUSHER, [1, 0])?;
    }
    for (kind, control) in (0u64..).zip(attributes.speculation) {
        // Without this bit the kernel has decided, for all alike. All of a replica began as we did.
        if control & SPECULATION_BY_CALL != 0 && control != process::speculation(kind) {
            let control = control & !SPECULATION_BY_CALL;
            prctl(libc::PR_SET_SPECULATION_CTRL, [kind, control as u64])?;
        }
    }
    calls.run().map(drop)
}

fn set_credentials(
    calls: &mut Calls<'_, '_>,
    credentials: &Credentials,
    own: OwnCredentials,
) -> Result<(), ReplicaError> {
    let prctl = |calls: &mut Calls<'_, '_>, option: i32, value: u64, more: u64| {
        let arguments = [option as u64, value, more, 0, 0];
        calls
            .add("prctl", libc::SYS_prctl, &arguments, Expect::Success)
            .map(drop)
    };
    let set = |calls: &mut Calls<'_, '_>, name, number, ids: &[u32], expect| {
        let arguments: Vec<u64> = ids.iter().map(|&id| u64::from(id)).collect();
        calls.add(name, number, &arguments, expect).map(drop)
    };
    prctl(calls, libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0)?;
    for capability in (0..CAPABILITIES).filter(|bit| credentials.bounding >> bit & 1 == 0) {
        // EINVAL: the kernel has no such capability.
        let arguments = [libc::PR_CAPBSET_DROP as u64, capability, 0, 0, 0];
        calls.add("prctl", libc::SYS_prctl, &arguments, Expect::Anything)?;
    }
    let groups: Vec<u8> = credentials
        .groups
        .iter()
        .flat_map(|id| id.to_ne_bytes())
        .collect();
    let groups = calls.bytes(&groups)?;
    let arguments = [credentials.groups.len() as u64, groups.0];
    calls.add(
        "setgroups",
        libc::SYS_setgroups,
        &arguments,
        Expect::Success,
    )?;
    let [gids @ .., _] = credentials.gids;
    let [uids @ .., _] = credentials.uids;
    set(
        calls,
        "setresgid",
        libc::SYS_setresgid,
        &gids,
        Expect::Success,
    )?;
    set(
        calls,
        "setresuid",
        libc::SYS_setresuid,
        &uids,
        Expect::Success,
    )?;
    // These return what was before.
    set(
        calls,
        "setfsgid",
        libc::SYS_setfsgid,
        &[own.filesystem_gid],
        Expect::Anything,
    )?;
    set(
        calls,
        "setfsuid",
        libc::SYS_setfsuid,
        &[own.filesystem_uid],
        Expect::Anything,
    )?;
    prctl(
        calls,
        libc::PR_SET_SECUREBITS,
        u64::from(own.secure_bits),
        0,
    )?;
    let header = calls.words(&[CAPABILITY_VERSION_3])?;
    let Credentials {
        effective,
        permitted,
        inheritable,
        ..
    } = credentials;
    // struct __user_cap_data_struct, the low halves of all three, then the high halves.
    let halves = |shift: u32| {
        [effective, permitted, inheritable].map(|set| ((*set >> shift) as u32).to_ne_bytes())
    };
    let data = calls.bytes([halves(0), halves(32)].as_flattened().as_flattened())?;
    calls.add(
        "capset",
        libc::SYS_capset,
        &[header.0, data.0],
        Expect::Success,
    )?;
    for capability in (0..CAPABILITIES).filter(|bit| credentials.ambient >> bit & 1 == 1) {
        prctl(
            calls,
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE as u64,
            capability,
        )?;
    }
    Ok(())
}
