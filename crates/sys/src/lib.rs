//! Every system call of unbroken that has no safe wrapper elsewhere, one file a subject.
//!
//! This is the only crate with `unsafe`. Each file reopens it under a header that says what its
//! blocks rely on; each block says why it is sound. Errors are `std::io::Error`: the caller knows
//! the subject and adds it.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod account;
pub mod affinity;
pub mod bpf;
pub mod channel;
pub mod claim_lock;
pub mod clock;
pub mod clone;
pub mod descriptor;
pub mod epoll;
pub mod event;
pub mod fdinfo;
pub mod file_handle;
pub mod futex;
pub mod inherited;
pub mod kcmp;
pub mod local_route;
pub mod lock;
pub mod mapped;
pub mod memfd;
pub mod memory;
pub mod mount;
pub mod namespace;
pub mod netlink;
pub mod page_faults;
pub mod pagemap;
pub mod pidfd;
pub mod pipe;
pub mod probe;
pub mod process;
pub mod ptrace;
pub mod remote_code;
pub mod seccomp;
pub mod shared;
pub mod signal;
pub mod signalfd;
mod sock_diag;
pub mod socket;
pub mod sockopt;
pub mod tcp;
pub mod tcp_diag;
pub mod timer;
pub mod tun;
pub mod udp_diag;
pub mod uffd;
pub mod unix;
pub mod wait;
