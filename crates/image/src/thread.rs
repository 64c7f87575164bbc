//! The state of one thread.

use crate::Tid;
use serde::{Deserialize, Serialize};

/// The general registers in the order of the kernel's `struct user_regs_struct` (x86-64,
/// `arch/x86/include/asm/user_64.h`), FS and GS base included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// A queued signal: the 128 bytes of `siginfo_t`, as `PTRACE_PEEKSIGINFO` gives and
/// `rt_tgsigqueueinfo` takes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalInfo(#[serde(with = "serde_bytes")] pub Vec<u8>);

impl SignalInfo {
    /// `si_signo`, the first field of `siginfo_t`.
    pub fn signal(&self) -> i32 {
        let mut number = [0; 4];
        number.copy_from_slice(&self.0[..4]);
        i32::from_ne_bytes(number)
    }
}

/// `stack_t` of `sigaltstack(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlternateStack {
    pub address: u64,
    pub flags: i32,
    pub length_bytes: u64,
    /// The thread has had a stack with `SS_AUTODISARM`. A handler that runs now has switched it off
    /// by its start, and its return switches it on again, both without a call.
    pub disarms_itself: bool,
}

/// The head that `set_robust_list(2)` registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RobustList {
    pub head: u64,
    pub length_bytes: u64,
}

/// A registration by `rseq(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartableSequence {
    pub address: u64,
    pub length_bytes: u32,
    pub signature: u32,
    pub flags: u32,
}

/// A call that the thread was blocked in at the stop, and that the replica makes again: its registers
/// stand at the call's instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockedCall {
    /// The number of the call as the program made it (never `restart_syscall`).
    pub number: u64,
    /// When its relative timeout ends, on `CLOCK_MONOTONIC`; `None` when it waits without one, or
    /// until an absolute time that its arguments name.
    pub deadline_ns: Option<u64>,
    /// The program's own memory, where the call takes its timeout from, says what was left when it
    /// was stopped.
    pub writes_back: bool,
}

/// How the kernel shares processors out to a thread (sched(7)), besides its nice value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// `SCHED_*`, with `SCHED_RESET_ON_FORK` as it is set.
    pub policy: i32,
    /// Of the policies that count in real time; 0 for others.
    pub priority: i32,
}

/// Where the thread's new pages come from (`set_mempolicy(2)`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// `MPOL_*`, with the flags of the mode.
    pub mode: i32,
    /// Bit n of the words is node n; trailing words of zeros are left out.
    pub nodes: Vec<u64>,
}

/// The part of its credentials that each thread sets for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnCredentials {
    /// `setfsuid(2)`, `setfsgid(2)`: as whom it opens files.
    pub filesystem_uid: u32,
    pub filesystem_gid: u32,
    pub secure_bits: u32,
}

/// What belongs to a thread and changes rarely.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadAttributes {
    pub alternate_stack: AlternateStack,
    pub robust_list: RobustList,
    /// The address that `set_tid_address(2)` or `CLONE_CHILD_CLEARTID` registered; 0 for none.
    pub clear_child_tid: u64,
    pub restartable_sequence: Option<RestartableSequence>,
    /// `comm`, without the final NUL.
    pub name: Vec<u8>,
    pub parent_death_signal: i32,
    pub timer_slack_ns: u64,
    pub no_new_privileges: bool,
    pub credentials: OwnCredentials,
    pub nice: i32,
    pub scheduling: Scheduling,
    /// `IOPRIO_PRIO_VALUE`; 0 was never set.
    pub io_priority: i32,
    /// `None` for the system's own, and on kernels without nodes.
    pub memory_policy: Option<MemoryPolicy>,
    /// `PR_MCE_KILL_*` of `PR_MCE_KILL_GET`.
    pub machine_check: i32,
    pub io_flusher: bool,
    /// What `PR_GET_SPECULATION_CTRL` says of `PR_SPEC_STORE_BYPASS`, `PR_SPEC_INDIRECT_BRANCH` and
    /// `PR_SPEC_L1D_FLUSH`; 0 where the kernel knows none.
    pub speculation: [i32; 3],
}

/// One thread at one stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadState {
    pub tid: Tid,
    pub registers: Registers,
    /// The `NT_X86_XSTATE` register set; `None` when it is as in the epoch before.
    #[serde(with = "serde_bytes")]
    pub extended_state: Option<Vec<u8>>,
    pub signal_mask: u64,
    /// Signals queued for this thread alone.
    pub pending: Vec<SignalInfo>,
    pub blocked_call: Option<BlockedCall>,
    /// `None` when they are as in the epoch before.
    pub attributes: Option<ThreadAttributes>,
}
