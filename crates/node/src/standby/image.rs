//! The service as the last committed epoch describes it, apart from processes, threads and memory,
//! which the replica itself keeps.

use std::collections::{BTreeMap, HashSet};
use unbroken_image::object::TcpPhase;
use unbroken_image::{Descriptor, Epoch, Fd, Object, ObjectId, Pid};
use unbroken_wire::Tuple;
use unbroken_wire::flows::{ConnectionChange, NamedConnection};

/// One process as of the last epoch.
#[derive(Default)]
pub struct ProcessImage {
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
            let table = &mut self.processes.entry(delta.pid).or_default().descriptors;
            for slot in delta.descriptors {
                match slot.descriptor {
                    Some(descriptor) => table.insert(slot.fd, descriptor),
                    None => table.remove(&slot.fd),
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

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_image::{DescriptorChange, Mark, MemoryDelta, ProcessDelta};

    fn epoch(sequence: u64, slots: Vec<(i32, Option<u64>)>) -> Epoch {
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
            threads: Vec::new(),
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
        image.apply(epoch(1, vec![(0, Some(1)), (4, Some(2))]));
        image.apply(epoch(2, vec![(4, None)]));
        assert_eq!(
            image.processes[&Pid(2)]
                .descriptors
                .keys()
                .copied()
                .collect::<Vec<_>>(),
            [Fd(0)]
        );
    }
}
