//! What only sock_diag tells of a UDP socket.

use crate::sock_diag::{DiagSocket, HEADER_BYTES, inet_request};
use crate::sockopt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

/// Asks sock_diag about UDP sockets of the network namespace that it was opened in.
#[derive(Debug)]
pub struct UdpDiag(DiagSocket);

/// Of `struct inet_diag_msg` (include/uapi/linux/inet_diag.h), header included.
const ANSWER_BYTES: usize = HEADER_BYTES + 72;
const INET_DIAG_SHUTDOWN: u16 = 8;

impl UdpDiag {
    /// Opens it in the network namespace of the socket behind `fd`. Needs `CAP_SYS_ADMIN`.
    pub fn of_namespace(fd: BorrowedFd<'_>) -> io::Result<Self> {
        DiagSocket::of_namespace(fd).map(Self)
    }

    /// Which directions of the socket behind `fd`, connected between these addresses, are shut
    /// down: `SHUT_RD` is bit 0, `SHUT_WR` bit 1. `None` when the kernel does not say.
    pub fn shutdown(
        &self,
        fd: BorrowedFd<'_>,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<u8>> {
        let mut cookie = [0; 8];
        sockopt::get(fd, libc::SOL_SOCKET, libc::SO_COOKIE, &mut cookie)?;
        // For UDP the kernel looks for what a packet from the first to the second address would
        // reach (net/ipv4/udp_diag.c, udp_dump_one).
        let request = inet_request(libc::IPPROTO_UDP, remote, local, cookie);
        let mut answer = [0; 1024];
        let answer = match self.0.ask(&request, &mut answer) {
            Ok(length) => &answer[..length],
            // The kernel cannot be asked, or another socket would get that packet.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ESTALE) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        Ok(attribute(answer, INET_DIAG_SHUTDOWN))
    }
}

/// The first byte of an attribute.
fn attribute(answer: &[u8], wanted: u16) -> Option<u8> {
    let mut rest = answer.get(ANSWER_BYTES..)?;
    while let [a, b, c, d, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        if u16::from_ne_bytes([c, d]) == wanted && length > 4 {
            return rest.get(4).copied();
        }
        // Attributes are padded to four bytes, and at least as long as their own header.
        rest = rest.get((length.max(4) + 3) & !3..)?;
    }
    None
}
