//! Starting and reaping processes: what stage init and its child need beyond `std::process`.
//!
//! The unsafe blocks rely on stage init being single-threaded when it forks, so that the child
//! may go on running ordinary code, and on kernel structures of the size the call is told.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Which side of [`fork_as`] goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    Parent,
    Child,
}

/// Forks; the child gets the number `pid` in the caller's pid namespace and `SIGCHLD` is its end.
///
/// The caller must be single-threaded, or this fails with `EBUSY`. Errors: `EEXIST` when the
/// number is taken, `EPERM` without `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
pub fn fork_as(pid: i32) -> io::Result<Forked> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: all zero is a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.set_tid = (&raw const pid) as u64;
    arguments.set_tid_size = 1;
    // SAFETY: without CLONE_VM this is a fork; the process has one thread, so no lock can be held
    // by a thread that the child lacks. `arguments` and `pid` live across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            mem::size_of_val(&arguments),
        )
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        _ => Ok(Forked::Parent),
    }
}

/// Waits for any child, if `block` is set until one has ended. `None`: no child has ended.
/// Returns its pid and wait status. Error `ECHILD`: there are no children.
pub fn reap(block: bool) -> io::Result<Option<(i32, i32)>> {
    let mut status = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    // SAFETY: `status` lives across the call.
    match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some((pid, status))),
    }
}

/// Blocks `SIGCHLD` for the calling thread and returns a signalfd of it, so that the end of a
/// child can be polled for.
pub fn child_signal() -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain data, initialised by sigemptyset before use.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` lives across the calls; SIGCHLD is a valid signal.
    unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
    }
    // SAFETY: as above; the old mask is not asked for.
    let blocked =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: as above.
    own(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })
}

/// Lets every signal through again: a mask outlives fork and exec, and the service must not
/// inherit what a thread of ours had blocked.
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: sigset_t is plain data, initialised by sigemptyset before use.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` lives across both calls; the old mask is not asked for.
    let result = unsafe {
        libc::sigemptyset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(result))
    }
}

/// Waits until one of two descriptors can be read or has hung up. Says which.
pub fn wait_readable(first: BorrowedFd<'_>, second: BorrowedFd<'_>) -> io::Result<(bool, bool)> {
    let mut polled = [first, second].map(|descriptor| libc::pollfd {
        fd: descriptor.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        // SAFETY: `polled` is two live entries.
        if unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) } >= 0 {
            return Ok((polled[0].revents != 0, polled[1].revents != 0));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes the caller the leader of a new session and process group.
pub fn new_session() -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::setsid() }.min(0))
}

/// Makes `descriptor` appear under `number` too, kept across exec; what was there is closed.
pub fn place_descriptor(descriptor: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    if descriptor.as_raw_fd() == number {
        // dup2 onto itself would leave the close-on-exec flag set.
        // SAFETY: no pointers.
        return check(unsafe { libc::fcntl(number, libc::F_SETFD, 0) });
    }
    // SAFETY: no pointers. Replacing `number` is what the caller asked for.
    check(unsafe { libc::dup2(descriptor.as_raw_fd(), number) }.min(0))
}

/// Closes every descriptor from `first` on, except `kept`. Only for a process that is about to
/// become another program, or has just begun to be one: owners of these numbers would still
/// believe that they are open.
pub fn close_all_from(first: RawFd, kept: BorrowedFd<'_>) -> io::Result<()> {
    let kept = kept.as_raw_fd();
    if kept < first {
        return close_range(first, RawFd::MAX);
    }
    if kept > first {
        close_range(first, kept - 1)?;
    }
    close_range(kept + 1, RawFd::MAX)
}

fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: no pointers; see `close_all_from` for who may call.
    check(unsafe { libc::close_range(first as u32, last as u32, 0) })
}

/// The two ends of a new pipe, read end first, close-on-exec. Its capacity is raised to
/// `capacity_bytes` where the user's limit allows it.
pub fn pipe(capacity_bytes: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills two integers.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both descriptors are new and ours.
    let pair = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // Above /proc/sys/fs/pipe-max-size this is EPERM; a smaller pipe is only slower.
    // SAFETY: no pointers.
    unsafe { libc::fcntl(pair.1.as_raw_fd(), libc::F_SETPIPE_SZ, capacity_bytes) };
    Ok(pair)
}

/// Takes on a user for good: supplementary groups, then group, then user.
pub fn set_identity(user: u32, group: u32, groups: &[u32]) -> io::Result<()> {
    // The child has one thread, so glibc has no others to signal.
    // SAFETY: `groups` is a live slice of gid_t, whose length is passed.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::setresgid(group, group, group) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::setresuid(user, user, user) })
}

/// Ends the process at once: no destructor, no exit handler, no flush.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn own(descriptor: RawFd) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
