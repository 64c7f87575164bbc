//! The warm replica: a stopped process tree with the service's numbers, addresses and threads,
//! filled epoch by epoch and brought to life at a takeover.
//!
//! It grows out of a *stub*, the first process of a stage of its own, emptied of everything but
//! the [`crate::blob`] and its end of a channel. All else is made by calls through the blob, which
//! the stage's filter lets pass, and by writes from outside. Nothing of the service's code runs
//! before [`Replica::go_live`].

mod attributes;
mod calls;
mod descriptors;
mod error;
mod files;
mod live;
mod memory;
mod plan;
mod shared;
mod threads;
mod timers;

pub use descriptors::{Installed, STUB_CHANNEL};
pub use error::ReplicaError;
pub use files::{Files, References};

use crate::{HostTid, Stopped, TraceError, Tree};
use memory::{Memory, Surroundings};
use shared::SharedObjects;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use unbroken_image::object::FileLock;
use unbroken_image::{
    Birth, Epoch, Fd, FileIdentity, MemoryDelta, Pid, ProcessDelta, ProcessState, ThreadState, Tid,
};
use unbroken_sys::channel::Channel;
use unbroken_sys::signal;

/// A replica. Like the [`Tree`] inside, it belongs to the thread that made it. Dropping it kills
/// its processes.
pub struct Replica {
    tree: Option<Tree>,
    channel: Channel,
    shared: SharedObjects,
    processes: BTreeMap<Pid, ProcessReplica>,
}

/// A stub that has its blob and runs on, so that its filter can be installed.
pub struct Stub {
    tree: Tree,
}

/// What the last epoch says of a process, besides what stands in the process itself.
#[derive(Default)]
struct ProcessReplica {
    memory: Memory,
    state: Option<ProcessState>,
    threads: BTreeMap<Tid, ThreadState>,
    /// See [`descriptors::make_room`].
    room: i32,
}

impl Stub {
    /// Seizes the waiting stub `host_pid` and gives it its blob, before there is a filter that
    /// would hold up the calls that this takes.
    pub fn seize(host_pid: i32) -> Result<Stub, ReplicaError> {
        let mut tree = Tree::seize(&[host_pid], true)?;
        let mut stopped = tree.stop()?;
        let leader = first_of(&stopped)?;
        stopped.install_blob(leader)?;
        stopped.resume()?;
        Ok(Stub { tree })
    }

    /// Empties the stub, now under its filter. `channel` is our end of the one of which it has the
    /// other at [`STUB_CHANNEL`].
    pub fn into_replica(mut self, channel: Channel) -> Result<Replica, ReplicaError> {
        let mut stopped = self.tree.stop()?;
        let leader = first_of(&stopped)?;
        threads::empty_first(&mut stopped, leader, i64::from(STUB_CHANNEL) as u64)?;
        let pid = stopped.processes().next().map(|process| process.pid);
        stopped.stay();
        let processes = pid
            .into_iter()
            .map(|pid| (pid, ProcessReplica::default()))
            .collect();
        Ok(Replica {
            tree: Some(self.tree),
            channel,
            shared: SharedObjects::default(),
            processes,
        })
    }
}

fn first_of(stopped: &Stopped<'_>) -> Result<HostTid, ReplicaError> {
    let first = stopped.processes().next().ok_or(TraceError::Ended)?;
    Ok(first.leader())
}

impl Replica {
    /// Makes a process, empty, unless it stands: the first one does from the start, and ends with
    /// the first epoch if the service has no such process.
    pub fn bear(&mut self, birth: Birth) -> Result<(), ReplicaError> {
        if self.processes.contains_key(&birth.pid) {
            return Ok(());
        }
        self.while_stopped(|replica, stopped| {
            threads::create_process(stopped, birth)?;
            let process = ProcessReplica::default();
            replica.processes.insert(birth.pid, process);
            Ok(())
        })
    }

    /// Takes in memory that was sent ahead of its epoch. The process must stand.
    pub fn apply_memory(
        &mut self,
        pid: Pid,
        delta: &MemoryDelta,
        bulk: &[u8],
        files: Files<'_>,
    ) -> Result<(), ReplicaError> {
        self.while_stopped(|replica, stopped| {
            let process = replica.processes.get_mut(&pid);
            let process = process.ok_or(ReplicaError::UnknownProcess { pid })?;
            let mut surroundings = Surroundings {
                shared: &mut replica.shared,
                files,
                channel: &replica.channel,
            };
            let used = process
                .memory
                .apply(stopped, pid, delta, bulk, &mut surroundings)?;
            if used == bulk.len() {
                Ok(())
            } else {
                Err(ReplicaError::WrongLength)
            }
        })
    }

    /// Takes in a committed epoch: processes, threads and memory, that of memfds included. `bulk`
    /// is the content of its pages. After an error the replica is void.
    ///
    /// Other objects, and descriptors, are the caller's until a takeover.
    pub fn apply(
        &mut self,
        epoch: &Epoch,
        bulk: &[u8],
        files: Files<'_>,
    ) -> Result<(), ReplicaError> {
        self.while_stopped(|replica, stopped| {
            replica.apply_processes(stopped, &epoch.processes, bulk, files)?;
            // After the pages: what was read out of a memfd at the same stop is no older.
            replica.shared.take_states(&epoch.objects, &epoch.gone)?;
            replica.forget_unused_memory();
            Ok(())
        })
    }

    /// The memfd that stands for shared memory of the service: a descriptor of the same memory
    /// must name it, too.
    pub fn shared_memory(&self, identity: FileIdentity) -> Option<BorrowedFd<'_>> {
        self.shared.get(identity)
    }

    /// Fills the descriptor table of a process, all at once and once only; then nothing but
    /// [`Replica::go_live`] may follow for it.
    pub fn install_descriptors(
        &mut self,
        pid: Pid,
        descriptors: &mut [Installed<'_>],
    ) -> Result<(), ReplicaError> {
        descriptors.sort_unstable_by_key(|(fd, ..)| *fd);
        self.while_stopped(|replica, stopped| {
            let leader = stopped.process(pid)?.leader();
            descriptors::install(stopped, leader, &replica.channel, descriptors)
        })
    }

    /// Makes a process lock ranges of its files (`F_SETLK`), through descriptors that it has by
    /// now. Returns those that another process holds.
    pub fn lock_ranges(
        &mut self,
        pid: Pid,
        locks: &[(Fd, FileLock)],
    ) -> Result<Vec<(Fd, FileLock)>, ReplicaError> {
        if locks.is_empty() {
            return Ok(Vec::new());
        }
        self.while_stopped(|_, stopped| {
            let leader = stopped.process(pid)?.leader();
            descriptors::lock_ranges(stopped, leader, locks)
        })
    }

    /// Gives every process and thread the rest of its state and returns the tree, which is the
    /// service now. Its threads still stand; stop and resume it to let it run. The notifier of its
    /// filter must serve by then.
    ///
    /// `now_ns` is `CLOCK_MONOTONIC`, for timers that count real time.
    pub fn go_live(mut self, now_ns: u64) -> Result<Tree, ReplicaError> {
        self.while_stopped(|replica, stopped| live::go_live(stopped, &replica.processes, now_ns))?;
        // Nothing is left for the drop to kill.
        Ok(self.tree.take().ok_or(TraceError::Ended)?)
    }

    /// Runs `work` on the tree, which stands still before and after. What a failure leaves half
    /// done is killed before it could run.
    fn while_stopped<T>(
        &mut self,
        work: impl FnOnce(&mut Replica, &mut Stopped<'_>) -> Result<T, ReplicaError>,
    ) -> Result<T, ReplicaError> {
        let mut tree = self.tree.take().ok_or(TraceError::Ended)?;
        let mut stopped = tree.stop()?;
        let result = work(self, &mut stopped);
        if result.is_err() {
            kill(stopped.tree);
        }
        stopped.stay();
        self.tree = Some(tree);
        result
    }

    fn apply_processes(
        &mut self,
        stopped: &mut Stopped<'_>,
        processes: &[ProcessDelta],
        bulk: &[u8],
        files: Files<'_>,
    ) -> Result<(), ReplicaError> {
        self.open_sessions(stopped, processes)?;
        let mut used = 0;
        for delta in processes {
            let process = self.processes.get_mut(&delta.pid);
            let process = process.ok_or(ReplicaError::UnknownProcess { pid: delta.pid })?;
            // Before it has more threads than one, if it is new.
            let named = delta.descriptors.iter().map(|change| change.fd.0);
            let highest = named.max().unwrap_or(0);
            if process.room <= highest {
                let leader = stopped.process(delta.pid)?.leader();
                process.room = descriptors::make_room(stopped, leader, highest)?;
            }
            process.take_threads(stopped, delta)?;
            let bulk = bulk.get(used..).ok_or(ReplicaError::WrongLength)?;
            let mut surroundings = Surroundings {
                shared: &mut self.shared,
                files,
                channel: &self.channel,
            };
            let (pid, memory) = (delta.pid, &delta.memory);
            used += process
                .memory
                .apply(stopped, pid, memory, bulk, &mut surroundings)?;
            if let Some(state) = &delta.state {
                let leader = stopped.process(pid)?.leader();
                let change = (process.state.as_ref(), state);
                files::enter(stopped, leader, &self.channel, files, change)?;
                process.state = Some(state.clone());
            }
        }
        self.end_what_is_gone(stopped, processes)?;
        if used == bulk.len() {
            Ok(())
        } else {
            Err(ReplicaError::WrongLength)
        }
    }

    fn forget_unused_memory(&mut self) {
        let mappings = self
            .processes
            .values()
            .flat_map(|process| process.memory.mappings());
        self.shared.keep_only(mappings);
    }

    /// A process may open a session at any time, and become the leader of its group with that.
    fn open_sessions(
        &self,
        stopped: &mut Stopped<'_>,
        processes: &[ProcessDelta],
    ) -> Result<(), ReplicaError> {
        for ProcessDelta { pid, state, .. } in processes {
            if state.as_ref().is_some_and(|state| state.session == pid.0) {
                threads::open_session(stopped, *pid)?;
            }
        }
        Ok(())
    }

    fn end_what_is_gone(
        &mut self,
        stopped: &mut Stopped<'_>,
        processes: &[ProcessDelta],
    ) -> Result<(), ReplicaError> {
        let is_listed = |pid: &Pid| processes.iter().any(|delta| delta.pid == *pid);
        let gone: Vec<Pid> = self
            .processes
            .keys()
            .copied()
            .filter(|pid| !is_listed(pid))
            .collect();
        for pid in gone {
            threads::end_process(stopped, pid)?;
            self.processes.remove(&pid);
        }
        Ok(())
    }
}

impl ProcessReplica {
    /// Makes and ends threads until they are those of the epoch, and keeps what it says of them.
    fn take_threads(
        &mut self,
        stopped: &mut Stopped<'_>,
        delta: &ProcessDelta,
    ) -> Result<(), ReplicaError> {
        if delta
            .threads
            .first()
            .is_none_or(|first| first.tid.0 != delta.pid.0)
        {
            return Err(ReplicaError::LeaderGone { pid: delta.pid });
        }
        let process = stopped.process(delta.pid)?;
        let leader = process.leader();
        let is_listed = |tid: Tid| delta.threads.iter().any(|thread| thread.tid == tid);
        let standing: Vec<Tid> = process.threads().map(|thread| thread.tid).collect();
        let gone: Vec<_> = process
            .threads()
            .filter(|thread| !is_listed(thread.tid))
            .map(|thread| thread.host_tid)
            .collect();
        for tid in gone {
            threads::end_thread(stopped, tid)?;
        }
        self.threads.retain(|tid, _| is_listed(*tid));
        for thread in &delta.threads {
            if !standing.contains(&thread.tid) {
                threads::create_thread(stopped, leader, thread.tid)?;
            }
            self.take_thread(thread)?;
        }
        Ok(())
    }

    /// What an epoch leaves out is as it was.
    fn take_thread(&mut self, thread: &ThreadState) -> Result<(), ReplicaError> {
        let mut taken = thread.clone();
        if let Some(before) = self.threads.remove(&thread.tid) {
            taken.extended_state = taken.extended_state.or(before.extended_state);
            taken.attributes = taken.attributes.or(before.attributes);
        }
        let missing = |what| ReplicaError::Incomplete {
            what,
            tid: thread.tid,
        };
        if taken.extended_state.is_none() {
            return Err(missing("extended state"));
        }
        if taken.attributes.is_none() {
            return Err(missing("attributes"));
        }
        self.threads.insert(thread.tid, taken);
        Ok(())
    }
}

fn kill(tree: &Tree) {
    for process in tree.processes() {
        // One that is gone already is what is wanted.
        let _ = signal::to_process(process.host_pid.0, libc::SIGKILL);
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(tree) = &self.tree {
            kill(tree);
        }
    }
}
