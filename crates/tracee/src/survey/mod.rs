//! What a process looks like, read whole from the kernel: partly from `/proc`, partly by calls
//! that only the process itself can make. One batch of calls a process (and one for each 32 POSIX
//! timers), one a thread.
//!
//! Memory and descriptors are elsewhere. Credentials are taken from the leader: the kernel has them
//! for each thread, C libraries keep them the same.

mod files;
mod proc_files;
mod text;
mod thread;
mod timers;

pub use proc_files::writes_to_proc;

use crate::host::HostTid;
use crate::remote::{Batch, BatchedCall, RemoteAddr, Results};
use crate::{Stopped, TraceError};
use files::{identity_of_link, read_coredump_filter, read_directory, read_proc};
use std::fs;
use timers::IntervalTimerQuestion;
use unbroken_image::{Credentials, MemoryLayout, NamedDirectory, Pid, ProcessState, SignalAction};

/// Signals of the kernel, numbered from 1.
const SIGNALS: u64 = 64;
/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION_BYTES: usize = 32;
/// Bytes of the kernel's `sigset_t`.
const SIGNAL_SET_BYTES: u64 = 8;
/// `RLIM_NLIMITS`, include/uapi/asm-generic/resource.h.
const LIMITS: u64 = 16;
/// Bytes of `struct rlimit64`.
const LIMIT_BYTES: usize = 16;

impl Stopped<'_> {
    /// Everything that the threads of a process share, apart from memory, descriptors and the
    /// signals that are queued for it ([`crate::ProcessReading`]).
    pub fn survey_process(&mut self, pid: Pid) -> Result<ProcessState, TraceError> {
        let tid = self.caller(pid)?;
        let mut batch = self.remote(tid);
        let actions = ActionQuestion::ask(&mut batch)?;
        let timers = IntervalTimerQuestion::ask(&mut batch)?;
        let settings = SettingQuestion::ask(&mut batch)?;
        let results = batch.run()?;
        let mut state = ProcessState {
            signal_actions: Vec::with_capacity(SIGNALS as usize),
            shared_pending: Vec::new(),
            interval_timers: timers.answer(&results, tid)?,
            posix_timers: Vec::new(),
            credentials: Credentials::default(),
            umask: 0,
            working_directory: NamedDirectory::default(),
            root_directory: NamedDirectory::default(),
            limits: Vec::with_capacity(LIMITS as usize),
            dumpable: 0,
            child_subreaper: false,
            huge_pages_disabled: 0,
            memory_merge: false,
            personality: 0,
            oom_score_adjust: 0,
            coredump_filter: None,
            session: 0,
            process_group: 0,
        };
        actions.answer(&results, tid, &mut state.signal_actions)?;
        settings.answer(&results, tid, &mut state)?;
        self.read_files(pid, &mut state)?;
        state.posix_timers = self.posix_timers(pid)?;
        self.process(pid)?.delivered.set(0);
        Ok(state)
    }

    /// Whether the kernel may have changed signal actions since they were read, which nothing
    /// announces (KERNEL.md, A handler for one signal).
    pub fn signal_actions_are_stale(
        &self,
        pid: Pid,
        actions: &[SignalAction],
    ) -> Result<bool, TraceError> {
        let is_for_once = |action: &SignalAction| action.flags & libc::SA_RESETHAND as u64 != 0;
        let delivered = self.process(pid)?.delivered.get();
        Ok(delivered & handled_signals_where(actions, is_for_once) != 0)
    }

    /// Reads the signal actions of a process again: after `Change::SignalActions` was announced, or
    /// when [`Stopped::signal_actions_are_stale`].
    pub fn survey_signal_actions(
        &mut self,
        pid: Pid,
        actions: &mut Vec<SignalAction>,
    ) -> Result<(), TraceError> {
        let tid = self.caller(pid)?;
        let mut batch = self.remote(tid);
        let question = ActionQuestion::ask(&mut batch)?;
        let results = batch.run()?;
        question.answer(&results, tid, actions)?;
        self.process(pid)?.delivered.set(0);
        Ok(())
    }

    /// Reads credentials, and all of `state` that is neither signals nor timers, again: after
    /// `Change::Credentials` (which may change `dumpable`, too) or `Change::ProcessState` was
    /// announced.
    pub fn survey_settings(
        &mut self,
        pid: Pid,
        state: &mut ProcessState,
    ) -> Result<(), TraceError> {
        let tid = self.caller(pid)?;
        let mut batch = self.remote(tid);
        let question = SettingQuestion::ask(&mut batch)?;
        let results = batch.run()?;
        question.answer(&results, tid, state)?;
        self.read_files(pid, state)
    }

    /// The bounds of a process's address space, its auxiliary vector and its program.
    pub fn survey_memory_layout(&mut self, pid: Pid) -> Result<MemoryLayout, TraceError> {
        let tid = self.caller(pid)?;
        let host_pid = self.process(pid)?.host_pid;
        let (path, text) = read_proc(host_pid, "stat")?;
        // Without the right to look, the kernel shows 1 and 0.
        let bounds = text::parse_stat(&text)
            .filter(|bounds| bounds.start_code > 1)
            .ok_or(TraceError::ProcFormat {
                path,
                what: "the bounds of the address space",
            })?;
        let path = format!("/proc/{host_pid}/auxv");
        let auxv = fs::read(&path).map_err(|source| TraceError::Proc { path, source })?;
        let executable = identity_of_link(host_pid, "exe")?;

        let mut batch = self.remote(tid);
        // An end that it cannot have: the answer is the present one.
        let end = batch.call(libc::SYS_brk, &[0])?;
        let brk = batch
            .run()?
            .get(end)
            .map_err(TraceError::of_call("brk", tid))?;
        Ok(MemoryLayout {
            start_code: bounds.start_code,
            end_code: bounds.end_code,
            start_data: bounds.start_data,
            end_data: bounds.end_data,
            start_brk: bounds.start_brk,
            brk,
            start_stack: bounds.start_stack,
            arg_start: bounds.arg_start,
            arg_end: bounds.arg_end,
            env_start: bounds.env_start,
            env_end: bounds.env_end,
            auxv,
            executable,
        })
    }

    /// What files tell about a process.
    fn read_files(&self, pid: Pid, state: &mut ProcessState) -> Result<(), TraceError> {
        let process = self.process(pid)?;
        let host_pid = process.host_pid;
        let (path, text) = read_proc(host_pid, "status")?;
        let status =
            text::parse_status(&text).map_err(|what| TraceError::ProcFormat { path, what })?;
        state.credentials = status.credentials;
        state.umask = status.umask;
        state.session = status.session;
        state.process_group = status.process_group;
        let (path, text) = read_proc(host_pid, "oom_score_adj")?;
        state.oom_score_adjust = text.trim().parse().map_err(|_| TraceError::ProcFormat {
            path,
            what: "the adjustment",
        })?;
        state.coredump_filter = read_coredump_filter(host_pid)?;
        read_directory(host_pid, "cwd", &mut state.working_directory)?;
        read_directory(host_pid, "root", &mut state.root_directory)?;
        Ok(())
    }

    /// A thread of the process that can make calls.
    fn caller(&self, pid: Pid) -> Result<HostTid, TraceError> {
        let process = self.process(pid)?;
        let mut threads = process.threads();
        threads
            .find(|thread| thread.can_run_calls())
            .map(|thread| thread.host_tid)
            .ok_or(TraceError::CannotRunCalls {
                tid: process.leader(),
            })
    }
}

/// The signals that run a handler, as a set in which bit 0 is signal 1.
pub fn handled_signals(actions: &[SignalAction]) -> u64 {
    handled_signals_where(actions, |_| true)
}

fn handled_signals_where(
    actions: &[SignalAction],
    is_meant: impl Fn(&SignalAction) -> bool,
) -> u64 {
    let (default, ignore) = (libc::SIG_DFL as u64, libc::SIG_IGN as u64);
    let is_handled = |action: &SignalAction| ![default, ignore].contains(&action.handler);
    let handled = actions
        .iter()
        .enumerate()
        .filter(|(_, action)| is_handled(action) && is_meant(action));
    handled.fold(0, |set, (position, _)| set | 1 << position)
}

/// The calls of a batch that tell the signal actions.
struct ActionQuestion {
    actions: RemoteAddr,
    first: BatchedCall,
    last: BatchedCall,
}

impl ActionQuestion {
    fn ask(batch: &mut Batch<'_, '_>) -> Result<Self, TraceError> {
        let actions = batch.reserve(SIGNALS as usize * ACTION_BYTES)?;
        let mut one = |signal: u64| {
            let answer = actions.plus((signal - 1) * ACTION_BYTES as u64);
            batch.call(
                libc::SYS_rt_sigaction,
                &[signal, 0, answer.0, SIGNAL_SET_BYTES],
            )
        };
        let first = one(1)?;
        let mut last = first;
        for signal in 2..=SIGNALS {
            last = one(signal)?;
        }
        Ok(ActionQuestion {
            actions,
            first,
            last,
        })
    }

    fn answer(
        &self,
        results: &Results<'_>,
        tid: HostTid,
        actions: &mut Vec<SignalAction>,
    ) -> Result<(), TraceError> {
        // They fail together or not at all.
        for call in [self.first, self.last] {
            results
                .get(call)
                .map_err(TraceError::of_call("rt_sigaction", tid))?;
        }
        actions.clear();
        for position in 0..SIGNALS {
            let address = self.actions.plus(position * ACTION_BYTES as u64);
            actions.push(SignalAction {
                handler: results.word(address),
                flags: results.word(address.plus(8)),
                restorer: results.word(address.plus(16)),
                mask: results.word(address.plus(24)),
            });
        }
        Ok(())
    }
}

/// The calls of a batch that tell limits and what `prctl` and `personality` set. Limits are asked
/// of the process itself: from outside they need its uid or `CAP_SYS_RESOURCE`.
struct SettingQuestion {
    limits: RemoteAddr,
    limit_calls: [BatchedCall; 2],
    subreaper: RemoteAddr,
    subreaper_call: BatchedCall,
    dumpable: BatchedCall,
    huge_pages_disabled: BatchedCall,
    memory_merge: BatchedCall,
    personality: BatchedCall,
}

impl SettingQuestion {
    fn ask(batch: &mut Batch<'_, '_>) -> Result<Self, TraceError> {
        let limits = batch.reserve(LIMITS as usize * LIMIT_BYTES)?;
        let subreaper = batch.reserve(8)?;
        let mut limit = |resource: u64| {
            let answer = limits.plus(resource * LIMIT_BYTES as u64);
            batch.call(libc::SYS_prlimit64, &[0, resource, 0, answer.0])
        };
        let first = limit(0)?;
        let mut last = first;
        for resource in 1..LIMITS {
            last = limit(resource)?;
        }
        let mut prctl = |option: i32, argument: u64| {
            batch.call(libc::SYS_prctl, &[option as u64, argument, 0, 0, 0])
        };
        Ok(SettingQuestion {
            limits,
            limit_calls: [first, last],
            subreaper,
            subreaper_call: prctl(libc::PR_GET_CHILD_SUBREAPER, subreaper.0)?,
            dumpable: prctl(libc::PR_GET_DUMPABLE, 0)?,
            huge_pages_disabled: prctl(libc::PR_GET_THP_DISABLE, 0)?,
            memory_merge: prctl(libc::PR_GET_MEMORY_MERGE, 0)?,
            // This value changes nothing and returns the present one.
            personality: batch.call(libc::SYS_personality, &[0xffff_ffff])?,
        })
    }

    fn answer(
        &self,
        results: &Results<'_>,
        tid: HostTid,
        state: &mut ProcessState,
    ) -> Result<(), TraceError> {
        for call in self.limit_calls {
            results
                .get(call)
                .map_err(TraceError::of_call("prlimit64", tid))?;
        }
        state.limits.clear();
        for resource in 0..LIMITS {
            let limit = self.limits.plus(resource * LIMIT_BYTES as u64);
            state
                .limits
                .push((results.word(limit), results.word(limit.plus(8))));
        }
        let failed = TraceError::of_call("prctl", tid);
        results.get(self.subreaper_call).map_err(failed)?;
        state.child_subreaper = results.word(self.subreaper) != 0;
        state.dumpable = results.get(self.dumpable).map_err(failed)? as i32;
        // EINVAL where the kernel has no huge pages.
        state.huge_pages_disabled = results.get(self.huge_pages_disabled).unwrap_or(0) as u32;
        // EINVAL where it merges no pages.
        state.memory_merge = results.get(self.memory_merge).is_ok_and(|value| value != 0);
        let failed = TraceError::of_call("personality", tid);
        state.personality = results.get(self.personality).map_err(failed)? as u32;
        Ok(())
    }
}
