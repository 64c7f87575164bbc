//! The processes of the service, and who of them holds an object.

use super::announced::Slots;
use super::source::Source;
use crate::{Context, Error};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use unbroken_image::{Fd, Pid};

/// One process and its slots.
#[derive(Debug)]
pub(crate) struct Process {
    pub source: Source,
    pub slots: Slots,
}

/// The slots that name an object.
#[derive(Clone, Copy)]
pub(crate) struct Holders<'a> {
    pub processes: &'a BTreeMap<Pid, Process>,
    pub slots: &'a [(Pid, Fd)],
}

impl Holders<'_> {
    /// A fresh duplicate by the first slot that still has one.
    pub fn duplicate(&self) -> Result<Option<OwnedFd>, Error> {
        for (pid, fd) in self.slots {
            let Some(process) = self.processes.get(pid) else {
                continue;
            };
            if let Some(duplicate) = process.source.duplicate(*fd)? {
                return Ok(Some(duplicate));
            }
        }
        Ok(None)
    }

    /// As [`Holders::duplicate`] of an object that a slot is known to name.
    ///
    /// # Errors
    /// `EBADF` when none does.
    pub fn require_duplicate(&self) -> Result<OwnedFd, Error> {
        self.duplicate()?
            .ok_or_else(|| std::io::Error::from_raw_os_error(libc::EBADF))
            .during("take a duplicate of", "an object of the service")
    }

    /// The number in our namespace of a process of the service.
    pub fn host_pid(&self, pid: Pid) -> Option<i32> {
        let process = self.processes.get(&pid)?;
        Some(process.source.host_pid)
    }
}
