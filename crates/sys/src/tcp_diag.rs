//! What has become of a TCP connection that no descriptor names any more.

use crate::sock_diag::{DiagSocket, HEADER_BYTES, NO_COOKIE, inet_request};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

/// Asks sock_diag about TCP sockets of the network namespace that it was opened in.
#[derive(Debug)]
pub struct TcpDiag(DiagSocket);

/// Of `struct inet_diag_msg`: the family, then the state.
const STATE_OFFSET: usize = HEADER_BYTES + 1;
impl TcpDiag {
    /// Opens it in the network namespace of the socket behind `fd`. Needs `CAP_SYS_ADMIN`.
    pub fn of_namespace(fd: BorrowedFd<'_>) -> io::Result<Self> {
        DiagSocket::of_namespace(fd).map(Self)
    }

    /// The state (`crate::tcp::state`) of the connection between two addresses, `None` when the
    /// kernel knows of none. A port that listens answers for connections that it does not have.
    pub fn state(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u8>> {
        let request = inet_request(libc::IPPROTO_TCP, local, remote, NO_COOKIE);
        let mut answer = [0; 1024];
        match self.0.ask(&request, &mut answer) {
            Ok(length) => Ok(answer[..length].get(STATE_OFFSET).copied()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
