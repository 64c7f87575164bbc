//! What the threads of a tree report, and what becomes of it.

use super::{Event, Tree, open_memory, tolerate_death};
use crate::TraceError;
use crate::host::{HostPid, HostTid};
use crate::thread::State;
use std::io;
use unbroken_image::Pid;
use unbroken_sys::wait::{Change, Death, Report, wait};
use unbroken_sys::{kcmp, ptrace};

impl Tree {
    /// Takes in one report. `stopping` says that no thread may be let run on without an interrupt
    /// behind it.
    pub(crate) fn handle(&mut self, report: Report, stopping: bool) -> Result<(), TraceError> {
        let tid = HostTid(report.tid);
        let is_new = !self.index.contains_key(&tid) && !matches!(report.change, Change::Ended(_));
        if is_new {
            if !self.adopt(tid)? {
                return Ok(());
            }
            if self.processes.iter().any(|process| process.leader() == tid) {
                self.unannounced.push(tid);
            }
        }
        let event = match report.change {
            Change::Ended(death) => return self.on_end(tid, death, stopping),
            Change::Signal(signal) => return self.on_signal(tid, signal, stopping),
            Change::SystemCall => return self.go_on(tid, 0, stopping),
            Change::Event { event, signal } => (event, signal),
        };
        match event {
            (libc::PTRACE_EVENT_STOP, signal) => self.on_stop(tid, signal, stopping),
            (libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK, _) => {
                self.on_new_task(tid, false, stopping)
            }
            (libc::PTRACE_EVENT_VFORK, _) => self.on_new_task(tid, true, stopping),
            (libc::PTRACE_EVENT_EXEC, _) => self.on_exec(tid, stopping),
            (libc::PTRACE_EVENT_EXIT, _) => self.on_exit(tid),
            _ => self.go_on(tid, 0, stopping),
        }
    }

    /// A signal on its way to the program. It stands in no queue any more, so it is passed on now.
    fn on_signal(&mut self, tid: HostTid, signal: i32, stopping: bool) -> Result<(), TraceError> {
        if is_sign_of_a_fault(signal) {
            let result = self.note_sender(tid, signal);
            tolerate_death("read a signal", tid, result)?;
        }
        let result = self
            .restart_unbegun(tid)
            .and_then(|()| self.before_signal(tid, signal));
        tolerate_death("see to a call before a signal", tid, result)?;
        self.go_on(tid, signal, stopping)
    }

    /// Remembers whether a signal that faults raise was only sent, and from outside the tree.
    fn note_sender(&mut self, tid: HostTid, signal: i32) -> io::Result<()> {
        let information = ptrace::signal_info(tid.0)?;
        let field = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&information[at..at + 4]);
            i32::from_ne_bytes(bytes)
        };
        // siginfo_t: si_code is the third number; si_pid follows the padding when somebody sent
        // the signal (si_code <= 0), in the receiver's namespace, 0 from outside of it.
        let (code, sender) = (field(8), Pid(field(16)));
        let from_outside = code <= 0 && self.process(sender).is_none();
        let Some(&(position, _)) = self.index.get(&tid) else {
            return Ok(());
        };
        self.processes[position].sent_from_outside = from_outside.then_some(signal);
        Ok(())
    }

    fn on_stop(&mut self, tid: HostTid, signal: i32, stopping: bool) -> Result<(), TraceError> {
        let in_group_stop = signal != libc::SIGTRAP;
        self.set_state(
            tid,
            if in_group_stop {
                State::GroupStopped { listenable: true }
            } else {
                State::Trapped
            },
        );
        let stays = stopping || self.held.contains(&tid) || self.unannounced.contains(&tid);
        if stays {
            return Ok(());
        }
        let result = self.settle_lone_call(tid);
        tolerate_death("settle a blocked call", tid, result)?;
        self.resume_thread(tid)
    }

    /// Fork, vfork, clone: the child has its first stop before or after this event.
    fn on_new_task(
        &mut self,
        tid: HostTid,
        is_vfork: bool,
        stopping: bool,
    ) -> Result<(), TraceError> {
        self.set_state(tid, State::AtEvent);
        let Some(child) = self.take_child(tid)? else {
            return self.go_on(tid, 0, stopping);
        };
        if !self.is_other_process(tid, child) {
            if !stopping {
                self.resume_thread(child)?;
            }
            return self.go_on(tid, 0, stopping);
        }
        self.announce(tid, child, is_vfork);
        if is_vfork {
            self.set_state(
                tid,
                State::VforkParent {
                    child: HostPid(child.0),
                },
            );
        } else if stopping {
            self.go_on(tid, 0, true)?;
        } else {
            self.held.push(tid);
        }
        Ok(())
    }

    /// The same for a call of a batch, after which the maker goes on with its batch.
    pub(crate) fn on_remote_task(&mut self, tid: HostTid) -> Result<(), TraceError> {
        if let Some(child) = self.take_child(tid)?
            && self.is_other_process(tid, child)
        {
            self.announce(tid, child, false);
        }
        Ok(())
    }

    fn is_other_process(&self, tid: HostTid, child: HostTid) -> bool {
        match (self.index.get(&tid), self.index.get(&child)) {
            (Some((process, _)), Some((other, _))) => process != other,
            _ => false,
        }
    }

    /// A child has its parent's blob, since it has its memory.
    fn announce(&mut self, parent: HostTid, child: HostTid, shares_memory: bool) {
        let (Some(&(parent, _)), Some(&(position, _))) =
            (self.index.get(&parent), self.index.get(&child))
        else {
            return;
        };
        self.processes[position].notice = self.processes[parent].notice;
        self.processes[position].vdso = self.processes[parent].vdso;
        let (maker, made) = (
            self.processes[parent].host_pid,
            self.processes[position].host_pid,
        );
        // An error means that one of them died.
        let shares_memory =
            shares_memory || kcmp::share_memory(maker.0, made.0).unwrap_or_default();
        let (parent, pid) = (self.processes[parent].pid, self.processes[position].pid);
        self.events.push_back(Event::Forked {
            parent,
            child: pid,
            shares_memory,
        });
        self.unannounced.retain(|&waiting| waiting != child);
        self.held.push(child);
    }

    /// The new task that the event of `tid` names, in its first stop; `None` when either died.
    fn take_child(&mut self, tid: HostTid) -> Result<Option<HostTid>, TraceError> {
        match ptrace::event_message(tid.0) {
            Ok(message) => {
                let child = HostTid(message as i32);
                self.await_first_stop(child)?;
                Ok(self.knows(child).then_some(child))
            }
            Err(error) => {
                tolerate_death("read the event", tid, Err(error))?;
                Ok(None)
            }
        }
    }

    /// Makes sure that a new task stands in its first stop and is known.
    fn await_first_stop(&mut self, child: HostTid) -> Result<(), TraceError> {
        if self.index.contains_key(&child) {
            return Ok(());
        }
        let report = wait(child.0).map_err(TraceError::of_tracer("wait for a new thread"))?;
        let Some(report) = report else { return Ok(()) };
        match report.change {
            Change::Ended(_) => Ok(()),
            _ => {
                if self.adopt(child)? {
                    self.set_state(child, State::Trapped);
                }
                Ok(())
            }
        }
    }

    /// All other threads of the process have reported their end, except the one that executed the
    /// program: it goes on under the leader's number.
    fn on_exec(&mut self, tid: HostTid, stopping: bool) -> Result<(), TraceError> {
        let Some(&(position, _)) = self.index.get(&tid) else {
            return Ok(());
        };
        self.processes[position]
            .threads
            .retain(|thread| thread.host_tid == tid);
        self.processes[position].dying = None;
        self.processes[position].notice = None;
        self.processes[position].vdso = None;
        for thread in &self.processes[position].threads {
            thread.waiting.take();
        }
        let host_pid = self.processes[position].host_pid;
        if let Some(memory) = open_memory(host_pid)? {
            self.processes[position].memory = memory;
        }
        self.reindex();
        self.set_state(tid, State::AtEvent);
        self.events.push_back(Event::Executed {
            pid: self.processes[position].pid,
        });
        self.release_vfork_parent(host_pid, stopping)?;
        if stopping {
            self.go_on(tid, 0, true)
        } else {
            self.held.push(tid);
            Ok(())
        }
    }

    fn on_exit(&mut self, tid: HostTid) -> Result<(), TraceError> {
        let (status, registers) = match (ptrace::event_message(tid.0), ptrace::registers(tid.0)) {
            (Ok(status), Ok(registers)) => (status as i32, registers),
            (Err(error), _) | (_, Err(error)) => {
                return tolerate_death("read the exit status", tid, Err(error));
            }
        };
        let Some(&(position, _)) = self.index.get(&tid) else {
            return Ok(());
        };
        self.set_state(tid, State::Exiting);
        let process = &mut self.processes[position];
        let others_live = process
            .threads
            .iter()
            .any(|thread| thread.state != State::Exiting);
        // A thread that another one's exec or exit_group(0) takes down has status 0 and is not in
        // an exit call (kernel/exit.c, do_group_exit); whether its process dies is told by the
        // thread that made the call.
        let is_whole_process = match registers.orig_rax as i64 {
            libc::SYS_exit_group => true,
            libc::SYS_exit => !others_live,
            _ => status != 0,
        };
        if is_whole_process || process.dying.is_some() {
            if process.dying.is_none() {
                let death = Death::from_status(status);
                process.dying = Some(death);
                let crashed = match death {
                    Death::Exited(_) | Death::Killed(libc::SIGKILL) => false,
                    Death::Killed(signal) => process.sent_from_outside != Some(signal),
                };
                self.events.push_back(Event::Exiting {
                    pid: process.pid,
                    death,
                    crashed,
                });
            }
            self.held.push(tid);
            return Ok(());
        }
        self.go_on(tid, 0, false)?;
        if tid.0 == self.processes[position].host_pid.0 {
            // Its end is reported only when the last thread has ended, so a stop must not wait
            // for it (KERNEL.md, A leader that has ended).
            self.forget_thread(tid);
        }
        Ok(())
    }

    fn on_end(&mut self, tid: HostTid, death: Death, stopping: bool) -> Result<(), TraceError> {
        self.forget_thread(tid);
        let ended = self
            .processes
            .iter()
            .position(|process| process.host_pid.0 == tid.0);
        if let Some(position) = ended {
            while let Some(thread) = self.processes[position].threads.first() {
                let rest = thread.host_tid;
                self.forget_thread(rest);
            }
            let process = self.processes.remove(position);
            self.reindex();
            self.events.push_back(Event::Exited {
                pid: process.pid,
                death,
            });
            self.release_vfork_parent(process.host_pid, stopping)?;
            self.announce_orphans();
        }
        Ok(())
    }

    /// A parent that was killed in the middle of its fork never reports the child.
    fn announce_orphans(&mut self) {
        while let Some(child) = self.unannounced.pop() {
            if let Some((process, _)) = self.thread(child) {
                let (parent, child_pid) = (process.parent, process.pid);
                let event = Event::Forked {
                    parent,
                    child: child_pid,
                    shares_memory: false,
                };
                self.events.push_back(event);
                self.held.push(child);
            }
        }
    }

    fn release_vfork_parent(&mut self, ended: HostPid, stopping: bool) -> Result<(), TraceError> {
        let mut threads = self.processes.iter().flat_map(|process| &process.threads);
        let parent = threads.find(|thread| thread.state == State::VforkParent { child: ended });
        match parent.map(|thread| thread.host_tid) {
            Some(parent) => self.go_on(parent, 0, stopping),
            None => Ok(()),
        }
    }
}

/// Signals by which the kernel, or a library, says that a program did wrong.
fn is_sign_of_a_fault(signal: i32) -> bool {
    matches!(
        signal,
        libc::SIGSEGV
            | libc::SIGBUS
            | libc::SIGILL
            | libc::SIGFPE
            | libc::SIGABRT
            | libc::SIGTRAP
            | libc::SIGSYS
    )
}
