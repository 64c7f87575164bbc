//! What only TCP sockets have: `TCP_INFO` and repair mode (`man 7 tcp`, net/ipv4/tcp.c).
//!
//! The unsafe blocks view plain `repr(C)` structs without padding or references as bytes, in which
//! every bit pattern is valid, and read the clock into a live local.
#![allow(unsafe_code)]

use crate::sockopt;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::BorrowedFd;

// From include/uapi/linux/tcp.h; the libc crate lacks them for this target.
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

/// `TCPI_OPT_*` bits of [`Info::options`].
pub mod negotiated {
    pub const TIMESTAMPS: u8 = 1;
    pub const SACK: u8 = 2;
    pub const WINDOW_SCALE: u8 = 4;
    pub const MICROSECOND_TIMESTAMPS: u8 = 64;
}

/// States of include/net/tcp_states.h, as [`Info::state`] shows them.
pub mod state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECEIVED: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const TIME_WAIT: u8 = 6;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// `struct tcp_info` up to `tcpi_rcv_wnd` (Linux 6.2).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Info {
    pub state: u8,
    pub congestion_state: u8,
    pub retransmits: u8,
    pub probes: u8,
    pub backoff: u8,
    pub options: u8,
    /// Send scale in the low half, receive scale in the high half.
    pub window_scales: u8,
    pub delivery_flags: u8,
    pub rto_us: u32,
    pub ato_us: u32,
    pub send_mss: u32,
    pub receive_mss: u32,
    /// Segments in flight; for a listener the length of its accept queue.
    pub unacked: u32,
    /// Segments that SACK covers; for a listener its backlog.
    pub sacked: u32,
    pub lost: u32,
    pub retransmitted: u32,
    pub fackets: u32,
    pub last_data_sent_ms: u32,
    pub last_ack_sent_ms: u32,
    pub last_data_received_ms: u32,
    pub last_ack_received_ms: u32,
    pub path_mtu: u32,
    pub receive_slow_start_threshold: u32,
    pub rtt_us: u32,
    pub rtt_variance_us: u32,
    pub send_slow_start_threshold: u32,
    pub congestion_window: u32,
    pub advertised_mss: u32,
    pub reordering: u32,
    pub receive_rtt_us: u32,
    pub receive_space: u32,
    pub total_retransmitted: u32,
    pub pacing_rate: u64,
    pub max_pacing_rate: u64,
    pub bytes_acked: u64,
    pub bytes_received: u64,
    pub segments_out: u32,
    pub segments_in: u32,
    pub not_sent_bytes: u32,
    pub minimum_rtt_us: u32,
    pub data_segments_in: u32,
    pub data_segments_out: u32,
    pub delivery_rate: u64,
    pub busy_time_us: u64,
    pub receive_window_limited_us: u64,
    pub send_buffer_limited_us: u64,
    pub delivered: u32,
    pub delivered_ce: u32,
    pub bytes_sent: u64,
    pub bytes_retransmitted: u64,
    pub dsack_duplicates: u32,
    pub reorder_seen: u32,
    pub received_out_of_order: u32,
    /// The peer's window, scaled.
    pub send_window: u32,
    /// The window last offered to the peer, scaled.
    pub receive_window: u32,
    pub rehash: u32,
}

impl Info {
    pub fn send_scale(&self) -> u8 {
        self.window_scales & 0xf
    }

    pub fn receive_scale(&self) -> u8 {
        self.window_scales >> 4
    }
}

/// `struct tcp_repair_window`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairWindow {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}

/// Repair mode on, or off without the window probe that plain off sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    On,
    OffSilently,
}

/// What `TCP_REPAIR_QUEUE` selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    Receive,
    Send,
}

/// One negotiated option, as `TCP_REPAIR_OPTIONS` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairOption {
    MaximumSegment(u16),
    WindowScale { send: u8, receive: u8 },
    SackPermitted,
    Timestamps,
}

impl RepairOption {
    const KINDS: usize = 4;
}

/// `TCP_INFO`. `InvalidData` on a kernel whose answer ends before `tcpi_rcv_wnd`.
pub fn info(fd: BorrowedFd<'_>) -> io::Result<Info> {
    // SAFETY: Info is plain integers.
    let mut info: Info = unsafe { zeroed() };
    // SAFETY: Info is plain integers without padding, so any bytes written are valid.
    let bytes =
        unsafe { std::slice::from_raw_parts_mut((&raw mut info).cast::<u8>(), size_of::<Info>()) };
    let length = sockopt::get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, bytes)?;
    if length < std::mem::offset_of!(Info, rehash) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "this kernel's TCP_INFO has no tcpi_rcv_wnd; Linux 6.2 or later is needed",
        ));
    }
    Ok(info)
}

/// Switches repair mode; needs `CAP_NET_ADMIN` and a socket that does not listen. Both ways lose
/// `SO_REUSEADDR`: on forces it, off clears it.
pub fn repair(fd: BorrowedFd<'_>, mode: Repair) -> io::Result<()> {
    let value = match mode {
        Repair::On => 1,
        Repair::OffSilently => -1,
    };
    sockopt::set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR, value)
}

/// Whether it was switched on and not off.
pub fn is_in_repair(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(sockopt::get_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR)? != 0)
}

/// Selects the queue that sends and receives work on in repair mode.
pub fn select_queue(fd: BorrowedFd<'_>, queue: Queue) -> io::Result<()> {
    let value = match queue {
        Queue::Receive => 1,
        Queue::Send => 2,
    };
    sockopt::set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, value)
}

/// The sequence number behind the last byte of the selected queue (`write_seq` or `rcv_nxt`).
pub fn queue_sequence(fd: BorrowedFd<'_>) -> io::Result<u32> {
    sockopt::get_i32(fd, libc::IPPROTO_TCP, TCP_QUEUE_SEQ).map(i32::cast_unsigned)
}

/// Sets the selected queue's sequence number; only before the socket is connected.
pub fn set_queue_sequence(fd: BorrowedFd<'_>, sequence: u32) -> io::Result<()> {
    sockopt::set_i32(fd, libc::IPPROTO_TCP, TCP_QUEUE_SEQ, sequence.cast_signed())
}

/// Reads the window variables; in repair mode.
pub fn repair_window(fd: BorrowedFd<'_>) -> io::Result<RepairWindow> {
    let mut window = RepairWindow::default();
    // SAFETY: RepairWindow is five u32 without padding, so any bytes written are valid.
    let bytes = unsafe {
        std::slice::from_raw_parts_mut((&raw mut window).cast::<u8>(), size_of::<RepairWindow>())
    };
    sockopt::get(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, bytes)?;
    Ok(window)
}

/// Sets the window variables; in repair mode, after the queues. `EINVAL` when they contradict each
/// other or `rcv_nxt` (net/ipv4/tcp.c, `tcp_repair_set_window`).
pub fn set_repair_window(fd: BorrowedFd<'_>, window: &RepairWindow) -> io::Result<()> {
    // SAFETY: RepairWindow is five u32 without padding.
    let bytes = unsafe {
        std::slice::from_raw_parts(
            std::ptr::from_ref(window).cast::<u8>(),
            size_of::<RepairWindow>(),
        )
    };
    sockopt::set(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, bytes)
}

/// Sets what the handshake had negotiated; in repair mode, connected, before anything is sent.
pub fn set_repair_options(fd: BorrowedFd<'_>, options: &[RepairOption]) -> io::Result<()> {
    let mut bytes = [0; 8 * RepairOption::KINDS];
    let room = bytes.chunks_exact_mut(8);
    if options.len() > room.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (entry, option) in room.zip(options) {
        // Codes are TCPOPT_* of include/net/tcp.h.
        let (code, value): (u32, u32) = match *option {
            RepairOption::MaximumSegment(bytes) => (2, u32::from(bytes)),
            RepairOption::WindowScale { send, receive } => {
                (3, u32::from(send) | u32::from(receive) << 16)
            }
            RepairOption::SackPermitted => (4, 0),
            RepairOption::Timestamps => (8, 0),
        };
        entry[..4].copy_from_slice(&code.to_ne_bytes());
        entry[4..].copy_from_slice(&value.to_ne_bytes());
    }
    sockopt::set(
        fd,
        libc::IPPROTO_TCP,
        TCP_REPAIR_OPTIONS,
        &bytes[..8 * options.len()],
    )
}

/// The socket's timestamp clock now. The lowest bit says that it counts microseconds, not
/// milliseconds.
pub fn timestamp(fd: BorrowedFd<'_>) -> io::Result<u32> {
    sockopt::get_i32(fd, libc::IPPROTO_TCP, TCP_TIMESTAMP).map(i32::cast_unsigned)
}

/// Makes the socket's timestamp clock read `timestamp` now; in repair mode. The lowest bit selects
/// microseconds.
pub fn set_timestamp(fd: BorrowedFd<'_>, timestamp: u32) -> io::Result<()> {
    sockopt::set_i32(
        fd,
        libc::IPPROTO_TCP,
        TCP_TIMESTAMP,
        timestamp.cast_signed(),
    )
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock behind TCP timestamps (`tcp_clock_ns`), as the
/// calling thread's time namespace shifts it.
pub fn clock_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable; CLOCK_MONOTONIC always exists, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}
