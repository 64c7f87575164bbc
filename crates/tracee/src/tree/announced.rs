//! Announced calls that a signal ends before they begin.
//!
//! Such a call waits until the notifier has heard of it, and until then any signal ends that wait
//! with ERESTARTSYS (kernel/seccomp.c, `seccomp_do_user_notification`): EINTR, for a handler
//! without SA_RESTART, of calls that never give it. On its way to the handler every signal passes
//! the tracer, which makes that ERESTARTNOINTR: the kernel runs the handler and makes the call
//! (arch/x86/kernel/signal.c, `handle_signal`). The program sees a signal that came just before
//! its call.
//!
//! Some announced calls can wait by themselves, and end in the same way when they do; nothing in
//! the thread tells which wait it was. It makes no difference if the call would wait: EINTR is right
//! then, since the signal may have come a moment later. And it is wrong if the call would not. So the
//! object is asked. Not told are an `open` of a FIFO whose other end is there, taken to wait; and
//! waits in a `connect` to a Unix socket with a full queue, and for a lease in `open`, taken not to.

use super::{IsAnnounced, Tree};
use crate::host::HostTid;
use crate::thread::{Process, registers_from_user, registers_to_user};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use unbroken_image::{PAGE_SIZE, Registers};
use unbroken_sys::{descriptor, lock, pidfd, ptrace};

// include/linux/errno.h
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;

impl Tree {
    /// From now on calls that are announced end with EINTR only where they would unannounced.
    pub fn see_announced(&mut self, is_announced: IsAnnounced) {
        self.is_announced = Some(is_announced);
    }

    /// A signal is about to reach `tid`: has it ended an announced call that is to be made?
    pub(super) fn restart_unbegun(&mut self, tid: HostTid) -> io::Result<()> {
        let (Some(is_announced), Some((process, thread))) = (self.is_announced, self.thread(tid))
        else {
            return Ok(());
        };
        let mut registers = registers_from_user(&ptrace::registers(tid.0)?);
        let Registers { orig_rax, rax, .. } = registers;
        if orig_rax == u64::MAX || rax as i64 != -ERESTARTSYS {
            return Ok(());
        }
        let r = &registers;
        let arguments = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
        if !is_announced(orig_rax, arguments) || would_wait(process, tid, orig_rax, arguments) {
            return Ok(());
        }
        registers.rax = -ERESTARTNOINTR as u64;
        thread.registers.set(Some(registers));
        ptrace::set_registers(tid.0, &registers_to_user(&registers))
    }
}

/// Whether an announced call, made now, would wait for something.
fn would_wait(process: &Process, tid: HostTid, call: u64, arguments: [u64; 6]) -> bool {
    let [a, b, c, d, ..] = arguments;
    let dont_wait = |flags: u64| flags & libc::MSG_DONTWAIT as u64 != 0;
    match call as i64 {
        libc::SYS_accept | libc::SYS_accept4 => waits_for(process, a, libc::POLLIN),
        libc::SYS_connect => waits_for(process, a, libc::POLLOUT),
        libc::SYS_sendto | libc::SYS_sendmmsg => {
            !dont_wait(d) && waits_for(process, a, libc::POLLOUT)
        }
        libc::SYS_sendmsg => !dont_wait(c) && waits_for(process, a, libc::POLLOUT),
        libc::SYS_splice => {
            arguments[5] & u64::from(libc::SPLICE_F_NONBLOCK) == 0
                && (waits_for(process, a, libc::POLLIN) || waits_for(process, c, libc::POLLOUT))
        }
        libc::SYS_flock => waits_for_whole_lock(process, a, b as i32),
        libc::SYS_fcntl => match b as i32 {
            libc::F_SETLKW => waits_for_range(process, a, false, c),
            libc::F_OFD_SETLKW => waits_for_range(process, a, true, c),
            _ => false,
        },
        libc::SYS_open => waits_for_other_end(process, tid, None, a, b),
        libc::SYS_creat => waits_for_other_end(process, tid, None, a, libc::O_WRONLY as u64),
        libc::SYS_openat => waits_for_other_end(process, tid, Some(a), b, c),
        libc::SYS_openat2 => {
            // Its flags are the first member of a struct open_how.
            let mut flags = [0; 8];
            process.memory.read_exact_at(&mut flags, c).is_ok()
                && waits_for_other_end(process, tid, Some(a), b, u64::from_ne_bytes(flags))
        }
        _ => false,
    }
}

/// A descriptor of the service that waits, if it is open at all.
fn descriptor_of(process: &Process, fd: u64) -> io::Result<std::os::fd::OwnedFd> {
    let process = pidfd::open(process.host_pid.0)?;
    pidfd::get_descriptor(process.as_fd(), fd as i32)
}

fn waits_for(process: &Process, fd: u64, events: i16) -> bool {
    let waits = || -> io::Result<bool> {
        let file = descriptor_of(process, fd)?;
        let blocks = descriptor::status_flags(file.as_fd())? & libc::O_NONBLOCK == 0;
        // Errors and ends, which are reported unasked, let a call return, too. An unconnected
        // socket shows an end, so its connect has not begun.
        Ok(blocks && descriptor::poll_now(file.as_fd(), events)? == 0)
    };
    waits().unwrap_or(false)
}

/// The lock belongs to the description, so it is taken through a duplicate of the descriptor in the
/// thread's place: its call, made next, finds it taken.
fn waits_for_whole_lock(process: &Process, fd: u64, operation: i32) -> bool {
    let exclusive = match operation {
        libc::LOCK_EX => true,
        libc::LOCK_SH => false,
        _ => return false,
    };
    let taken = descriptor_of(process, fd).and_then(|file| lock::flock(file.as_fd(), exclusive));
    matches!(taken, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

fn waits_for_range(process: &Process, fd: u64, of_description: bool, request: u64) -> bool {
    let waits = || -> io::Result<bool> {
        let mut bytes = [0; lock::REQUEST_BYTES];
        process.memory.read_exact_at(&mut bytes, request)?;
        // l_type, the first member: to let go waits for nobody, nor can it be asked about.
        if i32::from(i16::from_ne_bytes([bytes[0], bytes[1]])) == libc::F_UNLCK {
            return Ok(false);
        }
        let file = descriptor_of(process, fd)?;
        let holder = lock::conflict(file.as_fd(), of_description, &bytes)?;
        // Its own locks are in the way of ours and not of its own.
        Ok(holder.is_some_and(|holder| holder != process.host_pid.0))
    };
    waits().unwrap_or(false)
}

fn waits_for_other_end(
    process: &Process,
    tid: HostTid,
    directory: Option<u64>,
    path: u64,
    flags: u64,
) -> bool {
    let flags = flags as i32;
    if flags & (libc::O_NONBLOCK | libc::O_PATH) != 0 || flags & libc::O_ACCMODE == libc::O_RDWR {
        return false;
    }
    let Some(path) = read_path(process, path) else {
        return false;
    };
    let base = match directory.map(|fd| fd as i32) {
        _ if path.starts_with('/') => "root".to_owned(),
        None | Some(libc::AT_FDCWD) => "cwd".to_owned(),
        Some(fd) => format!("fd/{fd}"),
    };
    let status = fs::metadata(format!("/proc/{tid}/{base}/{path}"));
    status.is_ok_and(|status| status.file_type().is_fifo())
}

/// A path that a call names; `None` when there is none, which the call finds out, too.
fn read_path(process: &Process, address: u64) -> Option<String> {
    let mut path = Vec::new();
    while path.len() < libc::PATH_MAX as usize {
        let at = address.checked_add(path.len() as u64)?;
        // The next page may not be there.
        let mut piece = vec![0; (PAGE_SIZE - at % PAGE_SIZE) as usize];
        process.memory.read_exact_at(&mut piece, at).ok()?;
        if let Some(end) = piece.iter().position(|byte| *byte == 0) {
            path.extend_from_slice(&piece[..end]);
            return String::from_utf8(path).ok();
        }
        path.append(&mut piece);
    }
    None
}
