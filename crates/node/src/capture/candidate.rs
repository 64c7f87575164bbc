//! Which processes can be replicated, as far as their family goes.

use super::CaptureError;
use unbroken_image::Birth;
use unbroken_objects::table::Source;
use unbroken_tracee::{HostPid, HostTid, Process, Stopped};

/// A process that a replica can have. It has its blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub birth: Birth,
    pub host_pid: HostPid,
    pub leader: HostTid,
}

impl Candidate {
    /// All processes of the service, of which there may be one in this version.
    pub fn all(stopped: &mut Stopped<'_>) -> Result<Vec<Candidate>, CaptureError> {
        // One that dies counts (KERNEL.md, Orphans find another parent late).
        let count = stopped.processes().count() + usize::from(stopped.any_dies());
        if count > 1 {
            return Err(CaptureError::Forked(count));
        }
        let candidates = stopped.processes().map(|process| {
            refuse_lost_relatives(process)?;
            Ok(Candidate {
                birth: process.birth()?,
                host_pid: process.host_pid,
                leader: process.leader(),
            })
        });
        let candidates = candidates.collect::<Result<Vec<_>, CaptureError>>()?;
        for Candidate { leader, .. } in &candidates {
            if !stopped.has_blob(*leader) {
                stopped.install_blob(*leader)?;
            }
        }
        Ok(candidates)
    }

    pub fn source(&self) -> Result<Source, CaptureError> {
        Ok(Source::open(self.birth.pid, self.host_pid.0)?)
    }
}

/// Family that a replica cannot be given: it has no dead to wait for.
fn refuse_lost_relatives(process: &Process) -> Result<(), CaptureError> {
    if process.has_lost_its_leader() {
        let why = "its first thread has ended while others go on";
        return Err(CaptureError::Unfit(why.to_owned()));
    }
    match process.unreaped_children()? {
        0 => Ok(()),
        count => {
            let why = format!("{count} of its children have ended and it has not waited for them");
            Err(CaptureError::Unfit(why))
        }
    }
}
