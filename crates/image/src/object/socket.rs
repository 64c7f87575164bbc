use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// One `setsockopt` that brings a socket to where it was: `(level, name, value)`, already in the
/// form that `setsockopt` wants (halved buffer sizes and the like).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    pub level: i32,
    pub name: i32,
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// An internet address with its IPv6 scope; IPv4-mapped addresses stay as the socket shows them.
pub type SocketAddress = SocketAddr;

/// Where a connection stands, in the words of RFC 9293 and `include/net/tcp_states.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TcpPhase {
    Established,
    SynSent,
    FinWait1,
    FinWait2,
    CloseWait,
    LastAck,
    Closing,
    /// Reset or never connected.
    Closed,
}

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpWindow {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}

/// A TCP socket that is not a listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpConnection {
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    pub flags: i32,
    pub phase: TcpPhase,
    pub local: SocketAddress,
    pub remote: SocketAddress,
    /// Sequence number of the first byte of `send_queue` (`snd_una`).
    pub send_sequence: u32,
    /// Everything the program wrote that the peer has not acknowledged.
    #[serde(with = "serde_bytes")]
    pub send_queue: Vec<u8>,
    /// How many bytes of `send_queue` the kernel had handed to the network (`snd_nxt`).
    pub sent_bytes: u32,
    /// In the phases with an unacknowledged FIN of this side: whether the kernel had handed that
    /// FIN to the network. It is no byte of `send_queue`.
    pub fin_sent: bool,
    /// Sequence number of the first byte of `receive_queue`.
    pub receive_sequence: u32,
    /// Bytes that the kernel acknowledged and the program has not read.
    #[serde(with = "serde_bytes")]
    pub receive_queue: Vec<u8>,
    pub window: TcpWindow,
    /// `TCPI_OPT_*` negotiated.
    pub options: u32,
    pub mss_clamp: u32,
    pub send_window_scale: u8,
    pub receive_window_scale: u8,
    /// The socket's timestamp clock (`TCP_TIMESTAMP`) at `timestamp_read_at_ns`; 0 without
    /// timestamps.
    pub timestamp: u32,
    /// `CLOCK_MONOTONIC` of the service when `timestamp` was read. The offset between the two
    /// clocks never changes, so an old pair is as good as a new one.
    pub timestamp_read_at_ns: u64,
    /// The pending error of a closed socket, 0 for none. The kernel shows only that there is one
    /// (`POLLERR`); reading which would take it from the service, so it is `ECONNRESET`.
    pub error: i32,
    pub corked: bool,
    /// The service called `shutdown(SHUT_RD)`, or the peer's FIN did the same to its reads.
    pub receive_shut: bool,
    pub socket_options: Vec<SocketOption>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpListener {
    pub family: i32,
    pub flags: i32,
    pub local: SocketAddress,
    pub backlog: i32,
    pub socket_options: Vec<SocketOption>,
    /// Bound but not yet listening when false.
    pub listening: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpSocket {
    pub family: i32,
    pub flags: i32,
    pub local: Option<SocketAddress>,
    pub remote: Option<SocketAddress>,
    pub socket_options: Vec<SocketOption>,
    /// Unread datagrams and who sent them.
    pub queue: Vec<(SocketAddress, Vec<u8>)>,
    /// `SHUT_RD` (bit 0) and `SHUT_WR` (bit 1).
    pub shutdown: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixKind {
    Stream,
    Datagram,
    SequencedPacket,
}

/// `sun_path`: a filesystem path, or an abstract name without its leading NUL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixAddress {
    Path(String),
    /// A path that is no absolute one, and where it was bound.
    Relative {
        directory: String,
        path: String,
    },
    Abstract(Vec<u8>),
}

/// One queued message; a stream is one message an skb, borders not kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    pub kind: UnixKind,
    pub flags: i32,
    /// The socket's inode on sockfs.
    pub inode: u64,
    /// The inode of the socket at the other end, in the tree (`socketpair`, or a connection to an
    /// own listener) or outside of it; `None` when that has no descriptor.
    pub peer_inode: Option<u64>,
    /// It has a peer, be it one that has closed its end or is not accepted yet.
    pub connected: bool,
    pub local: Option<UnixAddress>,
    /// The name of the peer, as of a listener or of `/dev/log`.
    pub connected_to: Option<UnixAddress>,
    /// The backlog of a listener.
    pub backlog: Option<i32>,
    /// Unread messages.
    pub queue: Vec<UnixMessage>,
    /// `SHUT_RD` (bit 0) and `SHUT_WR` (bit 1).
    pub shutdown: u8,
    pub socket_options: Vec<SocketOption>,
}
