//! Unix sockets: names, pairs, peeking at messages, and what sock_diag knows of them.
//!
//! The unsafe blocks pass pointers to live locals or slices with their lengths, read kernel structs
//! out of buffers only after checking that they fit, and take ownership of descriptors that the
//! kernel has just installed.
#![allow(unsafe_code)]

use crate::sock_diag::{DiagSocket, HEADER_BYTES, SOCK_DIAG_BY_FAMILY};
use crate::socket::{check, check_length};
use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// Longest `sun_path`.
const PATH_BYTES: usize = 108;

/// `sun_path`, without the NUL that ends a path or begins an abstract name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    Path(Vec<u8>),
    Abstract(Vec<u8>),
}

/// Two sockets connected to each other, close-on-exec. `kind` is `SOCK_*`.
pub fn pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: `ends` takes two descriptors.
    check(unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            kind | libc::SOCK_CLOEXEC,
            0,
            ends.as_mut_ptr(),
        )
    })?;
    // SAFETY: both are new and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Takes the first connection out of a listener's queue, close-on-exec.
pub fn accept(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: no address is asked for.
    let fd = check(unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The socket's own name; `None` when it has none.
pub fn local_name(fd: BorrowedFd<'_>) -> io::Result<Option<Name>> {
    read_name(|address, length| {
        // SAFETY: `address` is writable for `length` bytes.
        unsafe { libc::getsockname(fd.as_raw_fd(), address.cast(), length) }
    })
}

/// The peer's name; `None` when it has none. `ENOTCONN` without a peer.
pub fn peer_name(fd: BorrowedFd<'_>) -> io::Result<Option<Name>> {
    read_name(|address, length| {
        // SAFETY: `address` is writable for `length` bytes.
        unsafe { libc::getpeername(fd.as_raw_fd(), address.cast(), length) }
    })
}

pub fn bind(fd: BorrowedFd<'_>, name: &Name) -> io::Result<()> {
    let (address, length) = encode(name)?;
    // SAFETY: `address` is initialised for `length` bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) }).map(drop)
}

pub fn connect(fd: BorrowedFd<'_>, name: &Name) -> io::Result<()> {
    let (address, length) = encode(name)?;
    // SAFETY: `address` is initialised for `length` bytes.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) }).map(drop)
}

/// One message, or piece of a stream, that was looked at and left where it is.
#[derive(Clone, Copy, Debug)]
pub struct Peeked {
    /// Length of the whole message, even where less fitted.
    pub length_bytes: usize,
    /// It carries descriptors (`SCM_RIGHTS`).
    pub descriptors: bool,
}

/// Peeks behind the end of `buffer`, at most `limit` bytes, from where `SO_PEEK_OFF` says. `None`
/// when there is nothing more.
pub fn peek(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>, limit: usize) -> io::Result<Option<Peeked>> {
    buffer.reserve(limit);
    let room = &mut buffer.spare_capacity_mut()[..limit];
    let mut part = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: room.len(),
    };
    // Room for descriptors (SCM_MAX_FD is 253), credentials and a security label; aligned as
    // cmsghdr wants.
    let mut control = [0u64; 256];
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: all that `message` points to is writable for the lengths it says.
    let result = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, flags) };
    let length_bytes = match check_length(result) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        other => other?,
    };
    // SAFETY: the kernel filled `message` in, and `room` as far as the message reaches.
    unsafe {
        buffer.set_len(buffer.len() + length_bytes.min(limit));
        Ok(Some(Peeked {
            length_bytes,
            descriptors: close_descriptors(&message),
        }))
    }
}

/// Closes the descriptors that came with `message`; says whether there were any.
///
/// # Safety
/// `message` must be as recvmsg left it.
unsafe fn close_descriptors(message: &libc::msghdr) -> bool {
    let mut found = false;
    // SAFETY: the kernel wrote well-formed headers; descriptors in them are ours alone.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                found = true;
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<i32>();
                for index in 0..bytes / size_of::<i32>() {
                    drop(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    found
}

/// What sock_diag says of one Unix socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// It listens.
    pub listening: bool,
    /// The peer's inode: 0 when the peer has no descriptor, `None` without a peer.
    pub peer_inode: Option<u64>,
    /// `SHUT_RD` is bit 0, `SHUT_WR` bit 1.
    pub shutdown: u8,
    /// For a listener the connections that wait to be accepted, else unread bytes.
    pub waiting: u32,
    /// For a listener the backlog, else bytes that the peer has not read.
    pub limit: u32,
    /// The file that it is bound to: the low half of its inode, and its device as the kernel
    /// writes it (include/linux/kdev_t.h).
    pub file: Option<(u32, u32)>,
}

impl Facts {
    /// Whether this is the file that the socket is bound to.
    pub fn is_file(&self, file: &std::fs::Metadata) -> bool {
        let (major, minor) = (libc::major(file.dev()), libc::minor(file.dev()));
        self.file == Some((file.ino() as u32, major << 20 | minor))
    }
}

/// Asks sock_diag about Unix sockets of the network namespace that it was opened in.
#[derive(Debug)]
pub struct Diag(DiagSocket);

// From include/uapi/linux/unix_diag.h.
const UDIAG_SHOW_VFS: u32 = 0x2;
const UDIAG_SHOW_PEER: u32 = 0x4;
const UDIAG_SHOW_RQLEN: u32 = 0x10;
const UNIX_DIAG_VFS: u16 = 1;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// `TCP_LISTEN`, which Unix sockets borrow.
const STATE_LISTEN: u8 = 10;

#[repr(C)]
struct Request {
    header: libc::nlmsghdr,
    family: u8,
    protocol: u8,
    pad: u16,
    states: u32,
    inode: u32,
    show: u32,
    cookie: [u32; 2],
}

#[repr(C)]
struct Answer {
    family: u8,
    kind: u8,
    state: u8,
    pad: u8,
    inode: u32,
    cookie: [u32; 2],
}

impl Diag {
    /// Opens it in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        DiagSocket::open().map(Self)
    }

    /// Opens it in the network namespace of the socket behind `fd`, wherever the caller stands.
    /// Needs `CAP_SYS_ADMIN`.
    pub fn of_namespace(fd: BorrowedFd<'_>) -> io::Result<Self> {
        DiagSocket::of_namespace(fd).map(Self)
    }

    /// Asks for the socket with `inode`. `NotFound` when the namespace has none.
    pub fn query(&mut self, inode: u64) -> io::Result<Facts> {
        let inode = u32::try_from(inode).map_err(|_| io::ErrorKind::NotFound)?;
        let request = Request {
            header: libc::nlmsghdr {
                nlmsg_len: size_of::<Request>() as u32,
                nlmsg_type: SOCK_DIAG_BY_FAMILY,
                nlmsg_flags: libc::NLM_F_REQUEST as u16,
                nlmsg_seq: inode,
                nlmsg_pid: 0,
            },
            family: libc::AF_UNIX as u8,
            protocol: 0,
            pad: 0,
            states: u32::MAX,
            inode,
            show: UDIAG_SHOW_VFS | UDIAG_SHOW_PEER | UDIAG_SHOW_RQLEN,
            // INET_DIAG_NOCOOKIE
            cookie: [u32::MAX; 2],
        };
        // SAFETY: `request` is initialised and has no padding.
        let request = unsafe {
            std::slice::from_raw_parts((&raw const request).cast::<u8>(), size_of::<Request>())
        };
        let mut answer = [0u8; 1024];
        let length = self.0.ask(request, &mut answer)?;
        parse(&answer[..length])
    }
}

fn parse(message: &[u8]) -> io::Result<Facts> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a cut off sock_diag answer");
    let header_bytes = HEADER_BYTES;
    let mut facts = Facts::default();
    let state = message
        .get(header_bytes + offset_of!(Answer, state))
        .ok_or_else(malformed)?;
    facts.listening = *state == STATE_LISTEN;
    let mut at = header_bytes + size_of::<Answer>();
    while let (Some(length), Some(kind)) = (read_u16(message, at), read_u16(message, at + 2)) {
        match kind {
            UNIX_DIAG_VFS => {
                let file = (read_u32(message, at + 4), read_u32(message, at + 8));
                facts.file = file.0.zip(file.1);
            }
            UNIX_DIAG_PEER => facts.peer_inode = read_u32(message, at + 4).map(u64::from),
            UNIX_DIAG_RQLEN => {
                facts.waiting = read_u32(message, at + 4).ok_or_else(malformed)?;
                facts.limit = read_u32(message, at + 8).ok_or_else(malformed)?;
            }
            UNIX_DIAG_SHUTDOWN => {
                facts.shutdown = *message.get(at + 4).ok_or_else(malformed)?;
            }
            _ => {}
        }
        // Attributes are padded to four bytes, and at least as long as their own header.
        at += (usize::from(length).max(4) + 3) & !3;
    }
    Ok(facts)
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn encode(name: &Name) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // A path is followed by its NUL; an abstract name follows one.
    let (bytes, start) = match name {
        Name::Path(bytes) => (bytes, 0),
        Name::Abstract(bytes) => (bytes, 1),
    };
    if bytes.len() + 1 > PATH_BYTES {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in address.sun_path[start..].iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    Ok((address, length as libc::socklen_t))
}

fn read_name(
    call: impl FnOnce(*mut libc::sockaddr_un, *mut libc::socklen_t) -> libc::c_int,
) -> io::Result<Option<Name>> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    let mut length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    check(call(&raw mut address, &raw mut length))?;
    let path_bytes = (length as usize)
        .saturating_sub(offset_of!(libc::sockaddr_un, sun_path))
        .min(PATH_BYTES);
    let path: Vec<u8> = address.sun_path[..path_bytes]
        .iter()
        .map(|character| *character as u8)
        .collect();
    Ok(match path.split_first() {
        None => None,
        Some((0, name)) => Some(Name::Abstract(name.to_vec())),
        Some(_) => {
            let end = path
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(path.len());
            Some(Name::Path(path[..end].to_vec()))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuzz_unix_diag() {
        let mut answer = vec![0; HEADER_BYTES + size_of::<Answer>()];
        answer[HEADER_BYTES + offset_of!(Answer, state)] = STATE_LISTEN;
        for (kind, value) in [
            (UNIX_DIAG_PEER, &[7, 0, 0, 0][..]),
            (UNIX_DIAG_RQLEN, &[1, 0, 0, 0, 9, 0, 0, 0]),
            (UNIX_DIAG_SHUTDOWN, &[3, 0, 0, 0]),
        ] {
            answer.extend((4 + value.len() as u16).to_ne_bytes());
            answer.extend(kind.to_ne_bytes());
            answer.extend(value);
        }
        let facts = parse(&answer).expect("a whole answer");
        assert_eq!((facts.peer_inode, facts.waiting), (Some(7), 1));
        unbroken_fuzz::bytes("unix-diag", &[answer], |bytes| {
            let _ = parse(bytes);
        });
    }
}
