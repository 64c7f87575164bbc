//! The table of kinds: what each kind of object is called, what becomes of it, and by which
//! methods it is captured, looked at, restored and refused.
//!
//! docs/SUPPORT.md has this table too, and a test compares the two. A new kind is a row here, a
//! file with its methods, and the words that [`crate::classify`] knows it by.

use crate::methods::{Inode, Methods, Pollable};
use crate::{
    Error, device, directory, epoll, eventfd, file, memfd, output, pipe, signalfd, tcp, timerfd,
    udp, unix,
};
use unbroken_image::Object;

/// What is done about a kind.
#[derive(Clone, Copy)]
enum Support {
    /// The replica has it. The words say what is and is not carried.
    Replicated(&'static str, &'static Methods),
    /// The call that makes one fails with this error, so the service does without. One that came
    /// to the service in another way is refused.
    Denied(&'static str, &'static str),
    /// A service that holds one is not protected.
    Refused(&'static str),
}

struct Row {
    /// The kind in the user's words.
    name: &'static str,
    support: Support,
}

macro_rules! kinds {
    ($($kind:ident: $name:literal, $support:expr;)*) => {
        /// Every kind of object that a descriptor can name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind {
            $($kind),*
        }

        impl Kind {
            /// In the order of docs/SUPPORT.md.
            const ROWS: &[Row] = &[$(Row { name: $name, support: $support }),*];
        }
    };
}

use Support::{Denied, Refused, Replicated};

kinds! {
    Tcp: "TCP socket", Replicated("listeners and connections in every state", &tcp::METHODS);
    Udp: "UDP socket", Replicated(
        "addresses, options, unread datagrams, what is shut down",
        &udp::METHODS,
    );
    Unix: "Unix socket", Replicated(
        "pairs and connections inside the service, accepted or not, listeners, datagram \
         sockets to outside. Not while descriptors are in flight (SCM_RIGHTS), or bytes \
         wait in a connection that is not accepted: unprotected until they are read. A relative \
         path is one from the working directory, or the service is unprotected",
        &unix::METHODS,
    );
    RegularFile: "regular file", Replicated(
        "the same file, renamed and deleted ones too; position, flags, locks. What was \
         appended after the last commit is cut off at a takeover; what was overwritten in \
         the middle after it is not rolled back",
        &file::METHODS,
    );
    Directory: "directory", Replicated(
        "the same directory, renamed and removed ones too; position",
        &directory::METHODS,
    );
    CharacterDevice: "/dev/null, zero, full, random, urandom", Replicated(
        "opened again by path",
        &device::METHODS,
    );
    MemoryFile: "memfd", Replicated("content, name, owner, mode, position, seals", &memfd::METHODS);
    Pipe: "pipe", Replicated(
        "content, packet borders, capacity, owner, mode; both ends must be inside the service",
        &pipe::METHODS,
    );
    Fifo: "FIFO", Replicated(
        "as a pipe, renamed and removed ones too; no process outside may hold the other end",
        &pipe::METHODS,
    );
    Output: "standard output, standard error", Replicated(
        "what is written leaves with its epoch, as packets do",
        &output::METHODS,
    );
    Epoll: "epoll", Replicated(
        "all entries, fired EPOLLONESHOT and nesting too. An EPOLLET entry reports what is \
         ready once more after a takeover",
        &epoll::METHODS,
    );
    EventCounter: "eventfd", Replicated("count, semaphore mode", &eventfd::METHODS);
    Timer: "timerfd", Replicated("deadline, interval, unread expirations", &timerfd::METHODS);
    Signals: "signalfd", Replicated("mask", &signalfd::METHODS);

    IoUring: "io_uring", Denied(
        "ENOSYS",
        "the kernel writes into memory and sockets without a call that could be seen",
    );
    FileNotification: "inotify, fanotify", Denied(
        "ENOSYS",
        "queued events cannot be put back, and restoring makes events of its own",
    );
    UserFault: "userfaultfd", Denied(
        "ENOSYS",
        "dirty pages are found by userfaultfd, and a range has room for one user",
    );
    KernelTracing: "perf event, BPF object", Denied(
        "EPERM",
        "its state is the kernel's own and cannot be read out",
    );
    SeccompListener: "seccomp listener", Denied(
        "EINVAL",
        "it would hide calls from the listener that announces them",
    );
    SecretMemory: "memfd_secret", Denied("ENOSYS", "not even root can read its pages");
    Mptcp: "MPTCP socket", Denied(
        "EPROTONOSUPPORT",
        "the kernel has no way to restore a subflow; programs fall back to TCP",
    );
    Sctp: "SCTP socket", Denied(
        "EPROTONOSUPPORT",
        "the kernel has no way to restore an association",
    );
    OtherSocket: "socket of another family", Denied(
        "EAFNOSUPPORT",
        "the kernel has no way to restore its state",
    );

    Netlink: "netlink socket", Refused(
        "subscriptions and unread messages cannot be put back; one that is closed again \
         at once, as getifaddrs does, is no hindrance",
    );
    RawSocket: "raw or packet socket", Refused("packets that it received cannot be put back");
    HugePages: "file on hugetlbfs", Refused("its pages are not tracked");
    Terminal: "terminal", Refused(
        "its state belongs to the terminal; let the service use pipes or /dev/null instead",
    );
    BlockDevice: "block device", Refused("what is written to it cannot be rolled back");
    OtherDevice: "other character device", Refused(
        "its state is the driver's and cannot be read out",
    );
    ProcessDescriptor: "pidfd", Refused("the process it names is another one afterwards");
    Namespace: "namespace", Refused("the replica lives in namespaces of its own");
    MessageQueue: "POSIX message queue", Refused(
        "its content cannot be read without taking it out",
    );
    SymbolicLink: "symbolic link (O_PATH)", Refused("there is no call that reads from it");
    OtherAnonymous: "other anonymous object", Refused(
        "this version does not know how to read it out",
    );
}

impl Kind {
    fn row(self) -> &'static Row {
        &Kind::ROWS[self as usize]
    }

    /// How the kind is replicated.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason when no replica can have it.
    pub(crate) fn methods(self) -> Result<&'static Methods, Error> {
        match self.row().support {
            Replicated(_, methods) => Ok(methods),
            Denied(_, why) | Refused(why) => Err(Error::refused(self.row().name, why)),
        }
    }

    pub(crate) fn methods_if_any(self) -> Option<&'static Methods> {
        match self.row().support {
            Replicated(_, methods) => Some(methods),
            Denied(..) | Refused(_) => None,
        }
    }

    /// Whether the kind is one that a replica can have.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason when it is not.
    pub fn require_support(self) -> Result<(), Error> {
        self.methods().map(drop)
    }

    pub(crate) fn inode(self) -> Inode {
        self.methods_if_any()
            .map_or(Inode::Shared, |methods| methods.inode)
    }

    pub(crate) fn pollable(self) -> Pollable {
        self.methods_if_any()
            .map_or(Pollable::Unknown, |methods| methods.pollable)
    }

    /// The kind of an object that was captured.
    pub(crate) fn of(object: &Object) -> Kind {
        match object {
            Object::RegularFile(_) => Kind::RegularFile,
            Object::Directory(_) => Kind::Directory,
            Object::CharacterDevice(_) => Kind::CharacterDevice,
            Object::MemoryFile(_) => Kind::MemoryFile,
            Object::PipeEnd(end) if end.fifo_path.is_some() => Kind::Fifo,
            Object::PipeEnd(_) => Kind::Pipe,
            Object::Epoll(_) => Kind::Epoll,
            Object::EventCounter(_) => Kind::EventCounter,
            Object::TimerDescriptor(_) => Kind::Timer,
            Object::SignalDescriptor(_) => Kind::Signals,
            Object::TcpListener(_) | Object::TcpConnection(_) => Kind::Tcp,
            Object::UdpSocket(_) => Kind::Udp,
            Object::UnixSocket(_) => Kind::Unix,
            Object::Output { .. } => Kind::Output,
        }
    }
}

/// The table of docs/SUPPORT.md, as Markdown.
pub fn support_table() -> String {
    let mut table = String::from("| object | what happens | notes |\n|---|---|---|\n");
    for Row { name, support } in Kind::ROWS {
        let (what, notes) = match support {
            Replicated(notes, _) => ("replicated".to_owned(), notes),
            Denied(errno, notes) => (format!("denied: {errno}"), notes),
            Refused(notes) => ("refused".to_owned(), notes),
        };
        table.push_str(&format!("| {name} | {what} | {notes} |\n"));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_kinds_share_a_name() {
        let names: BTreeSet<&str> = Kind::ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), Kind::ROWS.len());
    }

    #[test]
    fn the_document_has_this_table() {
        let table = support_table();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/SUPPORT.md");
        let document = std::fs::read_to_string(path).expect("docs/SUPPORT.md exists");
        assert!(
            document.contains(&table),
            "docs/SUPPORT.md must contain:\n{table}"
        );
    }
}
