//! What is done with the objects of one kind: the columns of the table in [`crate::kinds`], and
//! what the methods have to work with.

use crate::restored::{Phase, Step};
use crate::scratch::Scratch;
use crate::table::process::Holders;
use crate::tcp::capture::Tracker;
use crate::tcp::known::Known;
use crate::watch::Watches;
use crate::{Context, Error};
use std::os::fd::{BorrowedFd, OwnedFd};
use unbroken_image::Object;
use unbroken_sys::udp_diag::UdpDiag;
use unbroken_sys::unix;

/// The methods of one kind; each kind's file has its own.
pub(crate) struct Methods {
    /// What an inode number says of objects of the kind.
    pub inode: Inode,
    pub pollable: Pollable,
    pub capture: Capture,
    /// Whether such an object must be looked at in every epoch: it changes by calls that are not
    /// announced, or by none.
    pub is_volatile: fn(&Object) -> bool,
    /// Looks cheaply for what the last reading has not.
    pub look: fn(&mut Reading, &mut Means<'_>) -> Result<Look, Error>,
    /// What such an object must be captured again after, besides the calls on it.
    pub stale_after: fn(&Object) -> Option<Event>,
    pub verify: Option<Verify>,
    /// Whether such an object can be made again: what a capture would let pass and a restore could
    /// not do is found out here, by both.
    pub refuse: fn(&Object, &Others<'_>) -> Result<(), Error>,
    /// Each step gets all objects of the kind at once, as some can only be made together.
    pub restore: &'static [(Phase, Step)],
}

impl Methods {
    /// Those of an object that only announced calls change, and that nothing hinders.
    pub const fn new(capture: Capture, restore: &'static [(Phase, Step)]) -> Methods {
        Methods {
            inode: Inode::Shared,
            pollable: Pollable::Yes,
            capture,
            is_volatile: |_| false,
            look: |_, _| Ok(Look::Unknown),
            stale_after: |_| None,
            verify: None,
            refuse: |_, _| Ok(()),
            restore,
        }
    }
}

/// I7: what is wrong with a reading, in words; the flag says that a look found the object at rest.
pub(crate) type Verify = fn(&Reading, BorrowedFd<'_>, bool) -> Result<Option<String>, Error>;

/// How an object is read whole.
#[derive(Clone, Copy)]
pub(crate) enum Capture {
    /// From a duplicate of a descriptor.
    Descriptor(fn(&mut Reading, BorrowedFd<'_>, &mut Means<'_>) -> Result<(), Error>),
    /// By the mirror of the descriptor tables, which follows the calls that change it.
    Mirror,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inode {
    /// Exactly one open file description: a socket's file is made once, with its inode, and cannot
    /// be opened again.
    Unique,
    /// One object of which each end is a description.
    OfAllEnds,
    Shared,
}

/// Whether an epoll instance takes the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pollable {
    Yes,
    No,
    Unknown,
}

/// What a cheap look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    Same,
    /// As it was, and nothing can change it before something wakes it.
    AtRest,
    /// The state is another one, and up to date.
    Refreshed,
    /// Something may have changed: only a capture tells.
    Unknown,
}

/// What makes objects stale that no call named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// What was stored through a mapping leaves no trace in the file's times, and none in the page
    /// tables once that mapping is gone.
    MemoryMapChanged,
    /// Files of a thread that has ended cannot be opened again.
    ThreadEnded,
}

/// An object as it was last read, and what helps to see cheaply whether it has changed.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    pub state: Option<Object>,
    pub watches: Watches,
    /// Of a TCP connection.
    pub tracker: Option<Tracker>,
}

/// What a method may use besides the object itself.
pub(crate) struct Means<'a> {
    pub holders: Holders<'a>,
    /// A call changed the object, so nothing of the last state may be relied on.
    pub announced: bool,
    /// Duplicates of the other ends ([`Inode::OfAllEnds`]); given to captures.
    pub other_ends: &'a [OwnedFd],
    /// Inodes of the pipes behind the service's standard output (1) and error (2).
    pub outputs: &'a [(u64, u8)],
    /// What others than a socket know of it.
    pub known: &'a Known<'a>,
    pub tools: &'a mut Tools,
}

/// What captures need and keep; it holds nothing of the service.
pub(crate) struct Tools {
    pub scratch: Scratch,
    unix: Option<unix::Diag>,
    udp: Option<UdpDiag>,
}

impl Tools {
    pub fn new() -> Result<Tools, Error> {
        let scratch = Scratch::new()?;
        Ok(Tools {
            scratch,
            unix: None,
            udp: None,
        })
    }

    /// Asks the kernel about Unix sockets of the network namespace of `socket`, in which all of the
    /// service's are.
    pub fn unix_diag(&mut self, socket: BorrowedFd<'_>) -> Result<&mut unix::Diag, Error> {
        let open = match self.unix.take() {
            Some(open) => open,
            None => {
                unix::Diag::of_namespace(socket).during("open", "sock_diag for Unix sockets")?
            }
        };
        Ok(self.unix.insert(open))
    }

    /// The same of UDP sockets.
    pub fn udp_diag(&mut self, socket: BorrowedFd<'_>) -> Result<&UdpDiag, Error> {
        let open = match self.udp.take() {
            Some(open) => open,
            None => UdpDiag::of_namespace(socket).during("open", "sock_diag for UDP sockets")?,
        };
        Ok(self.udp.insert(open))
    }
}

/// The other objects of the service.
pub(crate) struct Others<'a> {
    pub has_socket: &'a dyn Fn(u64) -> bool,
}
