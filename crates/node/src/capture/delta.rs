//! The objects' part of an epoch.

use unbroken_image::{DescriptorChange, InterestChange, Object, ObjectId, Pid};
use unbroken_wire::flows::ConnectionChange;

/// The numbers and options of an object, beside its queues and content: most has a connection.
const OBJECT_BYTES_MAX: usize = 2048;
/// A changed entry of an epoll instance.
const INTEREST_BYTES_MAX: usize = 48;

/// What became of the objects since the epoch before. The buffers are used again.
#[derive(Default)]
pub(super) struct ObjectsDelta {
    pub slots: Vec<(Pid, DescriptorChange)>,
    /// Complete once it is described.
    pub objects: Vec<(ObjectId, Object)>,
    pub interests: Vec<InterestChange>,
    pub gone: Vec<ObjectId>,
    /// The connections among `objects` and `gone`, as the wire names them.
    pub connections: ConnectionChange,
    /// Objects that changed. The mirror has their states, which are copied when the service runs
    /// again.
    pub changed: Vec<ObjectId>,
    content_bytes: usize,
    opens_memory: bool,
}

impl ObjectsDelta {
    pub fn clear(&mut self) {
        self.slots.clear();
        self.objects.clear();
        self.interests.clear();
        self.gone.clear();
        self.connections.stood.clear();
        self.connections.gone.clear();
        self.changed.clear();
        self.content_bytes = 0;
        self.opens_memory = false;
    }

    /// Takes in that an object is new or has changed, to the state that the mirror has of it.
    pub fn change(&mut self, id: ObjectId, state: &Object) {
        self.changed.push(id);
        self.content_bytes += state.content_bytes();
        if let Object::RegularFile(file) = state {
            // Wherever proc is mounted; another file of that name costs only time.
            self.opens_memory |= file.path.ends_with("/mem");
        }
    }

    /// Whether a file among them is the memory of a process.
    pub fn opens_memory(&self) -> bool {
        self.opens_memory
    }

    /// Bytes that it puts into a description, at most: little but what sockets and pipes hold.
    pub fn description_bound(&self) -> usize {
        let apart = self.objects.iter();
        let apart_bytes: usize = apart.map(|(_, object)| object.content_bytes()).sum();
        let count = self.objects.len() + self.changed.len();
        let interests_bytes = self.interests.len() * INTEREST_BYTES_MAX;
        apart_bytes + self.content_bytes + count * OBJECT_BYTES_MAX + interests_bytes
    }
}
