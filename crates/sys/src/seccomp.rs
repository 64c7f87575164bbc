//! seccomp filters with a user notification listener (`seccomp_unotify(2)`).
//!
//! The unsafe blocks pass structures of `linux/seccomp.h`, declared below field by field, and a
//! filter program whose length goes with it.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// One instruction of a classic BPF program.
pub type Instruction = libc::sock_filter;

// linux/seccomp.h
const IOCTL_RECEIVE: libc::c_ulong = 0xc050_2100;
const IOCTL_SEND: libc::c_ulong = 0xc018_2101;
const IOCTL_SET_FLAGS: libc::c_ulong = 0x4008_2104;
const SYNC_WAKE_UP: libc::c_ulong = 1;
const CONTINUE: u32 = 1;

/// A call that waits for an answer: `struct seccomp_notif`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Notification {
    pub id: u64,
    /// The calling thread, in the pid namespace of whoever receives this.
    pub tid: u32,
    flags: u32,
    pub call: i32,
    architecture: u32,
    pub instruction_pointer: u64,
    pub arguments: [u64; 6],
}

#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// Installs `program` for the calling thread and all that it starts, and returns the listener.
///
/// Done without `no_new_privs`, which would break set-uid programs, so it needs `CAP_SYS_ADMIN`
/// (`EACCES`). `EBUSY`: a filter with a listener is installed already.
pub fn install(program: &[Instruction]) -> io::Result<OwnedFd> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let header = libc::sock_fprog {
        len: length,
        // The kernel only reads the program; the C declaration lacks the const.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `header` names `length` live instructions.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const header,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as i32) })
}

/// Makes the kernel run the two sides of a notification on one core, the caller stepping aside
/// for the answerer at once (Linux 6.6). For a listener whose answerer shares the callers' core.
pub fn wake_on_same_core(listener: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the flags go by value.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), IOCTL_SET_FLAGS, SYNC_WAKE_UP) })
}

/// Waits for the next call. `ENOENT`: its caller ended or was interrupted meanwhile, or nobody
/// is left under the filter; `EINTR`: a signal came.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Notification> {
    // The kernel refuses a structure that is not all zero.
    let mut notification = Notification::default();
    // SAFETY: the request fills one struct seccomp_notif (80 bytes), which this is.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), IOCTL_RECEIVE, &raw mut notification) })?;
    Ok(notification)
}

/// Lets the call go on as if there were no filter. `ENOENT`: the caller is gone, or was
/// interrupted and will make the call again.
pub fn let_continue(listener: BorrowedFd<'_>, id: u64) -> io::Result<()> {
    respond(
        listener,
        Response {
            id,
            value: 0,
            error: 0,
            flags: CONTINUE,
        },
    )
}

fn respond(listener: BorrowedFd<'_>, mut response: Response) -> io::Result<()> {
    // SAFETY: the request reads one struct seccomp_notif_resp (24 bytes), which this is.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), IOCTL_SEND, &raw mut response) })
}

/// Whether anyone still lives under the listener's filter.
pub fn in_use(listener: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one live entry.
    if unsafe { libc::poll(&raw mut polled, 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(polled.revents & libc::POLLHUP == 0)
}

/// Copies memory of a thread that waits in a notification, so that its pointers can be followed.
/// `EFAULT` when the program passed a bad pointer.
pub fn read_caller(tid: u32, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: buffer.len(),
    };
    // SAFETY: the local part is the caller's buffer; the remote address is only ever used by the
    // kernel, in the other address space.
    let read =
        unsafe { libc::process_vm_readv(tid as i32, &raw const local, 1, &raw const remote, 1, 0) };
    match read {
        -1 => Err(io::Error::last_os_error()),
        count if count as usize == buffer.len() => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

// The sizes are part of the ioctl numbers above.
const _: () = assert!(mem::size_of::<Notification>() == 0x50);
const _: () = assert!(mem::size_of::<Response>() == 0x18);
