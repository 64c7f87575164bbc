//! The attributes of one thread.

use crate::host::HostTid;
use crate::{Stopped, TraceError};
use unbroken_image::{AlternateStack, RobustList, Scheduling, ThreadAttributes};
use unbroken_sys::process;

/// Bytes of `stack_t`.
const STACK_BYTES: usize = 24;
/// Bytes of a thread's name with its NUL (`TASK_COMM_LEN`, include/linux/sched.h).
const NAME_BYTES: usize = 16;

impl Stopped<'_> {
    /// What belongs to one thread and changes rarely, by one batch of calls. Also the whole of a
    /// look after `Change::ThreadAttributes` was announced.
    pub fn survey_thread(&mut self, tid: HostTid) -> Result<ThreadAttributes, TraceError> {
        let restartable_sequence = self.restartable_sequence(tid)?;
        let (head, length_bytes) = process::robust_list(tid.0)
            .map_err(TraceError::of_thread("read the robust list", tid))?;
        let nice =
            process::nice(tid.0).map_err(TraceError::of_thread("read the nice value", tid))?;

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
        let results = batch.run()?;
        let failed = TraceError::of_call("sigaltstack, prctl or sched_getparam", tid);
        for call in calls {
            results.get(call).map_err(failed)?;
        }
        results.get(parameters).map_err(failed)?;
        let policy = results.get(policy).map_err(failed)?;
        let timer_slack_ns = results.get(slack).map_err(failed)?;
        let no_new_privileges = results.get(no_new).map_err(failed)? != 0;
        let name = results.bytes(name, NAME_BYTES);
        let name_length = name.iter().position(|&byte| byte == 0);
        Ok(ThreadAttributes {
            alternate_stack: AlternateStack {
                address: results.word(stack),
                // Whether the thread runs on it now follows from its stack pointer; to the call
                // that sets a stack the bit means nothing.
                flags: results.word(stack.plus(8)) as i32 & !libc::SS_ONSTACK,
                length_bytes: results.word(stack.plus(16)),
            },
            robust_list: RobustList { head, length_bytes },
            clear_child_tid: results.word(clear_child_tid),
            restartable_sequence,
            name: name[..name_length.unwrap_or(NAME_BYTES)].to_vec(),
            parent_death_signal: results.word(death_signal) as i32,
            timer_slack_ns,
            no_new_privileges,
            nice,
            scheduling: Scheduling {
                policy: policy as i32,
                priority: results.word(priority) as i32,
            },
        })
    }
}
