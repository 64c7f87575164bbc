//! The processes and threads of a tree.

use crate::blocked::wait::Waiting;
use crate::host::{HostPid, HostTid};
use crate::{TraceError, proc};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use unbroken_image::{AddressRange, Birth, PAGE_SIZE, Pid, Registers, Tid};
use unbroken_sys::ptrace::UserRegisters;
use unbroken_sys::wait::Death;

/// What the kernel has a thread doing, as far as the tracer was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    /// In a group stop after `PTRACE_LISTEN`: it runs nothing, but only an interrupt makes it a
    /// stop in which it can be looked at.
    Listening,
    /// A stop that a plain continue ends and at which everything may be done.
    Trapped,
    /// The same, in a group stop, which `PTRACE_LISTEN` must end. `resumable` is false once remote
    /// calls moved it out of the trap that LISTEN needs.
    GroupStopped {
        listenable: bool,
    },
    /// At the event of a fork, vfork, clone or exec. The call's result is still to be written
    /// into rax.
    AtEvent,
    /// At the event of a vfork. It stays there until the child gives the address space back: let
    /// go it would sleep where no interrupt reaches it.
    VforkParent {
        child: HostPid,
    },
    /// At `PTRACE_EVENT_EXIT`.
    Exiting,
}

impl State {
    /// Whether a stop must wait for this thread.
    pub(crate) fn is_unsettled(self) -> bool {
        matches!(self, State::Running | State::Listening)
    }
}

/// A thread of the service.
#[derive(Debug)]
pub struct Thread {
    pub tid: Tid,
    pub host_tid: HostTid,
    pub(crate) state: State,
    /// Its general registers, once they were read in this stop.
    pub(crate) registers: Cell<Option<Registers>>,
    /// A call that the thread makes again because our stop ended it: the registers for that, and
    /// those of the call as it had ended.
    pub(crate) reissued: Cell<Option<(Registers, Registers)>>,
    /// The call that it waits in.
    pub(crate) waiting: Cell<Waiting>,
    /// `AlternateStack::disarms_itself`, as far as it was seen.
    pub(crate) stack_disarms_itself: Cell<bool>,
}

impl Thread {
    /// Whether its alternate stack changes without a call, so that each stop has to look at it.
    pub fn changes_its_stack(&self) -> bool {
        self.stack_disarms_itself.get()
    }

    /// Whether it is on its way out (or a vfork parent) and cannot run calls.
    pub fn can_run_calls(&self) -> bool {
        matches!(self.state, State::Trapped | State::GroupStopped { .. })
    }
}

/// A process of the service.
#[derive(Debug)]
pub struct Process {
    pub pid: Pid,
    pub host_pid: HostPid,
    /// The parent when the process was made; it may be gone ([`Process::birth`] tells of now).
    pub parent: Pid,
    pub(crate) threads: Vec<Thread>,
    /// Signals that reached it since its actions were read, signal 1 in bit 0.
    pub(crate) delivered: Cell<u64>,
    /// The last signal of the fatal kind that somebody outside the tree sent to it.
    pub(crate) sent_from_outside: Option<i32>,
    /// Set once the whole process began to die.
    pub(crate) dying: Option<Death>,
    /// The signal by which its blob says that a batch is done; `None` without a blob.
    pub(crate) notice: Option<i32>,
    /// The code of its vDSO, known with the blob.
    pub(crate) vdso: Option<AddressRange>,
    /// Its memory file, which belongs to one address space: opened anew after exec.
    pub(crate) memory: File,
    /// Where we wrote into its own memory, for whoever listens to its page faults.
    pub(crate) corrected: RefCell<Corrected>,
}

/// Pages that we wrote to, as long as they are few.
#[derive(Debug, Default)]
pub(crate) struct Corrected {
    pages: Vec<u64>,
    too_many: bool,
}

impl Corrected {
    const PAGES_MAX: usize = 64;

    fn add(&mut self, address: u64) {
        let page = address / PAGE_SIZE * PAGE_SIZE;
        // The same few words, again and again.
        if self.pages.contains(&page) {
            return;
        }
        if self.pages.len() < Self::PAGES_MAX {
            self.pages.push(page);
        } else {
            self.too_many = true;
        }
    }

    /// Takes them out; `None` when not all are known.
    pub fn take(&mut self) -> Option<impl Iterator<Item = u64> + '_> {
        let all_known = !std::mem::take(&mut self.too_many);
        let pages = self.pages.drain(..);
        all_known.then_some(pages)
    }
}

impl Process {
    /// The live threads, the leader first.
    pub fn threads(&self) -> impl ExactSizeIterator<Item = &Thread> {
        self.threads.iter()
    }

    /// Its leader's number as a thread.
    pub fn leader(&self) -> HostTid {
        HostTid(self.host_pid.0)
    }

    /// How it dies, if it began to.
    pub fn dying(&self) -> Option<Death> {
        self.dying
    }

    /// Whether its first thread has ended while others go on: a state that nothing can restore.
    pub fn has_lost_its_leader(&self) -> bool {
        self.threads
            .iter()
            .all(|thread| thread.host_tid != self.leader())
    }

    /// Who it is among others, as a replica has to make it.
    pub fn birth(&self) -> Result<Birth, TraceError> {
        let gone = || TraceError::NoSuchProcess {
            pid: self.host_pid.0,
        };
        let identity = proc::identity(self.host_pid.0)?.ok_or_else(gone)?;
        let parent = proc::identity(identity.host_parent)?.ok_or_else(gone)?;
        Ok(Birth {
            pid: self.pid,
            parent: parent.pid,
            session: identity.session,
            process_group: identity.process_group,
        })
    }

    /// Its children that have ended and that it has not waited for yet: `processes` of a tree no
    /// longer lists them, yet it can still ask how they ended.
    pub fn unreaped_children(&self) -> Result<usize, TraceError> {
        Ok(proc::children(self.host_pid.0)?.len())
    }

    /// Writes into the process's own memory in its place.
    pub(crate) fn correct(&self, bytes: &[u8], address: u64) -> io::Result<()> {
        let mut corrected = self.corrected.borrow_mut();
        corrected.add(address);
        corrected.add(address + bytes.len() as u64 - 1);
        self.memory.write_all_at(bytes, address)
    }

    /// `/proc/PID/mem`: reads and writes whatever is mapped, also what is protected.
    pub fn memory(&self) -> &File {
        &self.memory
    }
}

macro_rules! convert_registers {
    ($($name:ident),*) => {
        /// The image's registers from the kernel's.
        pub(crate) fn registers_from_user(user: &UserRegisters) -> Registers {
            Registers { $($name: user.$name),* }
        }

        /// The kernel's registers from the image's.
        pub(crate) fn registers_to_user(registers: &Registers) -> UserRegisters {
            UserRegisters { $($name: registers.$name),* }
        }
    };
}

convert_registers!(
    r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs,
    eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs
);
