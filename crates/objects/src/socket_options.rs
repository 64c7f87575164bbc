//! Socket options: which ones there are, what a fresh socket has, and when they can be put back.
//!
//! Only what differs from a fresh socket is captured. Where the default belongs to the network
//! namespace (sysctl) the option is always captured: the capture runs outside the service's
//! namespace and cannot know the default. A default that a later kernel changes costs only a
//! redundant entry.

use crate::Error;
use std::io;
use std::os::fd::BorrowedFd;
use unbroken_image::object::SocketOption;
use unbroken_sys::sockopt;

/// When an option is put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It decides which address or route the socket may take.
    BeforeBind,
    /// It needs, or tolerates, a bound or connected socket.
    AfterConnect,
    /// It gets in the way of the restore itself: forced reuse and buffers large enough for the
    /// queues come first, and leaving repair mode clears `SO_REUSEADDR`.
    Last,
}

/// Which sockets have the option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Any,
    Unix,
    Ip,
    /// Multicast: `setsockopt` refuses it on streams (net/ipv4/ip_sockglue.c).
    IpDatagram,
    Ipv6,
    Ipv6Datagram,
    Tcp,
    Udp,
}

/// What a fresh socket answers.
#[derive(Clone, Copy, Debug)]
enum Fresh {
    /// This value, zero-extended over the option's size.
    Value(i32),
    /// Every byte 0xff.
    Ones,
    /// An answer of no bytes.
    Empty,
    /// Whatever the namespace says.
    OfNamespace,
}

struct Known {
    scope: Scope,
    level: i32,
    name: i32,
    size_bytes: usize,
    fresh: Fresh,
    moment: Moment,
}

const fn known(scope: Scope, name: i32, fresh: Fresh, moment: Moment) -> Known {
    let level = match scope {
        Scope::Any | Scope::Unix => libc::SOL_SOCKET,
        Scope::Ip | Scope::IpDatagram => libc::IPPROTO_IP,
        Scope::Ipv6 | Scope::Ipv6Datagram => libc::IPPROTO_IPV6,
        Scope::Tcp => libc::IPPROTO_TCP,
        Scope::Udp => libc::IPPROTO_UDP,
    };
    Known {
        scope,
        level,
        name,
        size_bytes: 4,
        fresh,
        moment,
    }
}

const fn sized(size_bytes: usize, mut option: Known) -> Known {
    option.size_bytes = size_bytes;
    option
}

use Fresh::{Empty, OfNamespace, Ones, Value};
use Moment::{AfterConnect, BeforeBind, Last};
use Scope::{Any, Ip, IpDatagram, Ipv6, Ipv6Datagram, Tcp, Udp, Unix};

/// Longest option value below (`IP_OPTIONS`).
const LONGEST_VALUE_BYTES: usize = 40;

/// Every option that can be read and set again. `IP_TOS` also sets the priority, so `SO_PRIORITY`
/// comes after it. Names without a constant in the libc crate are from the kernel's
/// include/uapi/linux/{in,in6,tcp,udp}.h and asm-generic/socket.h.
#[rustfmt::skip]
static KNOWN: &[Known] = &[
    known(Ipv6, libc::IPV6_V6ONLY, Value(0), BeforeBind),
    known(Ipv6, 75 /* IPV6_TRANSPARENT */, Value(0), BeforeBind),
    known(Ipv6, 78 /* IPV6_FREEBIND */, Value(0), BeforeBind),
    known(Ip, libc::IP_TRANSPARENT, Value(0), BeforeBind),
    known(Ip, libc::IP_FREEBIND, Value(0), BeforeBind),
    known(Ip, libc::IP_BIND_ADDRESS_NO_PORT, Value(0), BeforeBind),
    known(Ip, 51 /* IP_LOCAL_PORT_RANGE */, Value(0), BeforeBind),
    known(Any, libc::SO_REUSEPORT, Value(0), BeforeBind),
    known(Any, libc::SO_MARK, Value(0), BeforeBind),
    sized(16, known(Any, libc::SO_BINDTODEVICE, Empty, BeforeBind)),
    sized(16, known(Tcp, libc::TCP_CONGESTION, OfNamespace, BeforeBind)),

    known(Ip, libc::IP_TOS, Value(0), AfterConnect),
    known(Ip, libc::IP_TTL, OfNamespace, AfterConnect),
    known(Ip, libc::IP_MTU_DISCOVER, Value(1), AfterConnect),
    known(Ip, libc::IP_PKTINFO, Value(0), AfterConnect),
    known(Ip, libc::IP_RECVERR, Value(0), AfterConnect),
    known(Ip, libc::IP_RECVTTL, Value(0), AfterConnect),
    known(Ip, libc::IP_RECVTOS, Value(0), AfterConnect),
    known(Ip, libc::IP_RECVOPTS, Value(0), AfterConnect),
    known(Ip, libc::IP_RETOPTS, Value(0), AfterConnect),
    known(Ip, libc::IP_RECVORIGDSTADDR, Value(0), AfterConnect),
    known(Ip, 21 /* IP_MINTTL */, Value(0), AfterConnect),
    known(Ip, 25 /* IP_RECVFRAGSIZE */, Value(0), AfterConnect),
    known(Ip, 26 /* IP_RECVERR_RFC4884 */, Value(0), AfterConnect),
    known(IpDatagram, libc::IP_MULTICAST_TTL, Value(1), AfterConnect),
    known(IpDatagram, libc::IP_MULTICAST_LOOP, Value(1), AfterConnect),
    known(IpDatagram, libc::IP_MULTICAST_IF, Value(0), AfterConnect),
    known(IpDatagram, 49 /* IP_MULTICAST_ALL */, Value(1), AfterConnect),
    sized(LONGEST_VALUE_BYTES, known(Ip, 4 /* IP_OPTIONS */, Empty, AfterConnect)),

    known(Ipv6, libc::IPV6_UNICAST_HOPS, OfNamespace, AfterConnect),
    known(Ipv6, libc::IPV6_TCLASS, Value(0), AfterConnect),
    known(Ipv6, libc::IPV6_RECVTCLASS, Value(0), AfterConnect),
    known(Ipv6, libc::IPV6_RECVPKTINFO, Value(0), AfterConnect),
    known(Ipv6, libc::IPV6_RECVHOPLIMIT, Value(0), AfterConnect),
    known(Ipv6, libc::IPV6_RECVERR, Value(0), AfterConnect),
    known(Ipv6, libc::IPV6_MTU_DISCOVER, Value(1), AfterConnect),
    known(Ipv6, 62 /* IPV6_DONTFRAG */, Value(0), AfterConnect),
    known(Ipv6, 11 /* IPV6_FLOWINFO */, Value(0), AfterConnect),
    known(Ipv6, 33 /* IPV6_FLOWINFO_SEND */, Value(0), AfterConnect),
    known(Ipv6, 70 /* IPV6_AUTOFLOWLABEL */, Value(1), AfterConnect),
    known(Ipv6, 73 /* IPV6_MINHOPCOUNT */, Value(0), AfterConnect),
    known(Ipv6Datagram, libc::IPV6_MULTICAST_HOPS, Value(1), AfterConnect),
    known(Ipv6Datagram, libc::IPV6_MULTICAST_LOOP, Value(1), AfterConnect),
    known(Ipv6Datagram, libc::IPV6_MULTICAST_IF, Value(0), AfterConnect),
    known(Ipv6Datagram, 29 /* IPV6_MULTICAST_ALL */, Value(1), AfterConnect),

    known(Tcp, libc::TCP_NODELAY, Value(0), AfterConnect),
    known(Tcp, libc::TCP_KEEPIDLE, OfNamespace, AfterConnect),
    known(Tcp, libc::TCP_KEEPINTVL, OfNamespace, AfterConnect),
    known(Tcp, libc::TCP_KEEPCNT, OfNamespace, AfterConnect),
    known(Tcp, libc::TCP_SYNCNT, OfNamespace, AfterConnect),
    known(Tcp, libc::TCP_LINGER2, OfNamespace, AfterConnect),
    known(Tcp, libc::TCP_DEFER_ACCEPT, Value(0), AfterConnect),
    known(Tcp, libc::TCP_QUICKACK, Value(1), AfterConnect),
    known(Tcp, libc::TCP_THIN_LINEAR_TIMEOUTS, Value(0), AfterConnect),
    known(Tcp, libc::TCP_USER_TIMEOUT, Value(0), AfterConnect),
    known(Tcp, libc::TCP_FASTOPEN, Value(0), AfterConnect),
    known(Tcp, 25 /* TCP_NOTSENT_LOWAT */, Value(0), AfterConnect),
    known(Tcp, 27 /* TCP_SAVE_SYN */, Value(0), AfterConnect),
    known(Tcp, 34 /* TCP_FASTOPEN_NO_COOKIE */, Value(0), AfterConnect),
    known(Tcp, 36 /* TCP_INQ */, Value(0), AfterConnect),
    known(Tcp, 37 /* TCP_TX_DELAY */, Value(0), AfterConnect),
    known(Tcp, 44 /* TCP_RTO_MAX_MS */, Value(120_000), AfterConnect),
    known(Tcp, 45 /* TCP_RTO_MIN_US */, Value(200_000), AfterConnect),

    known(Udp, 1 /* UDP_CORK */, Value(0), AfterConnect),
    known(Udp, 101 /* UDP_NO_CHECK6_TX */, Value(0), AfterConnect),
    known(Udp, 102 /* UDP_NO_CHECK6_RX */, Value(0), AfterConnect),
    known(Udp, 103 /* UDP_SEGMENT */, Value(0), AfterConnect),
    known(Udp, 104 /* UDP_GRO */, Value(0), AfterConnect),

    known(Unix, libc::SO_PASSCRED, Value(0), AfterConnect),
    known(Unix, libc::SO_PASSSEC, Value(0), AfterConnect),
    known(Unix, 76 /* SO_PASSPIDFD */, Value(0), AfterConnect),
    known(Unix, 83 /* SO_PASSRIGHTS */, Value(1), AfterConnect),

    known(Any, libc::SO_BROADCAST, Value(0), AfterConnect),
    known(Any, libc::SO_NO_CHECK, Value(0), AfterConnect),
    known(Any, libc::SO_DONTROUTE, Value(0), AfterConnect),
    known(Any, libc::SO_KEEPALIVE, Value(0), AfterConnect),
    known(Any, libc::SO_OOBINLINE, Value(0), AfterConnect),
    known(Any, libc::SO_PRIORITY, Value(0), AfterConnect),
    known(Any, libc::SO_RCVLOWAT, Value(1), AfterConnect),
    known(Any, libc::SO_PEEK_OFF, Value(-1), AfterConnect),
    known(Any, libc::SO_RXQ_OVFL, Value(0), AfterConnect),
    known(Any, libc::SO_SELECT_ERR_QUEUE, Value(0), AfterConnect),
    known(Any, libc::SO_BUSY_POLL, Value(0), AfterConnect),
    known(Any, 60 /* SO_ZEROCOPY */, Value(0), AfterConnect),
    known(Any, 69 /* SO_PREFER_BUSY_POLL */, Value(0), AfterConnect),
    known(Any, 75 /* SO_RCVMARK */, Value(0), AfterConnect),
    known(Any, libc::SO_TIMESTAMP, Value(0), AfterConnect),
    known(Any, libc::SO_TIMESTAMPNS, Value(0), AfterConnect),
    known(Any, 63 /* SO_TIMESTAMP_NEW */, Value(0), AfterConnect),
    known(Any, 64 /* SO_TIMESTAMPNS_NEW */, Value(0), AfterConnect),
    sized(8, known(Any, libc::SO_TIMESTAMPING, Value(0), AfterConnect)),
    sized(8, known(Any, libc::SO_LINGER, Value(0), AfterConnect)),
    sized(8, known(Any, libc::SO_MAX_PACING_RATE, Ones, AfterConnect)),
    sized(16, known(Any, libc::SO_RCVTIMEO, Value(0), AfterConnect)),
    sized(16, known(Any, libc::SO_SNDTIMEO, Value(0), AfterConnect)),

    known(Any, libc::SO_REUSEADDR, Value(0), Last),
];

/// Everything about a socket of `family` and `kind` (`SOCK_*`) that differs from a fresh one, in
/// the form that [`apply`] takes. `TCP_CORK` is not among it: it is a phase of the send queue.
pub fn capture(fd: BorrowedFd<'_>, family: i32, kind: i32) -> Result<Vec<SocketOption>, Error> {
    let mut options = Vec::new();
    for option in KNOWN
        .iter()
        .filter(|option| applies(option.scope, family, kind))
    {
        let mut value = [0; LONGEST_VALUE_BYTES];
        // An option that this kernel does not have, or not for this kind of socket, was never set.
        let Ok(length) = sockopt::get(
            fd,
            option.level,
            option.name,
            &mut value[..option.size_bytes],
        ) else {
            continue;
        };
        let value = &value[..length];
        if !is_fresh(option.fresh, value) {
            options.push(SocketOption {
                level: option.level,
                name: option.name,
                value: value.to_vec(),
            });
        }
    }
    capture_buffers(fd, &mut options);
    refuse_filters(fd)?;
    Ok(options)
}

/// Sets those of `options` whose moment it is. `subject` names the socket in errors.
pub fn apply(
    fd: BorrowedFd<'_>,
    options: &[SocketOption],
    moment: Moment,
    subject: &'static str,
) -> Result<(), Error> {
    for option in options.iter().filter(|option| moment_of(option) == moment) {
        sockopt::set(fd, option.level, option.name, &option.value).map_err(|source| {
            Error::Option {
                level: option.level,
                name: option.name,
                subject,
                source,
            }
        })?;
    }
    Ok(())
}

/// The captured value of an `int` option, when it differs from a fresh socket's.
pub(crate) fn find(options: &[SocketOption], level: i32, name: i32) -> Option<i32> {
    let option = options
        .iter()
        .find(|option| option.level == level && option.name == name)?;
    let bytes = option.value.get(..4)?;
    Some(i32::from_ne_bytes(bytes.try_into().ok()?))
}

/// Buffer sizes matter only when the service set them: unlocked ones are the kernel's to tune.
/// They are read back doubled (man 7 socket), so the half goes back, by the variants that may
/// exceed the system's limit as the service's own call may have met another limit.
fn capture_buffers(fd: BorrowedFd<'_>, options: &mut Vec<SocketOption>) {
    let Ok(lock) = sockopt::get_i32(fd, libc::SOL_SOCKET, sockopt::SO_BUF_LOCK) else {
        return;
    };
    for (bit, read, write) in [
        (
            sockopt::SEND_BUFFER_LOCKED,
            libc::SO_SNDBUF,
            libc::SO_SNDBUFFORCE,
        ),
        (
            sockopt::RECEIVE_BUFFER_LOCKED,
            libc::SO_RCVBUF,
            libc::SO_RCVBUFFORCE,
        ),
    ] {
        if lock & bit != 0
            && let Ok(doubled_bytes) = sockopt::get_i32(fd, libc::SOL_SOCKET, read)
        {
            options.push(SocketOption {
                level: libc::SOL_SOCKET,
                name: write,
                value: (doubled_bytes / 2).to_ne_bytes().to_vec(),
            });
        }
    }
}

/// A socket filter could only be carried as a program; none of it is worth a wrong guess.
fn refuse_filters(fd: BorrowedFd<'_>) -> Result<(), Error> {
    // With no room the kernel answers the number of instructions (net/core/filter.c,
    // sk_get_filter), and EACCES for an eBPF program.
    let filtered = match sockopt::get(fd, libc::SOL_SOCKET, sockopt::SO_GET_FILTER, &mut []) {
        Ok(instructions) => instructions > 0,
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    };
    if filtered {
        return Err(Error::refused(
            "a socket with a packet filter (SO_ATTACH_FILTER, SO_ATTACH_BPF)",
            "the program cannot be read back whole",
        ));
    }
    Ok(())
}

fn applies(scope: Scope, family: i32, kind: i32) -> bool {
    let internet = family == libc::AF_INET || family == libc::AF_INET6;
    match scope {
        Scope::Any => true,
        Scope::Unix => family == libc::AF_UNIX,
        // IPv6 sockets have the IPv4 options too, for mapped addresses.
        Scope::Ip => internet,
        Scope::IpDatagram => internet && kind == libc::SOCK_DGRAM,
        Scope::Ipv6 => family == libc::AF_INET6,
        Scope::Ipv6Datagram => family == libc::AF_INET6 && kind == libc::SOCK_DGRAM,
        Scope::Tcp => internet && kind == libc::SOCK_STREAM,
        Scope::Udp => internet && kind == libc::SOCK_DGRAM,
    }
}

fn is_fresh(fresh: Fresh, value: &[u8]) -> bool {
    match fresh {
        Fresh::Value(fresh) => {
            // IPv4 options of small value answer in fewer bytes than an int.
            let head = value.len().min(4);
            let fresh = fresh.to_ne_bytes();
            value[..head] == fresh[..head] && value[head..].iter().all(|byte| *byte == 0)
        }
        Fresh::Ones => value.iter().all(|byte| *byte == 0xff),
        Fresh::Empty => value.is_empty(),
        Fresh::OfNamespace => false,
    }
}

fn moment_of(option: &SocketOption) -> Moment {
    KNOWN
        .iter()
        .find(|known| known.level == option.level && known.name == option.name)
        // What is not in the table are the buffer sizes.
        .map_or(Moment::Last, |known| known.moment)
}
