//! What the mirror knows of one object.

use crate::kinds::Kind;
use crate::methods::Reading;
use unbroken_image::object::Epoll;
use unbroken_image::{Fd, FileIdentity, Object, ObjectId, Pid};
use unbroken_sys::descriptor::Status;

/// One open file description of the service.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: Kind,
    pub identity: FileIdentity,
    /// Every slot that names it; never empty between updates.
    pub slots: Vec<(Pid, Fd)>,
    pub reading: Reading,
    /// The epoll instances that have an entry for it, and under which number.
    pub watched_by: Vec<(ObjectId, Fd)>,
}

impl Entry {
    pub fn new(kind: Kind, status: &Status) -> Entry {
        Entry {
            kind,
            identity: FileIdentity {
                device: status.device,
                inode: status.inode,
            },
            slots: Vec::new(),
            reading: Reading::default(),
            watched_by: Vec::new(),
        }
    }

    /// Whether the object must be looked at in every epoch. One that has not been read is, too.
    pub fn is_volatile(&self) -> bool {
        match (&self.reading.state, self.kind.methods_if_any()) {
            (Some(state), Some(methods)) => (methods.is_volatile)(state),
            (None, _) => true,
            (_, None) => false,
        }
    }

    pub fn epoll_mut(&mut self) -> Option<&mut Epoll> {
        match &mut self.reading.state {
            Some(Object::Epoll(state)) => Some(state),
            _ => None,
        }
    }

    pub fn remove_slot(&mut self, place: (Pid, Fd)) {
        self.slots.retain(|slot| *slot != place);
        self.reading.watches.slot_left(place);
    }

    pub fn add_slot(&mut self, place: (Pid, Fd)) {
        if !self.slots.iter().any(|(pid, _)| *pid == place.0) {
            self.reading.watches.process_came();
        }
        self.slots.push(place);
    }
}
