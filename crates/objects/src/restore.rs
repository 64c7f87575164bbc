//! Makes the objects of an epoch again, on a thread inside the replica's namespaces.

use crate::Error;
use crate::kinds::Kind;
use crate::methods::Others;
use crate::restored::{Phase, Restored, Scene, Step};
use std::collections::{BTreeMap, HashSet};
use unbroken_image::{Object, ObjectId};

/// Takes all objects through one phase. Phases after [`Phase::GoLive`] need no namespace.
pub fn restore(
    phase: Phase,
    objects: &BTreeMap<ObjectId, Object>,
    scene: &Scene,
    restored: &mut Restored,
) -> Result<(), Error> {
    if phase == Phase::Make {
        refuse(objects)?;
    }
    let mut batches: BTreeMap<Kind, Vec<(ObjectId, &Object)>> = BTreeMap::new();
    for (id, object) in objects {
        let kind = Kind::of(object);
        if step(kind, phase)?.is_some() {
            batches.entry(kind).or_default().push((*id, object));
        }
    }
    for (kind, batch) in &batches {
        if let Some(step) = step(*kind, phase)? {
            step(batch, scene, restored)?;
        }
    }
    Ok(())
}

fn step(kind: Kind, phase: Phase) -> Result<Option<Step>, Error> {
    let mut steps = kind.methods()?.restore.iter();
    Ok(steps
        .find(|(other, _)| *other == phase)
        .map(|(_, step)| *step))
}

/// What a capture would have refused.
fn refuse(objects: &BTreeMap<ObjectId, Object>) -> Result<(), Error> {
    let sockets: HashSet<u64> = objects
        .values()
        .filter_map(|object| match object {
            Object::UnixSocket(socket) => Some(socket.inode),
            _ => None,
        })
        .collect();
    let others = Others {
        has_socket: &|inode| sockets.contains(&inode),
    };
    objects
        .values()
        .try_for_each(|object| (Kind::of(object).methods()?.refuse)(object, &others))
}
