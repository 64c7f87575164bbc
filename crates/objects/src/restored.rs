//! What becomes of the objects of an epoch when they are made again, step by step.

use crate::Error;
use crate::tcp::packets::{Inject, Resend};
use crate::tcp::plan::View;
use crate::tcp::restore::Prepared;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::TcpConnection;
use unbroken_image::{FileIdentity, Object, ObjectId};

/// The phases of a restore, in their order. In each one the objects of all kinds take their step
/// before any takes that of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Everything is made in the replica's namespaces, and stands there silently.
    Make,
    /// What has something to say to others may say it.
    GoLive,
    /// All mappings are there, too.
    Mapped,
    /// No process of the old service runs any more: it would go on writing to files, and it holds
    /// the locks.
    OldServiceEnded,
}

/// One step of one kind, with all objects of the kind.
pub(crate) type Step = fn(&Batch<'_>, &Scene, &mut Restored) -> Result<(), Error>;

pub(crate) type Batch<'a> = [(ObjectId, &'a Object)];

/// What the first two phases know besides the objects.
#[derive(Default)]
pub struct Scene {
    /// The objects that slots name. A connection that is not among them is an orphan.
    pub named: HashSet<ObjectId>,
    /// What the wire knows of clients.
    pub views: HashMap<ObjectId, View>,
    /// The memfds that the replica's memory has made already.
    pub memory_files: BTreeMap<ObjectId, OwnedFd>,
    /// References (`O_PATH`) to the files that the objects name.
    pub references: HashMap<FileIdentity, OwnedFd>,
}

impl Scene {
    pub(crate) fn reference(&self, identity: FileIdentity) -> Option<BorrowedFd<'_>> {
        self.references.get(&identity).map(OwnedFd::as_fd)
    }
}

/// Everything that the replica's descriptors will name, and what has to be done with it.
#[derive(Default)]
pub struct Restored {
    pub descriptors: BTreeMap<ObjectId, OwnedFd>,
    /// Read ends of the standard output and error that the replica will write to.
    pub outputs: [Option<OwnedFd>; 2],
    /// Packets of clients to inject before any other reaches the replica.
    pub injects: Vec<Inject>,
    /// What to say to clients again, with the bytes to say.
    pub resends: Vec<(Resend, Vec<u8>)>,
    /// Connections that go on as orphans once these are closed.
    pub orphans: Vec<(TcpConnection, OwnedFd)>,
    /// The connections that are there again.
    pub connections: Vec<ObjectId>,
    /// What is not as it was, and no reason to be without a replica.
    pub shortcomings: Vec<String>,
    /// Connections that may not say anything yet.
    pub(crate) silent: BTreeMap<ObjectId, Prepared>,
}

/// Makes each object of a batch by itself.
pub(crate) fn make_each(
    batch: &Batch<'_>,
    restored: &mut Restored,
    make: impl Fn(ObjectId, &Object) -> Result<Option<OwnedFd>, Error>,
) -> Result<(), Error> {
    for (id, object) in batch {
        if let Some(descriptor) = make(*id, object)? {
            restored.descriptors.insert(*id, descriptor);
        }
    }
    Ok(())
}
