//! Where descriptors come from: one live process of the service.

use crate::{Context, Error};
use std::os::fd::{AsFd, OwnedFd};
use unbroken_image::{Fd, Pid};
use unbroken_sys::fdinfo::{self, ProcessDirectory};
use unbroken_sys::{kcmp, pidfd};

/// A process of the service, by a pidfd and its directory in our `/proc`.
#[derive(Debug)]
pub struct Source {
    /// In the service's pid namespace.
    pub pid: Pid,
    /// In ours.
    pub host_pid: i32,
    pidfd: OwnedFd,
    directory: ProcessDirectory,
}

impl Source {
    /// Opens a process that is known to live, as one that is stopped under ptrace is.
    pub fn open(pid: Pid, host_pid: i32) -> Result<Source, Error> {
        let pidfd = pidfd::open(host_pid).during("open process", host_pid)?;
        let directory = ProcessDirectory::open(host_pid).during("open /proc of", host_pid)?;
        Ok(Source {
            pid,
            host_pid,
            pidfd,
            directory,
        })
    }

    /// A fresh duplicate of a descriptor; `None` when the slot is free.
    pub fn duplicate(&self, fd: Fd) -> Result<Option<OwnedFd>, Error> {
        match pidfd::get_descriptor(self.pidfd.as_fd(), fd.0) {
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(None),
            other => other
                .during("take a duplicate of", self.subject(fd))
                .map(Some),
        }
    }

    /// Whether the slot is marked close-on-exec: only fdinfo tells it of another process.
    pub(crate) fn close_on_exec(&self, fd: Fd, text: &mut Vec<u8>) -> Result<bool, Error> {
        let info = self.fdinfo(fd)?;
        fdinfo::read_again(info.as_fd(), text).during("read fdinfo of", self.subject(fd))?;
        let flags =
            fdinfo::field(text, "flags").and_then(|flags| i32::from_str_radix(flags, 8).ok());
        match flags {
            Some(flags) => Ok(flags & libc::O_CLOEXEC != 0),
            None => Err(Error::Answer {
                operation: "read fdinfo of",
                subject: self.subject(fd),
                answer: String::from_utf8_lossy(text).into_owned(),
            }),
        }
    }

    pub(crate) fn fdinfo(&self, fd: Fd) -> Result<OwnedFd, Error> {
        self.directory
            .fdinfo(fd.0)
            .during("open fdinfo of", self.subject(fd))
    }

    pub(crate) fn reference(&self, fd: Fd) -> Result<OwnedFd, Error> {
        self.directory
            .reference(fd.0)
            .during("refer to", self.subject(fd))
    }

    /// All open slots, ascending.
    pub(crate) fn list(&self, list: &mut Vec<i32>) -> Result<(), Error> {
        self.directory
            .descriptors(list)
            .during("list the descriptors of", self.host_pid)
    }

    pub(crate) fn count(&self) -> Result<u64, Error> {
        self.directory
            .descriptor_count()
            .during("count the descriptors of", self.host_pid)
    }

    /// Refuses a process that shares its table with another one, or whose threads do not share
    /// theirs: the image has one table for each process.
    pub(crate) fn refuse_odd_sharing(&self, others: &[i32]) -> Result<(), Error> {
        let mut threads = Vec::new();
        self.directory
            .threads(&mut threads)
            .during("list the threads of", self.host_pid)?;
        for thread in threads {
            let shared = kcmp::share_descriptor_table(self.host_pid, thread)
                .during("compare the descriptor tables of threads of", self.host_pid)?;
            if !shared {
                return Err(Error::refused(
                    format!("thread {thread} with a descriptor table of its own"),
                    "all threads of a process must share one table",
                ));
            }
        }
        for other in others {
            let shared = kcmp::share_descriptor_table(self.host_pid, *other)
                .during("compare the descriptor tables of processes", self.host_pid)?;
            if shared {
                return Err(Error::refused(
                    format!(
                        "the descriptor table that processes {} and {other} share",
                        self.host_pid
                    ),
                    "each process must have its own table",
                ));
            }
        }
        Ok(())
    }

    pub(crate) fn subject(&self, fd: Fd) -> String {
        format!("descriptor {fd} of process {}", self.host_pid)
    }
}
