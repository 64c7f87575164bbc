//! The state of one process that its threads share, apart from memory and descriptors.

use crate::{FileIdentity, SignalInfo};
use serde::{Deserialize, Serialize};

/// `struct kernel_sigaction` of `rt_sigaction(2)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// `struct itimerval`, with the remaining time as an absolute `CLOCK_MONOTONIC` deadline for
/// `ITIMER_REAL` and as remaining processor time for the two others. Nanoseconds; 0 is disarmed, but
/// for an `ITIMER_REAL` with an interval: that one has fired, and goes on when its signal is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    pub expiry_ns: u64,
    pub interval_ns: u64,
}

/// A timer of `timer_create(2)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    pub id: i32,
    pub clock: i32,
    pub signal: i32,
    /// `SIGEV_*`.
    pub notify: i32,
    /// The thread that `SIGEV_THREAD_ID` names, else 0.
    pub notify_tid: i32,
    pub value: u64,
    /// Absolute on the timer's own clock, but the rest for clocks of processor time, which begin
    /// anew in a replica; 0 is disarmed.
    pub expiry_ns: u64,
    pub interval_ns: u64,
    pub overrun: i32,
}

/// Of the leader; C libraries keep them the same for all threads. What they leave to each thread is
/// in its [`OwnCredentials`](crate::OwnCredentials).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, filesystem.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
}

/// A directory: the one that `identity` says, unless that is the default, as on filesystems that give
/// no directory a lasting identity: then the one of this name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedDirectory {
    pub identity: FileIdentity,
    pub path: String,
}

/// What `ProcessDelta::state` carries, whole, when any of it changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessState {
    /// Index 0 is signal 1; 64 entries.
    pub signal_actions: Vec<SignalAction>,
    pub shared_pending: Vec<SignalInfo>,
    /// `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF`.
    pub interval_timers: [IntervalTimer; 3],
    pub posix_timers: Vec<PosixTimer>,
    pub credentials: Credentials,
    pub umask: u32,
    /// Both from the root of the mount namespace, so the one is entered before the other is set.
    pub working_directory: NamedDirectory,
    pub root_directory: NamedDirectory,
    /// `RLIMIT_*` in the kernel's order: (soft, hard); 16 entries.
    pub limits: Vec<(u64, u64)>,
    pub dumpable: i32,
    pub child_subreaper: bool,
    /// As `PR_GET_THP_DISABLE` gives it: bit 0 is set for disabled, others are flags of that; 0 is
    /// not disabled.
    pub huge_pages_disabled: u32,
    /// `PR_SET_MEMORY_MERGE`: all memory is offered for merging (KSM).
    pub memory_merge: bool,
    pub personality: u32,
    pub oom_score_adjust: i32,
    /// What goes into a core dump (core(5)); `None` on kernels without core dumps.
    pub coredump_filter: Option<u32>,
    /// Session and process group, in the service's pid namespace.
    pub session: i32,
    pub process_group: i32,
}
