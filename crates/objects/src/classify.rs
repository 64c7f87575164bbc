//! What kind of kernel object a descriptor names.

use crate::kinds::Kind;
use crate::{Context, Error};
use std::os::fd::BorrowedFd;
use unbroken_sys::descriptor::{self, Status};
use unbroken_sys::fdinfo;

/// Finds the kind of what `fd`, a descriptor of ours, names.
pub fn classify(fd: BorrowedFd<'_>) -> Result<Kind, Error> {
    let mut link = Vec::new();
    classify_into(fd, &[], &mut link).map(|(kind, _)| kind)
}

/// As [`classify`], with the `fstat` it took. `outputs` are the inodes of the pipes whose read ends
/// are ours; `link` is a buffer to reuse.
pub(crate) fn classify_into(
    fd: BorrowedFd<'_>,
    outputs: &[(u64, u8)],
    link: &mut Vec<u8>,
) -> Result<(Kind, Status), Error> {
    let status = descriptor::status(fd).during("look at", "a descriptor")?;
    link.clear();
    let kind = match status.file_type() {
        libc::S_IFSOCK => socket(fd)?,
        libc::S_IFCHR => character_device(status.special_device),
        libc::S_IFBLK => Kind::BlockDevice,
        libc::S_IFLNK => Kind::SymbolicLink,
        other => {
            fdinfo::own_link(fd, link).during("read the name of", "a descriptor")?;
            match other {
                libc::S_IFDIR => Kind::Directory,
                libc::S_IFIFO if link.starts_with(b"pipe:") => {
                    match outputs.iter().any(|(inode, _)| *inode == status.inode) {
                        true => Kind::Output,
                        false => Kind::Pipe,
                    }
                }
                libc::S_IFIFO => Kind::Fifo,
                _ => match link.strip_prefix(b"anon_inode:") {
                    Some(name) => anonymous(name),
                    None => file(fd, link)?,
                },
            }
        }
    };
    Ok((kind, status))
}

fn socket(fd: BorrowedFd<'_>) -> Result<Kind, Error> {
    let nature = descriptor::socket_nature(fd).during("look at", "a socket")?;
    Ok(match (nature.domain, nature.kind, nature.protocol) {
        (libc::AF_UNIX, ..) => Kind::Unix,
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => Kind::Tcp,
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => Kind::Udp,
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_MPTCP) => Kind::Mptcp,
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_SCTP) => Kind::Sctp,
        (libc::AF_INET | libc::AF_INET6, ..) => Kind::RawSocket,
        (libc::AF_NETLINK, ..) => Kind::Netlink,
        (libc::AF_PACKET, ..) => Kind::RawSocket,
        _ => Kind::OtherSocket,
    })
}

/// Numbers from Documentation/admin-guide/devices.txt.
fn character_device(device: u64) -> Kind {
    match (libc::major(device), libc::minor(device)) {
        (1, 3 | 5 | 7 | 8 | 9) => Kind::CharacterDevice,
        (4 | 5, _) | (136..=143, _) => Kind::Terminal,
        _ => Kind::OtherDevice,
    }
}

fn anonymous(name: &[u8]) -> Kind {
    match name {
        b"[eventpoll]" => Kind::Epoll,
        b"[eventfd]" => Kind::EventCounter,
        b"[timerfd]" => Kind::Timer,
        b"[signalfd]" => Kind::Signals,
        b"inotify" | b"[fanotify]" => Kind::FileNotification,
        b"[io_uring]" => Kind::IoUring,
        b"[pidfd]" => Kind::ProcessDescriptor,
        b"[userfaultfd]" => Kind::UserFault,
        b"[perf_event]" => Kind::KernelTracing,
        _ if name.starts_with(b"bpf") => Kind::KernelTracing,
        b"seccomp notify" => Kind::SeccompListener,
        _ => Kind::OtherAnonymous,
    }
}

// include/uapi/linux/magic.h
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
const PIDFS_MAGIC: i64 = 0x5049_4446;
const NSFS_MAGIC: i64 = 0x6e73_6673;
const MQUEUE_MAGIC: i64 = 0x1980_0202;

fn file(fd: BorrowedFd<'_>, link: &[u8]) -> Result<Kind, Error> {
    let magic = descriptor::filesystem_magic(fd).during("look at the filesystem of", "a file")?;
    Ok(match magic {
        HUGETLBFS_MAGIC => Kind::HugePages,
        PIDFS_MAGIC => Kind::ProcessDescriptor,
        NSFS_MAGIC => Kind::Namespace,
        MQUEUE_MAGIC => Kind::MessageQueue,
        _ if link.starts_with(b"/memfd:") && link.ends_with(b" (deleted)") => Kind::MemoryFile,
        _ if link.starts_with(b"/secretmem") => Kind::SecretMemory,
        _ if link.first() == Some(&b'/') => Kind::RegularFile,
        _ => Kind::OtherAnonymous,
    })
}
