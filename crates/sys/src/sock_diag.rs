//! The socket through which the kernel answers questions about other sockets (sock_diag(7)).
//!
//! The unsafe blocks pass pointers to slices with their lengths and take ownership of descriptors
//! that the kernel has just installed.
#![allow(unsafe_code)]

use crate::socket::{check, check_length};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// From include/uapi/linux/sock_diag.h.
pub(crate) const SOCK_DIAG_BY_FAMILY: u16 = 20;
pub(crate) const HEADER_BYTES: usize = size_of::<libc::nlmsghdr>();

/// It answers for the network namespace that it was opened in, whatever thread asks.
#[derive(Debug)]
pub(crate) struct DiagSocket(OwnedFd);

impl DiagSocket {
    /// Opens it in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let fd = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG) })?;
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Opens it in the network namespace of the socket behind `fd`, wherever the caller stands.
    /// Needs `CAP_SYS_ADMIN`. A thread enters the namespace for the purpose and ends.
    pub fn of_namespace(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // From include/uapi/linux/sockios.h: the namespace of a socket, as a descriptor.
        const SIOCGSKNS: libc::Ioctl = 0x894C;
        // SAFETY: the request takes no argument.
        let namespace = check(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS) })?;
        // SAFETY: a new descriptor that nobody else owns.
        let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
        let enter_and_open = move || {
            // SAFETY: no pointers; only this short-lived thread changes namespace.
            check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
            Self::open()
        };
        let thread = std::thread::Builder::new().spawn(enter_and_open)?;
        thread
            .join()
            .map_err(|_| io::Error::other("the thread that enters a namespace died"))?
    }

    /// Sends one request and reads its answer, a message of netlink; the length. Never waits: a
    /// request is answered before send returns.
    ///
    /// # Errors
    /// The kernel's, `NotFound` for a socket that is not there.
    pub fn ask(&self, request: &[u8], answer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: both slices are valid for their lengths.
        let length = unsafe {
            let (fd, room) = (self.0.as_raw_fd(), answer.len());
            check_length(libc::send(fd, request.as_ptr().cast(), request.len(), 0))?;
            let flags = libc::MSG_DONTWAIT;
            check_length(libc::recv(fd, answer.as_mut_ptr().cast(), room, flags))?
        };
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a cut off sock_diag answer");
        let word = |at: usize| {
            let bytes = answer[..length].get(at..at + 4).ok_or_else(malformed)?;
            Ok::<_, io::Error>(i32::from_ne_bytes(
                bytes.try_into().map_err(|_| malformed())?,
            ))
        };
        // nlmsg_type, in the low half of the second word (x86-64).
        if word(4)? & 0xffff == libc::NLMSG_ERROR {
            return Err(io::Error::from_raw_os_error(
                word(HEADER_BYTES)?.wrapping_neg(),
            ));
        }
        Ok(length)
    }
}
