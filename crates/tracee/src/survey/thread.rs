//! The attributes of one thread.

use crate::host::HostTid;
use crate::remote::{Batch, BatchedCall, RemoteAddr, Results};
use crate::{Stopped, TraceError};
use unbroken_image::{
    AlternateStack, MemoryPolicy, OwnCredentials, RobustList, Scheduling, ThreadAttributes,
};
use unbroken_sys::process;

/// Bytes of `stack_t`.
const STACK_BYTES: usize = 24;
/// linux/prctl.h
const PR_GET_IO_FLUSHER: i32 = 58;
/// linux/signal.h
pub(crate) const SS_AUTODISARM: i32 = i32::MIN;
/// Bytes of a thread's name with its NUL (`TASK_COMM_LEN`, include/linux/sched.h).
const NAME_BYTES: usize = 16;
/// As many nodes as x86-64 can have (CONFIG_NODES_SHIFT of arch/x86/Kconfig); the kernel wants room
/// for all that it may have, and reads one bit less than it is told.
const NODES: usize = 1024;
/// linux/prctl.h, PR_SPEC_STORE_BYPASS and what follows it.
const SPECULATION_KINDS: std::ops::Range<u64> = 0..3;

impl Stopped<'_> {
    /// What belongs to one thread and changes rarely, by one batch of calls. Also the whole of a
    /// look after `Change::ThreadAttributes` was announced.
    pub fn survey_thread(&mut self, tid: HostTid) -> Result<ThreadAttributes, TraceError> {
        let restartable_sequence = self.restartable_sequence(tid)?;
        let (head, length_bytes) = process::robust_list(tid.0)
            .map_err(TraceError::of_thread("read the robust list", tid))?;
        let nice =
            process::nice(tid.0).map_err(TraceError::of_thread("read the nice value", tid))?;
        let io_priority = process::io_priority(tid.0)
            .map_err(TraceError::of_thread("read the I/O priority", tid))?;

        let disarmed_itself = self.stack_disarms_itself(tid);
        let mut batch = self.remote(tid);
        let stack = batch.reserve(STACK_BYTES)?;
        let name = batch.reserve(NAME_BYTES)?;
        let clear_child_tid = batch.reserve(8)?;
        let death_signal = batch.reserve(8)?;
        let prctl = |option: i32, argument: u64| [option as u64, argument, 0, 0, 0];
        let calls = [
            batch.call(libc::SYS_sigaltstack, &[0, stack.0])?,
            batch.call(libc::SYS_prctl, &prctl(libc::PR_GET_NAME, name.0))?,
            // Needs CONFIG_CHECKPOINT_RESTORE.
            batch.call(
                libc::SYS_prctl,
                &prctl(libc::PR_GET_TID_ADDRESS, clear_child_tid.0),
            )?,
            batch.call(
                libc::SYS_prctl,
                &prctl(libc::PR_GET_PDEATHSIG, death_signal.0),
            )?,
        ];
        let priority = batch.reserve(8)?;
        let parameters = batch.call(libc::SYS_sched_getparam, &[0, priority.0])?;
        let policy = batch.call(libc::SYS_sched_getscheduler, &[0])?;
        let slack = batch.call(libc::SYS_prctl, &prctl(libc::PR_GET_TIMERSLACK, 0))?;
        let no_new = batch.call(libc::SYS_prctl, &prctl(libc::PR_GET_NO_NEW_PRIVS, 0))?;
        let machine_check = batch.call(libc::SYS_prctl, &prctl(libc::PR_MCE_KILL_GET, 0))?;
        // Needs CAP_SYS_RESOURCE, as setting it does.
        let io_flusher = batch.call(libc::SYS_prctl, &prctl(PR_GET_IO_FLUSHER, 0))?;
        let mut speculation = Vec::with_capacity(SPECULATION_KINDS.count());
        for kind in SPECULATION_KINDS {
            let arguments = prctl(libc::PR_GET_SPECULATION_CTRL, kind);
            speculation.push(batch.call(libc::SYS_prctl, &arguments)?);
        }
        // No user and no group have this number: nothing is set, and the present one returned.
        let nobody = [u64::from(u32::MAX)];
        let own = [
            batch.call(libc::SYS_setfsuid, &nobody)?,
            batch.call(libc::SYS_setfsgid, &nobody)?,
            batch.call(libc::SYS_prctl, &prctl(libc::PR_GET_SECUREBITS, 0))?,
        ];
        let policy_question = PolicyQuestion::ask(&mut batch)?;
        let results = batch.run()?;
        let failed = TraceError::of_call("sigaltstack, prctl or sched_getparam", tid);
        for call in calls {
            results.get(call).map_err(failed)?;
        }
        results.get(parameters).map_err(failed)?;
        let policy = results.get(policy).map_err(failed)?;
        let timer_slack_ns = results.get(slack).map_err(failed)?;
        let no_new_privileges = results.get(no_new).map_err(failed)? != 0;
        let own = |index: usize| results.get(own[index]).map(|value| value as u32);
        let name = results.bytes(name, NAME_BYTES);
        let name_length = name.iter().position(|&byte| byte == 0);
        // Whether the thread runs on it now follows from its stack pointer; to the call that sets a
        // stack the bit means nothing.
        let stack_flags = results.word(stack.plus(8)) as i32 & !libc::SS_ONSTACK;
        let alternate_stack = AlternateStack {
            address: results.word(stack),
            flags: stack_flags,
            length_bytes: results.word(stack.plus(16)),
            // One that is off may have been switched off by a handler's start.
            disarms_itself: stack_flags & SS_AUTODISARM != 0
                || stack_flags & libc::SS_DISABLE != 0 && disarmed_itself,
        };
        let attributes = ThreadAttributes {
            alternate_stack,
            robust_list: RobustList { head, length_bytes },
            clear_child_tid: results.word(clear_child_tid),
            restartable_sequence,
            name: name[..name_length.unwrap_or(NAME_BYTES)].to_vec(),
            parent_death_signal: results.word(death_signal) as i32,
            timer_slack_ns,
            no_new_privileges,
            credentials: OwnCredentials {
                filesystem_uid: own(0).map_err(failed)?,
                filesystem_gid: own(1).map_err(failed)?,
                secure_bits: own(2).map_err(failed)?,
            },
            nice,
            scheduling: Scheduling {
                policy: policy as i32,
                priority: results.word(priority) as i32,
            },
            io_priority,
            memory_policy: policy_question.answer(&results),
            machine_check: results.get(machine_check).map_err(failed)? as i32,
            io_flusher: results.get(io_flusher).is_ok_and(|value| value != 0),
            speculation: std::array::from_fn(|kind| {
                results.get(speculation[kind]).unwrap_or(0) as i32
            }),
        };
        self.set_stack_disarms_itself(tid, alternate_stack.disarms_itself);
        Ok(attributes)
    }

    /// [`AlternateStack::disarms_itself`], as far as it is known of a thread.
    fn stack_disarms_itself(&self, tid: HostTid) -> bool {
        self.thread(tid)
            .is_some_and(|(_, thread)| thread.stack_disarms_itself.get())
    }

    /// Notes it for the surveys to come: once a handler has begun, the kernel does not tell.
    pub(crate) fn set_stack_disarms_itself(&self, tid: HostTid, disarms_itself: bool) {
        if let Some((_, thread)) = self.thread(tid) {
            thread.stack_disarms_itself.set(disarms_itself);
        }
    }
}

/// The call of a batch that tells where the thread's new pages come from.
struct PolicyQuestion {
    mode: RemoteAddr,
    nodes: RemoteAddr,
    call: BatchedCall,
}

impl PolicyQuestion {
    fn ask(batch: &mut Batch<'_, '_>) -> Result<Self, TraceError> {
        let mode = batch.reserve(8)?;
        let nodes = batch.reserve(NODES / 8)?;
        let arguments = [mode.0, nodes.0, NODES as u64 + 1, 0, 0];
        Ok(PolicyQuestion {
            mode,
            nodes,
            call: batch.call(libc::SYS_get_mempolicy, &arguments)?,
        })
    }

    /// A kernel without nodes knows no such call.
    fn answer(&self, results: &Results<'_>) -> Option<MemoryPolicy> {
        results.get(self.call).ok()?;
        let mode = results.word(self.mode) as i32;
        let word = |index: usize| results.word(self.nodes.plus(index as u64 * 8));
        let mut nodes: Vec<u64> = (0..NODES / 64).map(word).collect();
        while nodes.last() == Some(&0) {
            nodes.pop();
        }
        (mode != libc::MPOL_DEFAULT).then_some(MemoryPolicy { mode, nodes })
    }
}
