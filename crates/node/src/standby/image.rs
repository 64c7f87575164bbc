//! The service as the last committed epoch describes it, apart from memory, which lives in the
//! replica itself.

use std::collections::{BTreeMap, HashSet};
use unbroken_image::object::TcpPhase;
use unbroken_image::{
    Descriptor, Epoch, Fd, MemoryLayout, Object, ObjectId, Pid, ProcessState, ThreadAttributes,
    ThreadState, Tid,
};
use unbroken_wire::Tuple;
use unbroken_wire::flows::{ConnectionChange, NamedConnection};

/// One process as of the last epoch.
#[derive(Default)]
pub struct ProcessImage {
    pub threads: BTreeMap<Tid, ThreadState>,
    pub state: Option<ProcessState>,
    pub layout: Option<MemoryLayout>,
    pub descriptors: BTreeMap<Fd, Descriptor>,
}

#[derive(Default)]
pub struct ServiceImage {
    pub sequence: u64,
    pub input_position: u64,
    pub processes: BTreeMap<Pid, ProcessImage>,
    pub objects: BTreeMap<ObjectId, Object>,
}

impl ServiceImage {
    /// Takes an epoch in, whole. What an epoch leaves out is as in the one before.
    pub fn apply(&mut self, epoch: Epoch) -> ConnectionChange {
        self.sequence = epoch.sequence;
        self.input_position = epoch.mark.input_position;
        let mut change = ConnectionChange::default();
        for id in epoch.gone {
            if let Some(Object::TcpConnection(connection)) = self.objects.remove(&id) {
                change.gone.push(Tuple::from(&connection));
            }
        }
        for (id, object) in epoch.objects {
            if let Object::TcpConnection(connection) = &object {
                change.take(connection);
            }
            self.objects.insert(id, object);
        }
        for change in &epoch.interests {
            if let Some(Object::Epoll(state)) = self.objects.get_mut(&change.instance) {
                state.apply(change);
            }
        }
        let live: HashSet<Pid> = epoch.processes.iter().map(|process| process.pid).collect();
        self.processes.retain(|pid, _| live.contains(pid));
        for delta in epoch.processes {
            let process = self.processes.entry(delta.pid).or_default();
            process.take_threads(delta.threads);
            process.state = delta.state.or(process.state.take());
            process.layout = delta.memory.layout.or(process.layout.take());
            for slot in delta.descriptors {
                match slot.descriptor {
                    Some(descriptor) => process.descriptors.insert(slot.fd, descriptor),
                    None => process.descriptors.remove(&slot.fd),
                };
            }
        }
        change
    }

    /// The objects that slots name. Orphaned connections are not among them.
    pub fn named_objects(&self) -> HashSet<ObjectId> {
        let slots = self
            .processes
            .values()
            .flat_map(|process| process.descriptors.values());
        slots.map(|descriptor| descriptor.object).collect()
    }

    /// Whether a descriptor names a FIFO, which others can open, too.
    pub fn names_fifo(&self) -> bool {
        self.objects
            .values()
            .any(|object| matches!(object, Object::PipeEnd(end) if end.fifo_path.is_some()))
    }

    /// The connections that stand, as the wire names them.
    pub fn connections(&self) -> Vec<NamedConnection> {
        self.objects
            .values()
            .filter_map(|object| match object {
                Object::TcpConnection(connection) if connection.phase != TcpPhase::Closed => {
                    Some(NamedConnection::from(connection))
                }
                _ => None,
            })
            .collect()
    }
}

impl ProcessImage {
    fn take_threads(&mut self, threads: Vec<ThreadState>) {
        let mut old = std::mem::take(&mut self.threads);
        for mut thread in threads {
            let before: Option<ThreadState> = old.remove(&thread.tid);
            let (extended_state, attributes): (Option<Vec<u8>>, Option<ThreadAttributes>) = before
                .map_or((None, None), |before| {
                    (before.extended_state, before.attributes)
                });
            thread.extended_state = thread.extended_state.or(extended_state);
            thread.attributes = thread.attributes.or(attributes);
            self.threads.insert(thread.tid, thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_image::{DescriptorChange, Mark, MemoryDelta, ProcessDelta, Registers};

    fn thread(tid: i32, extended_state: Option<Vec<u8>>) -> ThreadState {
        ThreadState {
            tid: Tid(tid),
            registers: Registers::default(),
            extended_state,
            signal_mask: 0,
            pending: Vec::new(),
            blocked_call: None,
            attributes: None,
        }
    }

    fn epoch(sequence: u64, threads: Vec<ThreadState>, slots: Vec<(i32, Option<u64>)>) -> Epoch {
        let descriptors = slots
            .into_iter()
            .map(|(fd, object)| DescriptorChange {
                fd: Fd(fd),
                descriptor: object.map(|id| Descriptor {
                    object: ObjectId(id),
                    close_on_exec: false,
                }),
            })
            .collect();
        let process = ProcessDelta {
            pid: Pid(2),
            parent: Pid(1),
            threads,
            memory: MemoryDelta::default(),
            state: None,
            descriptors,
        };
        Epoch {
            term: 1,
            sequence,
            mark: Mark::default(),
            processes: vec![process],
            objects: Vec::new(),
            interests: Vec::new(),
            gone: Vec::new(),
        }
    }

    #[test]
    fn what_an_epoch_leaves_out_stays() {
        let mut image = ServiceImage::default();
        let first = vec![thread(2, Some(vec![7])), thread(3, Some(vec![8]))];
        image.apply(epoch(1, first, vec![(0, Some(1)), (4, Some(2))]));
        image.apply(epoch(2, vec![thread(2, None)], vec![(4, None)]));
        let process = &image.processes[&Pid(2)];
        assert_eq!(
            process.threads.len(),
            1,
            "a thread that is not listed has ended"
        );
        assert_eq!(process.threads[&Tid(2)].extended_state, Some(vec![7]));
        assert_eq!(
            process.descriptors.keys().copied().collect::<Vec<_>>(),
            [Fd(0)]
        );
    }
}
