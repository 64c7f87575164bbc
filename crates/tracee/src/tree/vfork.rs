//! Threads that were asleep in a vfork when they were seized.
//!
//! A traced thread reports its vfork and is held there. One that made it before stays in the call,
//! where no interrupt reaches it, until the child has executed a program or ended (kernel/fork.c,
//! `wait_for_vfork_done`). It runs no code of the program meanwhile, so to a stop it stands like one
//! that is held; and the child must not be waited for, which stands.

use super::Tree;
use crate::TraceError;
use crate::host::{HostPid, HostTid};
use crate::proc;
use crate::thread::State;
use std::os::unix::fs::FileExt;
use unbroken_sys::kcmp;
use unbroken_sys::wait::poll;

impl Tree {
    /// Looks, once the tree is seized, for children that have their parent's memory.
    pub(crate) fn note_unseen_vforks(&mut self) {
        for position in 1..self.processes.len() {
            let child = &self.processes[position];
            let Some(parent) = self.process(child.parent) else {
                continue;
            };
            // An error means that one of them died.
            if kcmp::share_memory(parent.host_pid.0, child.host_pid.0).unwrap_or(false) {
                self.unseen_vforks.push(child.host_pid);
            }
        }
    }

    /// Has the threads count as standing that sleep in a vfork, after all reports were taken in; what
    /// is left to be waited for reports by itself.
    pub(super) fn settle_unseen_vforks(&mut self) -> Result<(), TraceError> {
        while self.unsettled > 0 && !self.unseen_vforks.is_empty() {
            let report = poll(-1).map_err(TraceError::of_tracer("ask after the service"))?;
            if let Some(report) = report {
                self.handle(report, true)?;
                continue;
            }
            let mut children = std::mem::take(&mut self.unseen_vforks);
            children.retain(|&child| self.is_unexecuted(child));
            self.unseen_vforks = children;
            for index in 0..self.unseen_vforks.len() {
                self.settle_vfork_of(self.unseen_vforks[index])?;
            }
            // Whoever is on its way into the call, or out of it, does not wait for us.
            std::thread::yield_now();
        }
        Ok(())
    }

    fn is_unexecuted(&self, child: HostPid) -> bool {
        let is_it = |process: &&crate::Process| process.host_pid == child;
        let parent = self.processes.iter().find(is_it);
        let parent = parent.and_then(|child| self.process(child.parent));
        parent.is_some_and(|parent| kcmp::share_memory(parent.host_pid.0, child.0).unwrap_or(false))
    }

    /// Finds who waits for `child`, if the child stands and nobody was found yet.
    fn settle_vfork_of(&mut self, child: HostPid) -> Result<(), TraceError> {
        let process = self.processes.iter().find(|it| it.host_pid == child);
        let Some(process) = process else {
            return Ok(());
        };
        let Some(parent) = self.process(process.parent) else {
            return Ok(());
        };
        let waits_for_it = State::VforkParent { child };
        let runs = process.threads.iter().any(|it| it.state.is_unsettled());
        if runs || parent.threads.iter().any(|it| it.state == waits_for_it) {
            return Ok(());
        }
        let running = parent.threads.iter().filter(|it| it.state.is_unsettled());
        for tid in running.map(|thread| thread.host_tid) {
            if sleeps_in_vfork(tid, &parent.memory)? {
                self.set_state(tid, waits_for_it);
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Whether a thread sleeps in a call that makes a process and waits for it. `memory` is its own.
fn sleeps_in_vfork(tid: HostTid, memory: &std::fs::File) -> Result<bool, TraceError> {
    let stat = proc::read_if_alive(&format!("/proc/{tid}/stat"))?.unwrap_or_default();
    // proc_pid_stat(5): the state follows a name in brackets. D: not to be interrupted.
    let is_asleep = stat
        .rsplit_once(')')
        .is_some_and(|(_, rest)| rest.trim_start().starts_with('D'));
    if !is_asleep {
        return Ok(false);
    }
    // proc_pid_syscall(5): number and arguments of the call, in hexadecimal but for the number.
    let call = proc::read_if_alive(&format!("/proc/{tid}/syscall"))?.unwrap_or_default();
    let mut words = call.split_ascii_whitespace();
    let number = words.next().and_then(|word| word.parse::<i64>().ok());
    let argument = words
        .next()
        .and_then(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())
        .unwrap_or(0);
    let flags = match number {
        Some(libc::SYS_vfork) => return Ok(true),
        Some(libc::SYS_clone) => argument,
        Some(libc::SYS_clone3) => {
            // The flags are the first member of a struct clone_args.
            let mut flags = [0; 8];
            // Memory that is gone belongs to one that dies.
            match memory.read_exact_at(&mut flags, argument) {
                Ok(()) => u64::from_ne_bytes(flags),
                Err(_) => 0,
            }
        }
        _ => 0,
    };
    Ok(flags & libc::CLONE_VFORK as u64 != 0)
}
