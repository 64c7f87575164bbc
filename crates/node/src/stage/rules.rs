//! Where the verdict on a call depends on an argument. Data for the filter and for its test.

use super::syscalls::{self, Verdict};
use std::sync::LazyLock;

/// A question about one argument; only its low 32 bits count unless it says otherwise.
#[derive(Clone, Copy, Debug)]
pub enum Condition {
    /// The argument of this index is one of these values.
    OneOf(u32, &'static [u32]),
    NoneOf(u32, &'static [u32]),
    /// It has any of these bits.
    AnyBit(u32, u32),
    /// All its 64 bits are zero.
    Null(u32),
}

impl Condition {
    fn holds(&self, arguments: [u64; 6]) -> bool {
        let argument = |index: u32| arguments[index as usize];
        match *self {
            OneOf(index, values) => values.contains(&(argument(index) as u32)),
            NoneOf(index, values) => !values.contains(&(argument(index) as u32)),
            AnyBit(index, bits) => argument(index) as u32 & bits != 0,
            Null(index) => argument(index) == 0,
        }
    }
}

/// The first condition that holds decides; if none does, `otherwise`.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub call: &'static str,
    pub cases: &'static [(Condition, Verdict)],
    pub otherwise: Verdict,
}

/// What the filter does with a call that does not come from the blob.
pub fn verdict(number: u64, arguments: [u64; 6]) -> Verdict {
    static BY_NUMBER: LazyLock<Vec<(Verdict, Option<&Rule>)>> = LazyLock::new(|| {
        let names = syscalls::names();
        let rule = |name: &Option<&str>| RULES.iter().find(|rule| Some(rule.call) == *name);
        let verdicts = syscalls::verdicts(&names).into_iter();
        verdicts.zip(names.iter().map(rule)).collect()
    });
    let number = usize::try_from(number).unwrap_or(usize::MAX);
    match BY_NUMBER.get(number) {
        None => Denied(libc::ENOSYS),
        Some((verdict, None)) => *verdict,
        Some((_, Some(rule))) => {
            let mut cases = rule.cases.iter();
            let case = cases.find(|(condition, _)| condition.holds(arguments));
            case.map_or(rule.otherwise, |(_, verdict)| *verdict)
        }
    }
}

/// Whether a call waits until the notifier has heard of it.
pub fn is_announced(number: u64, arguments: [u64; 6]) -> bool {
    verdict(number, arguments) == Announced
}

use Condition::{AnyBit, NoneOf, Null, OneOf};
use Verdict::{Announced, Denied, Free};

/// Namespaces of its own would take a process out of the stage (linux/sched.h).
const NEW_NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// Advice that changes neither content nor attributes: WILLNEED, COLD, PAGEOUT, POPULATE_READ,
/// POPULATE_WRITE, COLLAPSE (asm-generic/mman-common.h).
const HARMLESS_ADVICE: &[u32] = &[3, 20, 21, 22, 23, 25];

/// F_DUPFD, F_SETFD, F_SETFL, F_SETLK, F_SETLKW, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_OFD_SETLK,
/// F_OFD_SETLKW, F_SETLEASE, F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_ADD_SEALS (linux/fcntl.h).
const CHANGING_FCNTL: &[u32] = &[0, 2, 4, 6, 7, 8, 10, 15, 37, 38, 1024, 1030, 1031, 1033];
const F_NOTIFY: u32 = 1026;

/// FIONBIO, FIOASYNC, FIONCLEX, FIOCLEX, FIOSETOWN, SIOCSPGRP, TFD_IOC_SET_TICKS, EPIOCSPARAMS
/// (asm-generic/ioctls.h, asm-generic/sockios.h, linux/timerfd.h, linux/eventpoll.h).
const CHANGING_IOCTL: &[u32] = &[
    0x5421,
    0x5452,
    0x5450,
    0x5451,
    0x8901,
    0x8902,
    0x4008_5400,
    0x4008_8a01,
];

/// PR_GET_PDEATHSIG, GET_DUMPABLE, GET_KEEPCAPS, GET_TIMING, GET_NAME, GET_SECCOMP, CAPBSET_READ,
/// GET_TSC, GET_SECUREBITS, GET_TIMERSLACK, MCE_KILL_GET, GET_CHILD_SUBREAPER, GET_NO_NEW_PRIVS,
/// GET_TID_ADDRESS, GET_THP_DISABLE, GET_SPECULATION_CTRL, GET_IO_FLUSHER, GET_MDWE,
/// GET_MEMORY_MERGE (linux/prctl.h).
const READING_PRCTL: &[u32] = &[
    2, 3, 7, 13, 16, 21, 23, 25, 27, 30, 34, 37, 39, 40, 42, 52, 58, 66, 68,
];

/// PR_SET_SECCOMP, SET_TSC, SET_SYSCALL_USER_DISPATCH, SCHED_CORE, SET_MDWE: no way to read them
/// back or to set them in the replica.
const DENIED_PRCTL: &[u32] = &[22, 26, 59, 62, 65];

/// ARCH_SET_CPUID, ARCH_REQ_XCOMP_PERM, ARCH_REQ_XCOMP_GUEST_PERM, ARCH_ENABLE_TAGGED_ADDR,
/// ARCH_SHSTK_ENABLE to ARCH_SHSTK_UNLOCK (asm/prctl.h): tile registers, tags in addresses and shadow
/// stacks are not carried.
const DENIED_ARCH_PRCTL: &[u32] = &[
    0x1012, 0x1023, 0x1025, 0x4002, 0x5001, 0x5002, 0x5003, 0x5004,
];

const UNIX: u32 = libc::AF_UNIX as u32;
const INET: u32 = libc::AF_INET as u32;
const INET6: u32 = libc::AF_INET6 as u32;
const NETLINK: u32 = libc::AF_NETLINK as u32;

/// Data that stays in the socket although it could be sent: MSG_MORE, and MSG_ZEROCOPY for its
/// notifications (linux/socket.h).
const KEEPING_SEND: u32 = 0x8000 | 0x0400_0000;
const SPLICE_F_MORE: u32 = 4;

pub const RULES: &[Rule] = &[
    Rule {
        call: "sendto",
        cases: &[(AnyBit(3, KEEPING_SEND), Announced)],
        otherwise: Free,
    },
    Rule {
        call: "sendmsg",
        cases: &[(AnyBit(2, KEEPING_SEND), Announced)],
        otherwise: Free,
    },
    Rule {
        call: "sendmmsg",
        cases: &[(AnyBit(3, KEEPING_SEND), Announced)],
        otherwise: Free,
    },
    Rule {
        call: "splice",
        cases: &[(AnyBit(5, SPLICE_F_MORE), Announced)],
        otherwise: Free,
    },
    Rule {
        call: "socket",
        cases: &[
            (
                NoneOf(0, &[UNIX, INET, INET6, NETLINK]),
                Denied(libc::EAFNOSUPPORT),
            ),
            (
                OneOf(2, &[libc::IPPROTO_MPTCP as u32, libc::IPPROTO_SCTP as u32]),
                Denied(libc::EPROTONOSUPPORT),
            ),
            (OneOf(0, &[UNIX, INET, INET6]), Announced),
            // getifaddrs of the C library asks NETLINK_ROUTE.
            (OneOf(2, &[libc::NETLINK_ROUTE as u32]), Announced),
        ],
        otherwise: Denied(libc::EPROTONOSUPPORT),
    },
    Rule {
        call: "clone",
        cases: &[
            (AnyBit(0, NEW_NAMESPACES), Denied(libc::EPERM)),
            // It makes a descriptor.
            (AnyBit(0, libc::CLONE_PIDFD as u32), Announced),
        ],
        otherwise: Free,
    },
    Rule {
        call: "mmap",
        cases: &[
            (AnyBit(3, libc::MAP_HUGETLB as u32), Denied(libc::ENOMEM)),
            // MAP_DROPPABLE: content that vanishes by itself; its one user, the vDSO's getrandom,
            // must not repeat its numbers in a replica either and falls back to the call.
            (AnyBit(3, 0x08), Denied(libc::EINVAL)),
        ],
        otherwise: Announced,
    },
    Rule {
        call: "memfd_create",
        cases: &[(AnyBit(1, libc::MFD_HUGETLB), Denied(libc::ENOMEM))],
        otherwise: Announced,
    },
    Rule {
        call: "brk",
        cases: &[(Null(0), Free)],
        otherwise: Announced,
    },
    Rule {
        call: "madvise",
        cases: &[(OneOf(2, HARMLESS_ADVICE), Free)],
        otherwise: Announced,
    },
    Rule {
        call: "fcntl",
        cases: &[
            (OneOf(1, CHANGING_FCNTL), Announced),
            (OneOf(1, &[F_NOTIFY]), Denied(libc::EINVAL)),
        ],
        otherwise: Free,
    },
    Rule {
        call: "ioctl",
        cases: &[(OneOf(1, CHANGING_IOCTL), Announced)],
        otherwise: Free,
    },
    Rule {
        call: "close_range",
        // A table of its own for one thread.
        cases: &[(AnyBit(2, libc::CLOSE_RANGE_UNSHARE), Denied(libc::EINVAL))],
        otherwise: Announced,
    },
    Rule {
        call: "rt_sigaction",
        cases: &[(Null(1), Free)],
        otherwise: Announced,
    },
    Rule {
        call: "sigaltstack",
        cases: &[(Null(0), Free)],
        otherwise: Announced,
    },
    Rule {
        call: "prlimit64",
        cases: &[(Null(2), Free)],
        otherwise: Announced,
    },
    Rule {
        call: "personality",
        cases: &[(OneOf(0, &[u32::MAX]), Free)],
        otherwise: Announced,
    },
    Rule {
        call: "prctl",
        cases: &[
            (OneOf(0, READING_PRCTL), Free),
            (OneOf(0, DENIED_PRCTL), Denied(libc::EINVAL)),
        ],
        otherwise: Announced,
    },
    Rule {
        call: "arch_prctl",
        cases: &[(OneOf(0, DENIED_ARCH_PRCTL), Denied(libc::EINVAL))],
        otherwise: Free,
    },
];
