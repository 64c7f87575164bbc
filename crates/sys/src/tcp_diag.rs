//! What has become of a TCP connection that no descriptor names any more.

use crate::sock_diag::{DiagSocket, HEADER_BYTES, SOCK_DIAG_BY_FAMILY};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

/// Asks sock_diag about TCP sockets of the network namespace that it was opened in.
#[derive(Debug)]
pub struct TcpDiag(DiagSocket);

/// Of `struct inet_diag_req_v2` (include/uapi/linux/inet_diag.h), header included.
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// Of `struct inet_diag_msg`: the family, then the state.
const STATE_OFFSET: usize = HEADER_BYTES + 1;
/// `INET_DIAG_NOCOOKIE`, twice.
const NO_COOKIE: [u8; 8] = [0xff; 8];

impl TcpDiag {
    /// Opens it in the network namespace of the socket behind `fd`. Needs `CAP_SYS_ADMIN`.
    pub fn of_namespace(fd: BorrowedFd<'_>) -> io::Result<Self> {
        DiagSocket::of_namespace(fd).map(Self)
    }

    /// The state (`crate::tcp::state`) of the connection between two addresses, `None` when the
    /// kernel knows of none. A port that listens answers for connections that it does not have.
    pub fn state(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u8>> {
        let mut answer = [0; 1024];
        match self.0.ask(&request(local, remote), &mut answer) {
            Ok(length) => Ok(answer[..length].get(STATE_OFFSET).copied()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A connection over IPv4 that an IPv6 socket has is asked for as what it is on the wire.
fn request(local: SocketAddr, remote: SocketAddr) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let family = match local.ip().to_canonical() {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    bytes[..4].copy_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    let body = &mut bytes[HEADER_BYTES..];
    body[0] = family as u8;
    body[1] = libc::IPPROTO_TCP as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    body[8..10].copy_from_slice(&local.port().to_be_bytes());
    body[10..12].copy_from_slice(&remote.port().to_be_bytes());
    for (at, address) in [(12, local), (28, remote)] {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => body[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => body[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    body[48..56].copy_from_slice(&NO_COOKIE);
    bytes
}
