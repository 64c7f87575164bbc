//! What becomes of each kind of object: replicated, denied to the service, or refused.
//!
//! One table for the code, for the messages and for docs/SUPPORT.md, which a test compares with
//! it. A kind that is not in the table does not compile.

use crate::{Error, Kind};

/// What a descriptor can name that no replica can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    DeletedFile,
    SymbolicLink,
    BlockDevice,
    Terminal,
    OtherDevice,
    HugePages,
    SecretMemory,
    Namespace,
    MessageQueue,
    FileNotification,
    IoUring,
    ProcessDescriptor,
    UserFault,
    KernelTracing,
    SeccompListener,
    OtherAnonymous,
    Netlink,
    RawSocket,
    Mptcp,
    Sctp,
    OtherSocket,
}

/// What is done about a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// The replica has it. The words say what is and is not carried.
    Replicated(&'static str),
    /// The call that makes one fails with this error, so the service does without. One that came
    /// to the service in another way is refused.
    Denied(&'static str, &'static str),
    /// A service that holds one is not protected.
    Refused(&'static str),
}

/// All kinds, in the order of docs/SUPPORT.md.
pub const ALL: &[Kind] = &[
    Kind::Tcp,
    Kind::Udp,
    Kind::Unix,
    Kind::RegularFile,
    Kind::Directory,
    Kind::CharacterDevice,
    Kind::MemoryFile,
    Kind::Pipe,
    Kind::Fifo,
    Kind::Epoll,
    Kind::EventCounter,
    Kind::Timer,
    Kind::Signals,
    Kind::Refused(Refusal::IoUring),
    Kind::Refused(Refusal::FileNotification),
    Kind::Refused(Refusal::UserFault),
    Kind::Refused(Refusal::KernelTracing),
    Kind::Refused(Refusal::SeccompListener),
    Kind::Refused(Refusal::SecretMemory),
    Kind::Refused(Refusal::Mptcp),
    Kind::Refused(Refusal::Sctp),
    Kind::Refused(Refusal::OtherSocket),
    Kind::Refused(Refusal::Netlink),
    Kind::Refused(Refusal::RawSocket),
    Kind::Refused(Refusal::DeletedFile),
    Kind::Refused(Refusal::HugePages),
    Kind::Refused(Refusal::Terminal),
    Kind::Refused(Refusal::BlockDevice),
    Kind::Refused(Refusal::OtherDevice),
    Kind::Refused(Refusal::ProcessDescriptor),
    Kind::Refused(Refusal::Namespace),
    Kind::Refused(Refusal::MessageQueue),
    Kind::Refused(Refusal::SymbolicLink),
    Kind::Refused(Refusal::OtherAnonymous),
];

impl Kind {
    /// The kind in the user's words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::RegularFile => "regular file",
            Kind::Directory => "directory",
            Kind::CharacterDevice => "/dev/null, zero, full, random, urandom",
            Kind::MemoryFile => "memfd",
            Kind::Pipe => "pipe",
            Kind::Fifo => "FIFO",
            Kind::Epoll => "epoll",
            Kind::EventCounter => "eventfd",
            Kind::Timer => "timerfd",
            Kind::Signals => "signalfd",
            Kind::Tcp => "TCP socket",
            Kind::Udp => "UDP socket",
            Kind::Unix => "Unix socket",
            Kind::Refused(refusal) => refusal.name(),
        }
    }

    /// What is done about the kind.
    pub fn support(self) -> Support {
        use Support::Replicated;
        match self {
            Kind::RegularFile => Replicated(
                "opened again by path; position, flags, locks. What was appended after the last \
                 commit is cut off at a takeover; what was overwritten in the middle after it is \
                 not rolled back",
            ),
            Kind::Directory => Replicated("opened again by path; position"),
            Kind::CharacterDevice => Replicated("opened again by path"),
            Kind::MemoryFile => Replicated("content, name, position, seals"),
            Kind::Pipe => Replicated(
                "content, packet borders, capacity; both ends must be inside the service",
            ),
            Kind::Fifo => Replicated("as a pipe; no process outside may hold the other end"),
            Kind::Epoll => Replicated(
                "all entries, fired EPOLLONESHOT and nesting too. An EPOLLET entry reports what is \
                 ready once more after a takeover",
            ),
            Kind::EventCounter => Replicated("count, semaphore mode"),
            Kind::Timer => Replicated("deadline, interval, unread expirations"),
            Kind::Signals => Replicated("mask"),
            Kind::Tcp => Replicated("listeners and connections in every state"),
            Kind::Udp => Replicated("addresses and options"),
            Kind::Unix => Replicated(
                "pairs and connections inside the service, accepted or not, listeners, datagram \
                 sockets to outside. Not while descriptors are in flight (SCM_RIGHTS), or bytes \
                 wait in a connection that is not accepted: unprotected until they are read",
            ),
            Kind::Refused(refusal) => refusal.support(),
        }
    }

    /// Whether the kind is one that a replica can have.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason when it is not.
    pub fn require_support(self) -> Result<(), Error> {
        match self.support() {
            Support::Replicated(_) => Ok(()),
            Support::Denied(_, why) | Support::Refused(why) => {
                Err(Error::refused(self.name(), why))
            }
        }
    }
}

impl Refusal {
    fn name(self) -> &'static str {
        match self {
            Refusal::DeletedFile => "deleted file",
            Refusal::SymbolicLink => "symbolic link (O_PATH)",
            Refusal::BlockDevice => "block device",
            Refusal::Terminal => "terminal",
            Refusal::OtherDevice => "other character device",
            Refusal::HugePages => "file on hugetlbfs",
            Refusal::SecretMemory => "memfd_secret",
            Refusal::Namespace => "namespace",
            Refusal::MessageQueue => "POSIX message queue",
            Refusal::FileNotification => "inotify, fanotify",
            Refusal::IoUring => "io_uring",
            Refusal::ProcessDescriptor => "pidfd",
            Refusal::UserFault => "userfaultfd",
            Refusal::KernelTracing => "perf event, BPF object",
            Refusal::SeccompListener => "seccomp listener",
            Refusal::OtherAnonymous => "other anonymous object",
            Refusal::Netlink => "netlink socket",
            Refusal::RawSocket => "raw or packet socket",
            Refusal::Mptcp => "MPTCP socket",
            Refusal::Sctp => "SCTP socket",
            Refusal::OtherSocket => "socket of another family",
        }
    }

    fn support(self) -> Support {
        use Support::{Denied, Refused};
        match self {
            Refusal::IoUring => Denied(
                "ENOSYS",
                "the kernel writes into memory and sockets without a call that could be seen",
            ),
            Refusal::FileNotification => Denied(
                "ENOSYS",
                "queued events cannot be put back, and restoring makes events of its own",
            ),
            Refusal::UserFault => Denied(
                "ENOSYS",
                "dirty pages are found by userfaultfd, and a range has room for one user",
            ),
            Refusal::KernelTracing => Denied(
                "EPERM",
                "its state is the kernel's own and cannot be read out",
            ),
            Refusal::SeccompListener => Denied(
                "EINVAL",
                "it would hide calls from the listener that announces them",
            ),
            Refusal::SecretMemory => Denied("ENOSYS", "not even root can read its pages"),
            Refusal::Mptcp => Denied(
                "EPROTONOSUPPORT",
                "the kernel has no way to restore a subflow; programs fall back to TCP",
            ),
            Refusal::Sctp => Denied(
                "EPROTONOSUPPORT",
                "the kernel has no way to restore an association",
            ),
            Refusal::OtherSocket => {
                Denied("EAFNOSUPPORT", "the kernel has no way to restore its state")
            }
            Refusal::Netlink => Refused(
                "subscriptions and unread messages cannot be put back; one that is closed again \
                 at once, as getifaddrs does, is no hindrance",
            ),
            Refusal::RawSocket => Refused("packets that it received cannot be put back"),
            Refusal::DeletedFile => Refused(
                "it has no path by which the replica could open it; a memfd in its place works",
            ),
            Refusal::HugePages => Refused("its pages are not tracked"),
            Refusal::Terminal => Refused(
                "its state belongs to the terminal; let the service use pipes or /dev/null instead",
            ),
            Refusal::BlockDevice => Refused("what is written to it cannot be rolled back"),
            Refusal::OtherDevice => Refused("its state is the driver's and cannot be read out"),
            Refusal::ProcessDescriptor => Refused("the process it names is another one afterwards"),
            Refusal::Namespace => Refused("the replica lives in namespaces of its own"),
            Refusal::MessageQueue => Refused("its content cannot be read without taking it out"),
            Refusal::SymbolicLink => Refused("there is no call that reads from it"),
            Refusal::OtherAnonymous => Refused("this version does not know how to read it out"),
        }
    }
}

/// The table of docs/SUPPORT.md, as Markdown.
pub fn support_table() -> String {
    let mut table = String::from("| object | what happens | notes |\n|---|---|---|\n");
    for kind in ALL {
        let (what, notes) = match kind.support() {
            Support::Replicated(notes) => ("replicated".to_owned(), notes),
            Support::Denied(errno, notes) => (format!("denied: {errno}"), notes),
            Support::Refused(notes) => ("refused".to_owned(), notes),
        };
        table.push_str(&format!("| {} | {what} | {notes} |\n", kind.name()));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_kinds_share_a_name() {
        let names: BTreeSet<&str> = ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn the_document_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/SUPPORT.md");
        let document = std::fs::read_to_string(path).expect("docs/SUPPORT.md exists");
        let table = support_table();
        assert!(
            document.contains(&table),
            "docs/SUPPORT.md must contain:\n{table}"
        );
    }
}
