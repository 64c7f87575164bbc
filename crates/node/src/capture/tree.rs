//! The processes that are replicated, and what is to be looked at in each.

use super::CaptureError;
use super::announcements::PendingObjectChanges;
use super::candidate::Candidate;
use super::memory::Memory;
use super::process::Followed;
use super::references::References;
use super::write_fault_listener::WriteFaultListener;
use crate::stage::announcement::Announcement;
use crate::steps::StepClock;
use unbroken_image::{PAGE_SIZE, Pid, ProcessDelta};
use unbroken_objects::table::Source;
use unbroken_tracee::{HostTid, Stopped, memory_map, survey};

pub(super) struct FollowedTree {
    /// Parents before the children that they made.
    processes: Vec<Followed>,
    /// At the last capture one of them had a file of /proc open for writing.
    writes_to_proc: bool,
    /// To the files that they name.
    pub references: References,
}

impl FollowedTree {
    /// Begins to follow the memory of all; everything counts as written.
    pub fn follow(
        stopped: &mut Stopped<'_>,
        candidates: &[Candidate],
        listener: impl Fn() -> WriteFaultListener,
    ) -> Result<FollowedTree, CaptureError> {
        let mut references = References::default();
        let processes = candidates.iter().map(|candidate| {
            let leader = candidate.leader;
            let memory = Memory::install(stopped, leader, listener(), &mut references)?;
            Ok(Followed::new(*candidate, memory))
        });
        let processes = processes.collect::<Result<_, CaptureError>>()?;
        Ok(FollowedTree {
            processes,
            writes_to_proc: false,
            references,
        })
    }

    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        self.processes.iter().map(Followed::pid)
    }

    /// Where their descriptor tables are to be read.
    pub fn sources(&self) -> Result<Vec<Source>, CaptureError> {
        let candidates = self.processes.iter().map(|followed| followed.candidate);
        candidates.map(|candidate| candidate.source()).collect()
    }

    /// The memory of one of them, and the references.
    pub fn memory(&mut self, pid: Pid) -> Result<(&mut Memory, &mut References), CaptureError> {
        let mut processes = self.processes.iter_mut();
        let followed = processes.find(|followed| followed.pid() == pid);
        let memory = &mut followed.ok_or(CaptureError::ProcessGone)?.memory;
        Ok((memory, &mut self.references))
    }

    /// Sorts what was announced since the last epoch.
    pub fn hear(
        &mut self,
        stopped: &Stopped<'_>,
        heard: &[Announcement],
        is_new: bool,
        objects: &mut PendingObjectChanges,
    ) {
        objects.clear();
        objects.everything = is_new;
        let is_alone = self.processes.len() == 1;
        for followed in &mut self.processes {
            let (pid, pending) = (followed.pid(), &mut followed.pending);
            pending.clear();
            pending.everything = is_new;
            for announcement in heard {
                // A thread that has ended may have been any process's, and so may one that is not
                // named, because there were too many announcements.
                let thread = || stopped.thread(HostTid(announcement.thread.cast_signed()));
                let is_any = is_alone || announcement.change.may_be_of_others();
                if is_any || thread().is_none_or(|(process, _)| process.pid == pid) {
                    pending.take(pid, announcement, objects);
                }
            }
            objects.map |= pending.map;
        }
    }

    /// What changed in each, without its descriptors and the content of its pages.
    pub fn read(
        &mut self,
        stopped: &mut Stopped<'_>,
        is_new: bool,
        objects: &mut PendingObjectChanges,
        clock: &mut StepClock,
    ) -> Result<Vec<ProcessDelta>, CaptureError> {
        self.refuse_others(stopped)?;
        self.heed_proc_files()?;
        let mut deltas = Vec::with_capacity(self.processes.len());
        for followed in &mut self.processes {
            if is_new {
                followed.threads.forget();
            }
            deltas.push(followed.read(stopped, is_new, &mut self.references, clock)?);
            objects.threads_ended |= followed.threads.have_ended();
        }
        Ok(deltas)
    }

    /// What is written to a file of /proc after its opening is told by nothing: as long as one is
    /// open, all that may be written so is looked at.
    fn heed_proc_files(&mut self) -> Result<(), CaptureError> {
        let heard = self.processes.iter().any(|it| it.pending.proc_file);
        if !heard && !self.writes_to_proc {
            return Ok(());
        }
        self.writes_to_proc = false;
        for Followed {
            pending, candidate, ..
        } in &mut self.processes
        {
            pending.settings = true;
            pending.all_threads = true;
            self.writes_to_proc |= survey::writes_to_proc(candidate.host_pid)?;
        }
        Ok(())
    }

    /// That the service has these processes and no others, and that they have these programs: an
    /// exec that comes while all are stopped is reported later.
    fn refuse_others(&self, stopped: &Stopped<'_>) -> Result<(), CaptureError> {
        let count = stopped.processes().count() + usize::from(stopped.any_dies());
        if count > self.processes.len() {
            return Err(CaptureError::Forked(count));
        }
        if !stopped.processes().map(|it| it.pid).eq(self.pids()) {
            return Err(CaptureError::ProcessGone);
        }
        let mut leaders = self.processes.iter().map(|it| it.candidate.leader);
        if leaders.all(|leader| stopped.has_blob(leader)) {
            Ok(())
        } else {
            Err(CaptureError::Executed)
        }
    }

    /// Reads the pages of `processes` one after the other into `content`.
    pub fn read_pages(
        &self,
        stopped: &Stopped<'_>,
        processes: &[ProcessDelta],
        mut content: &mut [u8],
    ) -> Result<(), CaptureError> {
        for (followed, delta) in self.processes.iter().zip(processes) {
            let memory_file = stopped.process(delta.pid)?.memory();
            let (own, rest) = content.split_at_mut((page_count(delta) * PAGE_SIZE) as usize);
            let tracker = followed.memory.tracker();
            tracker.read_pages(memory_file, &delta.memory.pages, own)?;
            content = rest;
        }
        Ok(())
    }

    /// Somebody has the memory of a process open as a file: of any of them.
    pub fn expect_writes_anywhere(&mut self) {
        for followed in &mut self.processes {
            followed.memory.expect_writes_anywhere();
        }
    }

    /// What takes time and can be done while the service runs.
    pub fn prepare(&mut self) {
        for followed in &mut self.processes {
            followed.memory.prepare();
        }
    }

    /// I7: the maps and states that we believe in against those that are.
    pub fn verify(&self, stopped: &mut Stopped<'_>) -> Result<(), CaptureError> {
        for followed in &self.processes {
            let process = stopped.process(followed.pid())?;
            if let Some(difference) = memory_map::verify(process, followed.memory.map())? {
                return Err(CaptureError::Mirror(difference));
            }
            followed.state.verify(stopped, followed.pid())?;
        }
        Ok(())
    }
}

pub(super) fn page_count(process: &ProcessDelta) -> u64 {
    process.memory.pages.iter().map(|run| run.count).sum()
}
