//! The socket through which the kernel answers questions about other sockets (sock_diag(7)).
//!
//! The unsafe blocks pass pointers to slices with their lengths and take ownership of descriptors
//! that the kernel has just installed.
#![allow(unsafe_code)]

use crate::socket::{check, check_length};
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// From include/uapi/linux/sock_diag.h.
pub(crate) const SOCK_DIAG_BY_FAMILY: u16 = 20;
pub(crate) const HEADER_BYTES: usize = size_of::<libc::nlmsghdr>();
/// Of `struct inet_diag_req_v2` (include/uapi/linux/inet_diag.h), header included.
const INET_REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// `INET_DIAG_NOCOOKIE`, twice.
pub(crate) const NO_COOKIE: [u8; 8] = [0xff; 8];

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

/// A question about one socket. A connection over IPv4 that an IPv6 socket has is asked for as what it is on the wire.
pub(crate) fn inet_request(
    protocol: i32,
    local: SocketAddr,
    remote: SocketAddr,
    cookie: [u8; 8],
) -> [u8; INET_REQUEST_BYTES] {
    let mut bytes = [0; INET_REQUEST_BYTES];
    let family = match local.ip().to_canonical() {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    bytes[..4].copy_from_slice(&(INET_REQUEST_BYTES as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    let body = &mut bytes[HEADER_BYTES..];
    body[0] = family as u8;
    body[1] = protocol as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    body[8..10].copy_from_slice(&local.port().to_be_bytes());
    body[10..12].copy_from_slice(&remote.port().to_be_bytes());
    for (at, address) in [(12, local), (28, remote)] {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => body[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => body[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    body[48..56].copy_from_slice(&cookie);
    bytes
}
