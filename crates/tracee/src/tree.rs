//! The tree as the tracer knows it, and what its threads report.
//!
//! How a thread's state moves ([`State`]):
//!
//! ```text
//!             interrupt, answered                 EVENT_FORK, VFORK, EXEC
//!   Running --------------------> Trapped    Running --------------> AtEvent --next wait--> Running
//!      ^  ^ \__group stop______> GroupStopped --listen--> Listening --SIGCONT--> Running
//!      |  |____resume_______________|
//!      |_______________ EVENT_VFORK: VforkParent, until the child execs or ends
//!   any --EVENT_EXIT--> Exiting --next wait--> gone
//! ```
//!
//! Fork: the child is traced from its first instruction (`PTRACE_O_TRACEFORK`), inherits the blob
//! and has no dirty tracking. Parent and child stand still until the next [`Tree::wait`] that has
//! nothing else to say, so that the caller can [`Tree::stop`] and look first.

mod announced;
mod reports;
mod vfork;

use crate::blocked::slot::SlotsInUse;
use crate::host::{HostPid, HostTid};
use crate::remote::buffer::BatchBuffer;
use crate::thread::{Process, State, Thread};
use crate::{TraceError, proc};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::marker::PhantomData;
use unbroken_image::{AddressRange, Pid};
use unbroken_sys::bpf::{DeadlineProgram, SocketDeadlines, SocketDeadlinesLoader};
use unbroken_sys::wait::{Bell, Death, Wake, wait};
use unbroken_sys::{clock, process, ptrace};

/// How a process ended; `crashed` by a fault of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub death: Death,
    pub crashed: bool,
}

/// Whether the call of this number with these arguments is announced: it waits for a notifier before
/// it begins.
pub type IsAnnounced = fn(u64, [u64; 6]) -> bool;

/// What [`Tree::wait`] returns for. The list of processes that a [`Stopped`] shows is the truth;
/// events say when to look. An event that came during a stop is returned by the next wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Another thread rang the bell.
    Bell,
    /// A process was made, by fork, vfork or clone. With `shares_memory` the two have one address
    /// space; after vfork the parent is held until the child has executed a program or ended.
    Forked {
        parent: Pid,
        child: Pid,
        shares_memory: bool,
    },
    /// A process has a new program: its memory, blob, dirty tracking and all threads but one are
    /// gone.
    Executed { pid: Pid },
    /// A whole process begins to die; its memory and descriptors are still there until the next
    /// wait. The earliest notice there is. `crashed` when a fault of its own ended it (an
    /// instruction of its own raised the signal, or it sent it to itself), and not somebody
    /// outside.
    Exiting {
        pid: Pid,
        death: Death,
        crashed: bool,
    },
    /// A process has ended and was reaped by the tracer.
    Exited { pid: Pid, death: Death },
    /// No process is left.
    Empty,
}

/// A live process tree that the calling thread traces.
pub struct Tree {
    pub(crate) processes: Vec<Process>,
    /// Where each thread is: positions in `processes` and its `threads`.
    index: HashMap<HostTid, (usize, usize)>,
    /// How many threads a stop would have to wait for.
    unsettled: usize,
    events: VecDeque<Event>,
    /// Threads that the next wait lets go on.
    held: Vec<HostTid>,
    /// New processes in their first stop whose parent's event is still to come.
    unannounced: Vec<HostTid>,
    bell: Bell,
    /// `PTRACE_O_*` of every thread.
    pub(crate) options: i32,
    pub(crate) batch: BatchBuffer,
    /// The slots that threads have ([`crate::blocked`]).
    pub(crate) slots: SlotsInUse,
    /// When waits end that a stop breaks off.
    pub(crate) deadlines: Option<DeadlineProgram>,
    socket_deadlines: Option<SocketDeadlines>,
    /// A wait was met that a socket bounds.
    pub(crate) waits_on_socket: Cell<bool>,
    /// When the tree was last let go on.
    pub(crate) last_resumed_ns: u64,
    /// Children that were seized while their parent slept in a vfork.
    pub(crate) unseen_vforks: Vec<HostPid>,
    /// Which calls wait for a notifier before they begin.
    is_announced: Option<IsAnnounced>,
    /// ptrace is bound to the thread.
    not_send: PhantomData<*const ()>,
}

impl Tree {
    pub(crate) fn empty(options: i32) -> Result<Tree, TraceError> {
        Ok(Tree {
            processes: Vec::new(),
            index: HashMap::new(),
            unsettled: 0,
            events: VecDeque::new(),
            held: Vec::new(),
            unannounced: Vec::new(),
            bell: Bell::for_this_thread().map_err(TraceError::of_tracer("make a bell"))?,
            options,
            batch: BatchBuffer::default(),
            slots: SlotsInUse::default(),
            deadlines: None,
            socket_deadlines: None,
            waits_on_socket: Cell::new(false),
            last_resumed_ns: 0,
            unseen_vforks: Vec::new(),
            is_announced: None,
            not_send: PhantomData,
        })
    }

    /// From now on waits that a stop of the tree meets first end when they should. `program` sees
    /// the pid namespace of the tree.
    pub fn see_deadlines(&mut self, program: DeadlineProgram) {
        self.deadlines = Some(program);
    }

    /// What loads the program for [`Tree::see_socket_deadlines`], once a wait was met that a socket
    /// bounds, and as long as there is none.
    pub fn wants_socket_deadlines(&self) -> Option<SocketDeadlinesLoader> {
        let program = self.deadlines.as_ref()?;
        let wants = self.waits_on_socket.get() && self.socket_deadlines.is_none();
        wants.then(|| program.for_sockets())
    }

    /// As [`Tree::see_deadlines`], of waits that sockets bound.
    pub fn see_socket_deadlines(&mut self, program: SocketDeadlines) {
        self.socket_deadlines = Some(program);
    }

    /// The bell that makes [`Tree::wait`] return; any thread may ring it.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// The processes, parents before the children they made.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// A process by its number in the service's namespace.
    pub fn process(&self, pid: Pid) -> Option<&Process> {
        self.processes.iter().find(|process| process.pid == pid)
    }

    /// A thread by its number in the tracer's namespace, and its process.
    pub fn thread(&self, tid: HostTid) -> Option<(&Process, &Thread)> {
        let &(process, thread) = self.index.get(&tid)?;
        let process = &self.processes[process];
        Some((process, &process.threads[thread]))
    }

    /// Blocks until something happens that the caller must know of. Everything else is dealt with
    /// here: signals are passed on, new threads join, ended ones leave, group stops last.
    pub fn wait(&mut self) -> Result<Event, TraceError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            self.release_held()?;
            if self.processes.is_empty() {
                return Ok(Event::Empty);
            }
            match self
                .bell
                .wait()
                .map_err(TraceError::of_tracer("wait for the service"))?
            {
                Wake::Rung => return Ok(Event::Bell),
                Wake::Nobody => return Ok(Event::Empty),
                Wake::Report(report) => self.handle(report, false)?,
            }
        }
    }

    /// As [`Tree::wait`], but `None` when nothing has happened yet.
    pub fn poll(&mut self) -> Result<Option<Event>, TraceError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            self.release_held()?;
            if self.processes.is_empty() {
                return Ok(Some(Event::Empty));
            }
            let woken = self.bell.poll();
            match woken.map_err(TraceError::of_tracer("ask after the service"))? {
                None => return Ok(None),
                Some(Wake::Rung) => return Ok(Some(Event::Bell)),
                Some(Wake::Nobody) => return Ok(Some(Event::Empty)),
                Some(Wake::Report(report)) => self.handle(report, false)?,
            }
        }
    }

    /// Waits until no thread runs; each has been interrupted.
    pub(crate) fn settle(&mut self) -> Result<(), TraceError> {
        self.settle_unseen_vforks()?;
        while self.unsettled > 0 {
            match wait(-1).map_err(TraceError::of_tracer("wait for the service to stop"))? {
                Some(report) => self.handle(report, true)?,
                None => self.forget_all(),
            }
        }
        Ok(())
    }

    /// Adds a traced thread that was not known; false when it is gone.
    pub(crate) fn adopt(&mut self, host_tid: HostTid) -> Result<bool, TraceError> {
        let Some(identity) = proc::identity(host_tid.0)? else {
            return Ok(false);
        };
        let host_pid = HostPid(identity.host_pid);
        let thread = Thread {
            tid: identity.tid,
            host_tid,
            state: State::Running,
            registers: Cell::new(None),
            reissued: Cell::new(None),
            waiting: Cell::default(),
            stack_disarms_itself: Cell::default(),
        };
        let known = self
            .processes
            .iter()
            .position(|process| process.host_pid == host_pid);
        match known {
            Some(position) => {
                let threads = &mut self.processes[position].threads;
                let is_leader = host_tid.0 == host_pid.0;
                threads.insert(if is_leader { 0 } else { threads.len() }, thread);
            }
            None => {
                let Some(memory) = open_memory(host_pid)? else {
                    return Ok(false);
                };
                let parent = match proc::identity(identity.host_parent)? {
                    Some(parent) => parent.pid,
                    None => Pid(0),
                };
                let pid = identity.pid;
                let threads = vec![thread];
                let process = Process {
                    pid,
                    host_pid,
                    parent,
                    threads,
                    delivered: Cell::new(0),
                    sent_from_outside: None,
                    dying: None,
                    notice: None,
                    vdso: None,
                    memory,
                    corrected: RefCell::default(),
                };
                self.processes.push(process);
            }
        }
        self.unsettled += 1;
        self.reindex();
        Ok(true)
    }

    fn forget_thread(&mut self, tid: HostTid) {
        let Some((process, thread)) = self.index.remove(&tid) else {
            return;
        };
        let thread = self.processes[process].threads.remove(thread);
        if thread.state.is_unsettled() {
            self.unsettled -= 1;
        }
        self.held.retain(|&held| held != tid);
        self.unannounced.retain(|&waiting| waiting != tid);
        self.reindex();
    }

    pub(crate) fn forget_all(&mut self) {
        self.processes.clear();
        self.held.clear();
        self.reindex();
    }

    /// Drops what the next wait would say or let go on. For a replica that does not run by itself.
    pub(crate) fn discard_events(&mut self) {
        self.events.clear();
        self.held.clear();
    }

    fn reindex(&mut self) {
        self.index.clear();
        self.slots.clear();
        for (position, process) in self.processes.iter().enumerate() {
            for (thread_position, thread) in process.threads.iter().enumerate() {
                self.index
                    .insert(thread.host_tid, (position, thread_position));
                if let Some((slot, _)) = thread.waiting.get().slot {
                    self.slots.add(slot);
                }
            }
        }
        let threads = self.processes.iter().flat_map(|process| &process.threads);
        self.unsettled = threads.filter(|thread| thread.state.is_unsettled()).count();
    }

    pub(crate) fn set_notice(&mut self, host_pid: HostPid, notice: i32, vdso: AddressRange) {
        let process = self
            .processes
            .iter_mut()
            .find(|process| process.host_pid == host_pid);
        if let Some(process) = process {
            process.notice = Some(notice);
            process.vdso = Some(vdso);
        }
    }

    /// How many threads there are, whatever they do.
    pub(crate) fn threads_known(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn knows(&self, tid: HostTid) -> bool {
        self.index.contains_key(&tid)
    }

    pub(crate) fn set_state(&mut self, tid: HostTid, state: State) {
        let Some(&(process, thread)) = self.index.get(&tid) else {
            return;
        };
        let thread = &mut self.processes[process].threads[thread];
        self.unsettled += usize::from(state.is_unsettled());
        self.unsettled -= usize::from(thread.state.is_unsettled());
        thread.state = state;
        if state.is_unsettled() {
            thread.registers.set(None);
        }
    }

    /// Lets a stopped thread run, into another stop when `stopping`: any stop takes back an
    /// interrupt that came before it (kernel/signal.c, ptrace_stop).
    pub(crate) fn go_on(
        &mut self,
        tid: HostTid,
        signal: i32,
        stopping: bool,
    ) -> Result<(), TraceError> {
        self.set_state(tid, State::Running);
        if stopping {
            tolerate_death("interrupt", tid, ptrace::interrupt(tid.0))?;
        }
        tolerate_death("continue", tid, ptrace::resume(tid.0, signal))
    }

    /// Lets a thread of a stopped tree do what it did before.
    pub(crate) fn resume_thread(&mut self, tid: HostTid) -> Result<(), TraceError> {
        let Some((_, thread)) = self.thread(tid) else {
            return Ok(());
        };
        match thread.state {
            State::Trapped | State::AtEvent | State::Exiting => self.go_on(tid, 0, false),
            State::GroupStopped { listenable: true } => {
                self.set_state(tid, State::Listening);
                tolerate_death("listen", tid, ptrace::listen(tid.0))
            }
            // The trap that follows an interrupt is reported as the group stop that it is in, and
            // then listens.
            State::GroupStopped { listenable: false } => self.go_on(tid, 0, true),
            State::Running | State::Listening | State::VforkParent { .. } => Ok(()),
        }
    }

    pub(crate) fn resume_all(&mut self) -> Result<(), TraceError> {
        self.held.clear();
        self.last_resumed_ns = clock::monotonic_ns();
        for process in 0..self.processes.len() {
            for thread in 0..self.processes[process].threads.len() {
                let tid = self.processes[process].threads[thread].host_tid;
                self.resume_thread(tid)?;
            }
        }
        Ok(())
    }

    pub(crate) fn release_held(&mut self) -> Result<(), TraceError> {
        while let Some(tid) = self.held.pop() {
            self.resume_thread(tid)?;
        }
        Ok(())
    }
}

fn open_memory(pid: HostPid) -> Result<Option<File>, TraceError> {
    let path = format!("/proc/{pid}/mem");
    match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if proc::is_gone(&error) => Ok(None),
        Err(source) => Err(TraceError::Proc { path, source }),
    }
}

/// A request that failed because the thread was killed: its end is reported by itself.
pub(crate) fn tolerate_death(
    operation: &'static str,
    tid: HostTid,
    result: std::io::Result<()>,
) -> Result<(), TraceError> {
    match result {
        Err(error) if ptrace::is_gone(&error) => Ok(()),
        Err(source) => Err(TraceError::Thread {
            operation,
            tid,
            source,
        }),
        Ok(()) => Ok(()),
    }
}

/// The calling thread's number, as `TracerPid` shows it.
pub(crate) fn this_thread() -> i32 {
    process::this_thread()
}
