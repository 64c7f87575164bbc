//! epoll instances.
//!
//! Blocks pass descriptors that a `BorrowedFd` keeps open, and arrays of ours with their length.
#![allow(unsafe_code)]

use crate::descriptor::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct epoll_params` of include/uapi/linux/eventpoll.h (Linux 6.9).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusyPoll {
    pub microseconds: u32,
    pub budget: u16,
    pub prefer: u8,
    padding: u8,
}

impl BusyPoll {
    pub fn new(microseconds: u32, budget: u16, prefer: u8) -> BusyPoll {
        BusyPoll {
            microseconds,
            budget,
            prefer,
            padding: 0,
        }
    }
}

// _IOW(0x8A, 0x01, struct epoll_params) and _IOR(0x8A, 0x02, struct epoll_params)
const EPIOCSPARAMS: libc::c_ulong = 0x4008_8a01;
const EPIOCGPARAMS: libc::c_ulong = 0x8008_8a02;

/// `epoll_create1(2)`, closed on exec.
pub fn create() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The busy-poll parameters; `None` on a kernel before 6.9, which has none.
pub fn busy_poll(epoll: BorrowedFd<'_>) -> io::Result<Option<BusyPoll>> {
    let mut parameters = BusyPoll::default();
    // SAFETY: the kernel writes one `struct epoll_params` of 8 bytes.
    match check(unsafe { libc::ioctl(epoll.as_raw_fd(), EPIOCGPARAMS, &mut parameters) }) {
        Ok(_) => Ok(Some(parameters)),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Sets the busy-poll parameters.
pub fn set_busy_poll(epoll: BorrowedFd<'_>, parameters: BusyPoll) -> io::Result<()> {
    // SAFETY: the kernel reads one `struct epoll_params` of 8 bytes.
    check(unsafe { libc::ioctl(epoll.as_raw_fd(), EPIOCSPARAMS, &parameters) }).map(drop)
}
