//! Beginning to trace a tree that runs.

use crate::host::HostTid;
use crate::tree::this_thread;
use crate::{TraceError, Tree, proc};
use unbroken_sys::ptrace;

/// What every thread is traced with. Children and threads inherit it.
const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEVFORKDONE
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACEEXIT;

impl Tree {
    /// Seizes the processes `roots` (numbers in the caller's pid namespace) and all their
    /// descendants, which go on running. `exit_kill` decides whether the service dies when the
    /// tracer does ([`crate::Stopped::set_exit_kill`] changes it).
    ///
    /// From here on the calling thread must not have other children: their reports would be taken
    /// for the service's.
    pub fn seize(roots: &[i32], exit_kill: bool) -> Result<Tree, TraceError> {
        let options = OPTIONS
            | if exit_kill {
                libc::PTRACE_O_EXITKILL
            } else {
                0
            };
        let mut tree = Tree::empty(options)?;
        // Threads and children appear while the tree is being walked. Those of seized threads are
        // traced from birth; the walk is over when a whole pass finds nothing new.
        while tree.seize_what_is_new(roots)? {}
        tree.note_unseen_vforks();
        if tree.processes.is_empty() {
            let pid = roots.first().copied().unwrap_or_default();
            return Err(TraceError::NoSuchProcess { pid });
        }
        Ok(tree)
    }

    /// As [`Tree::seize`], of all processes below `parent`, which is not traced itself: the whole
    /// service below its stage's process 1. It outlives the tracer.
    pub fn seize_below(parent: i32) -> Result<Tree, TraceError> {
        let mut tree = Tree::empty(OPTIONS)?;
        while tree.seize_what_is_new(&proc::children(parent)?)? {}
        tree.note_unseen_vforks();
        if tree.processes.is_empty() {
            return Err(TraceError::NoSuchProcess { pid: parent });
        }
        Ok(tree)
    }

    fn seize_what_is_new(&mut self, roots: &[i32]) -> Result<bool, TraceError> {
        let mut found_new = false;
        let mut processes = roots.to_vec();
        let mut next = 0;
        while next < processes.len() {
            for tid in proc::threads(processes[next])? {
                if !self.knows(HostTid(tid)) {
                    found_new |= self.seize_thread(tid)?;
                }
            }
            for child in proc::children(processes[next])? {
                if !processes.contains(&child) {
                    processes.push(child);
                }
            }
            next += 1;
        }
        Ok(found_new)
    }

    /// False when the thread is gone or a zombie.
    fn seize_thread(&mut self, tid: i32) -> Result<bool, TraceError> {
        let Err(error) = ptrace::seize(tid, self.options) else {
            return self.adopt(HostTid(tid));
        };
        let Some(identity) = proc::identity(tid)? else {
            return Ok(false);
        };
        if identity.tracer == this_thread() {
            // Born of a thread that was seized already.
            return self.adopt(HostTid(tid));
        }
        if identity.tracer != 0 {
            let (pid, tracer) = (identity.host_pid, identity.tracer);
            return Err(TraceError::TracedAlready { pid, tracer });
        }
        match error.raw_os_error() {
            // A zombie: EPERM, as one whose exit has begun (kernel/ptrace.c, ptrace_attach).
            Some(libc::ESRCH) => Ok(false),
            Some(libc::EPERM) if identity.is_dead => Ok(false),
            _ => Err(TraceError::of_thread("PTRACE_SEIZE", HostTid(tid))(error)),
        }
    }
}
