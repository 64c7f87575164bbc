//! What no replica could have is denied with the errno that a kernel without it gives, before and
//! after every move, and the program lives on.

use std::process::ExitCode;

use anyhow::Result;
use unbroken_guests::raw::call;
use unbroken_guests::{Guest, Place, main as run, refused};

struct Denied;

/// Arguments that a kernel would accept, or at least answer otherwise.
const CALLS: [(&str, i64, [u64; 4], i32); 36] = [
    (
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        [1, 0, 0, 0],
        libc::ENOSYS,
    ),
    ("io_setup", libc::SYS_io_setup, [1, 0, 0, 0], libc::ENOSYS),
    (
        "inotify_init1",
        libc::SYS_inotify_init1,
        [0; 4],
        libc::ENOSYS,
    ),
    (
        "fanotify_init",
        libc::SYS_fanotify_init,
        [0; 4],
        libc::ENOSYS,
    ),
    (
        "userfaultfd",
        libc::SYS_userfaultfd,
        [1, 0, 0, 0],
        libc::ENOSYS,
    ),
    ("memfd_secret", libc::SYS_memfd_secret, [0; 4], libc::ENOSYS),
    (
        "process_madvise",
        libc::SYS_process_madvise,
        [0; 4],
        libc::ENOSYS,
    ),
    ("mseal", libc::SYS_mseal, [0; 4], libc::ENOSYS),
    ("mbind", libc::SYS_mbind, [0; 4], libc::ENOSYS),
    (
        "set_mempolicy_home_node",
        libc::SYS_set_mempolicy_home_node,
        [0; 4],
        libc::ENOSYS,
    ),
    ("seccomp", libc::SYS_seccomp, [2, 0, 0, 0], libc::ENOSYS),
    (
        "landlock",
        libc::SYS_landlock_create_ruleset,
        [0, 0, 1, 0],
        libc::ENOSYS,
    ),
    ("clone3", libc::SYS_clone3, [0; 4], libc::ENOSYS),
    (
        "shmget",
        libc::SYS_shmget,
        [0, 4096, 0o1600, 0],
        libc::ENOSYS,
    ),
    ("semget", libc::SYS_semget, [0, 1, 0o1600, 0], libc::ENOSYS),
    ("msgget", libc::SYS_msgget, [0, 0o1600, 0, 0], libc::ENOSYS),
    ("mq_open", libc::SYS_mq_open, [0; 4], libc::ENOSYS),
    ("add_key", libc::SYS_add_key, [0; 4], libc::ENOSYS),
    ("keyctl", libc::SYS_keyctl, [0; 4], libc::ENOSYS),
    (
        "unshare",
        libc::SYS_unshare,
        [libc::CLONE_NEWNS as u64, 0, 0, 0],
        libc::EPERM,
    ),
    ("setns", libc::SYS_setns, [0; 4], libc::EPERM),
    ("mount", libc::SYS_mount, [0; 4], libc::EPERM),
    (
        "ptrace",
        libc::SYS_ptrace,
        [libc::PTRACE_TRACEME as u64, 0, 0, 0],
        libc::EPERM,
    ),
    ("bpf", libc::SYS_bpf, [0; 4], libc::EPERM),
    (
        "perf_event_open",
        libc::SYS_perf_event_open,
        [0; 4],
        libc::EPERM,
    ),
    ("pkey_alloc", libc::SYS_pkey_alloc, [0; 4], libc::ENOSPC),
    (
        "clone into a namespace",
        libc::SYS_clone,
        [libc::CLONE_NEWNET as u64, 0, 0, 0],
        libc::EPERM,
    ),
    (
        "huge pages",
        libc::SYS_mmap,
        [
            0,
            2 << 20,
            3,
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB) as u64,
        ],
        libc::ENOMEM,
    ),
    (
        "seccomp by prctl",
        libc::SYS_prctl,
        [22, 2, 0, 0],
        libc::EINVAL,
    ),
    (
        "MPTCP",
        libc::SYS_socket,
        [libc::AF_INET as u64, 1, 262, 0],
        libc::EPROTONOSUPPORT,
    ),
    (
        "SCTP",
        libc::SYS_socket,
        [libc::AF_INET as u64, 1, 132, 0],
        libc::EPROTONOSUPPORT,
    ),
    (
        "AF_VSOCK",
        libc::SYS_socket,
        [libc::AF_VSOCK as u64, 1, 0, 0],
        libc::EAFNOSUPPORT,
    ),
    (
        "AF_PACKET",
        libc::SYS_socket,
        [libc::AF_PACKET as u64, 3, 0, 0],
        libc::EAFNOSUPPORT,
    ),
    (
        "NETLINK_AUDIT",
        libc::SYS_socket,
        [libc::AF_NETLINK as u64, 3, 9, 0],
        libc::EPROTONOSUPPORT,
    ),
    ("F_NOTIFY", libc::SYS_fcntl, [0, 1026, 0, 0], libc::EINVAL),
    ("a call that does not exist yet", 600, [0; 4], libc::ENOSYS),
];

impl Guest for Denied {
    fn set_up(_: &Place) -> Result<Self> {
        Ok(Self)
    }

    fn check(&mut self) -> Result<()> {
        for (name, number, arguments, errno) in CALLS {
            refused(name, call(number, arguments), errno)?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Denied>()
}
