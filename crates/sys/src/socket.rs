//! Sockets of any family: creation, addresses, queues, flags.
//!
//! The unsafe blocks pass pointers to live locals or slices with their lengths, borrow descriptors
//! for one call, and wrap a descriptor number only when the kernel has just handed it out.
#![allow(unsafe_code)]

use crate::sockopt;
use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

// From include/uapi/asm-generic/sockios.h and include/uapi/linux/sockios.h.
const SIOCINQ: libc::Ioctl = 0x541B;
const SIOCATMARK: libc::Ioctl = 0x8905;
const SIOCOUTQ: libc::Ioctl = 0x5411;

/// A new socket, close-on-exec. `kind` is `SOCK_*` and may carry `SOCK_NONBLOCK`.
pub fn open(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    // SAFETY: a non-negative result is a new descriptor that nobody else owns.
    check(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives the socket a local address.
pub fn bind(fd: BorrowedFd<'_>, address: &SocketAddr) -> io::Result<()> {
    let (storage, length) = encode(address);
    // SAFETY: `storage` is initialised for `length` bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const storage).cast(), length) }).map(drop)
}

/// Connects the socket; on a non-blocking one that has to wait the error is `EINPROGRESS`.
pub fn connect(fd: BorrowedFd<'_>, address: &SocketAddr) -> io::Result<()> {
    let (storage, length) = encode(address);
    // SAFETY: `storage` is initialised for `length` bytes.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const storage).cast(), length) }).map(drop)
}

pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// `how` is `SHUT_RD`, `SHUT_WR` or `SHUT_RDWR`.
pub fn shutdown(fd: BorrowedFd<'_>, how: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
}

/// The socket's own address (`getsockname`). `InvalidData` for a family that is not IP.
pub fn local_address(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    // SAFETY: an all-zero sockaddr_storage is valid.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: `storage` is writable for `length` bytes.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut storage).cast(), &mut length) })?;
    decode(&storage)
}

/// The peer's address by `SO_PEERNAME`, which, unlike `getpeername`, also answers while connecting
/// and after a reset (net/ipv4/af_inet.c, `inet_getname` with peer 2). `ENOTCONN` when the socket
/// never had one.
pub fn peer_address(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let mut bytes = [0u8; size_of::<libc::sockaddr_in6>()];
    // The kernel wants no more room than the address takes (net/core/sock.c).
    let whole = sockopt::get(fd, libc::SOL_SOCKET, sockopt::SO_PEERNAME, &mut bytes);
    if whole
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
    {
        let short = &mut bytes[..size_of::<libc::sockaddr_in>()];
        sockopt::get(fd, libc::SOL_SOCKET, sockopt::SO_PEERNAME, short)?;
    } else {
        whole?;
    }
    // SAFETY: an all-zero sockaddr_storage is valid.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    // SAFETY: sockaddr_storage is larger than sockaddr_in6 and any bytes are valid in it.
    unsafe {
        (&raw mut storage)
            .cast::<u8>()
            .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
    }
    decode(&storage)
}

/// Sends what fits; `flags` are `MSG_*`. Never raises SIGPIPE.
pub fn send(fd: BorrowedFd<'_>, bytes: &[u8], flags: i32) -> io::Result<usize> {
    // SAFETY: `bytes` is readable for its length.
    let result = unsafe {
        libc::send(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags | libc::MSG_NOSIGNAL,
        )
    };
    check_length(result)
}

/// Receives up to `limit` bytes behind the end of `buffer`, which grows as needed and keeps its
/// capacity for the next use. Returns how many bytes came.
pub fn receive_into(
    fd: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    limit: usize,
    flags: i32,
) -> io::Result<usize> {
    buffer.reserve(limit);
    let room = &mut buffer.spare_capacity_mut()[..limit];
    // SAFETY: `room` is writable for `limit` bytes; the kernel only writes.
    let result = unsafe { libc::recv(fd.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), flags) };
    let received = check_length(result)?;
    // With MSG_TRUNC the kernel returns the length of the datagram, not of what it wrote.
    let written = received.min(limit);
    // SAFETY: the kernel initialised `written` bytes behind the old end.
    unsafe { buffer.set_len(buffer.len() + written) };
    Ok(received)
}

/// Like [`receive_into`] for one datagram; returns who sent it.
pub fn receive_from(
    fd: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    limit: usize,
    flags: i32,
) -> io::Result<SocketAddr> {
    buffer.reserve(limit);
    let room = &mut buffer.spare_capacity_mut()[..limit];
    // SAFETY: an all-zero sockaddr_storage is valid.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: `room` and `storage` are writable for the lengths given.
    let result = unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            room.as_mut_ptr().cast(),
            room.len(),
            flags,
            (&raw mut storage).cast(),
            &mut length,
        )
    };
    let written = check_length(result)?.min(limit);
    // SAFETY: the kernel initialised `written` bytes behind the old end.
    unsafe { buffer.set_len(buffer.len() + written) };
    decode(&storage)
}

/// Bytes that a read would find (`SIOCINQ`); a TCP FIN is not counted.
pub fn unread_bytes(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_i32(fd, SIOCINQ)
}

/// Whether the next byte to be read is an urgent one, read already or not (`SIOCATMARK`).
pub fn is_at_mark(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(ioctl_i32(fd, SIOCATMARK)? != 0)
}

/// Bytes written and not acknowledged (`SIOCOUTQ`). TCP counts a queued FIN as one byte.
pub fn unacknowledged_bytes(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_i32(fd, SIOCOUTQ)
}

/// The description's flags (`F_GETFL`).
pub fn status_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })
}

/// Sets the description's flags (`F_SETFL`).
pub fn set_status_flags(fd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// What `poll(2)` reports of `events`, waiting at most `timeout`. `POLLERR` and `POLLHUP` are
/// always reported.
pub fn poll(fd: BorrowedFd<'_>, events: i16, timeout: Duration) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one live entry.
    check(unsafe { libc::poll(&mut entry, 1, timeout_ms) })?;
    Ok(entry.revents)
}

/// The socket's inode on sockfs, as `/proc/PID/fd` and sock_diag show it.
pub fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: an all-zero stat is valid.
    let mut stat: libc::stat = unsafe { zeroed() };
    // SAFETY: `stat` is writable.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) })?;
    Ok(stat.st_ino)
}

/// `address` in the kernel's form, with its length.
pub(crate) fn encode(address: &SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: an all-zero sockaddr_storage is valid.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let length = match address {
        SocketAddr::V4(v4) => {
            let kernel = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is large enough and aligned for every sockaddr.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(kernel) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let kernel = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe {
                (&raw mut storage)
                    .cast::<libc::sockaddr_in6>()
                    .write(kernel)
            };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, length as libc::socklen_t)
}

/// The address in the kernel's `storage`.
pub(crate) fn decode(storage: &libc::sockaddr_storage) -> io::Result<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the storage holds a sockaddr_in.
            let kernel = unsafe { (&raw const *storage).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(kernel.sin_addr.s_addr.to_ne_bytes());
            Ok(SocketAddrV4::new(ip, u16::from_be(kernel.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that the storage holds a sockaddr_in6.
            let kernel = unsafe { (&raw const *storage).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(kernel.sin6_addr.s6_addr);
            let port = u16::from_be(kernel.sin6_port);
            Ok(SocketAddrV6::new(ip, port, kernel.sin6_flowinfo, kernel.sin6_scope_id).into())
        }
        family => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("address family {family} is not IP"),
        )),
    }
}

fn ioctl_i32(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: these requests write one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &mut value) })?;
    Ok(u32::try_from(value).unwrap_or(0))
}

pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result >= 0 {
        Ok(result)
    } else {
        Err(io::Error::last_os_error())
    }
}

pub(crate) fn check_length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
