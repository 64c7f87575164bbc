//! Entering and leaving namespaces. All of it concerns the calling thread alone.
//!
//! The unsafe blocks are calls without pointers.
#![allow(unsafe_code)]

use std::io;

/// A set of `CLONE_NEW*` flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespaces(libc::c_int);

impl Namespaces {
    pub const NETWORK: Self = Self(libc::CLONE_NEWNET);
    pub const MOUNT: Self = Self(libc::CLONE_NEWNS);
    pub const IPC: Self = Self(libc::CLONE_NEWIPC);
    /// Counts for children only: a task never changes its own pid namespace.
    pub const PID: Self = Self(libc::CLONE_NEWPID);

    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Puts the calling thread into new namespaces. A new mount namespace also gives the thread a
/// root, working directory and umask of its own (`unshare(2)`). Needs `CAP_SYS_ADMIN`.
///
/// After `PID` the thread can start processes but no more threads (`EINVAL`, kernel/fork.c).
pub fn unshare(namespaces: Namespaces) -> io::Result<()> {
    // SAFETY: no pointers; the effect is on this thread's namespaces only.
    check(unsafe { libc::unshare(namespaces.0) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
