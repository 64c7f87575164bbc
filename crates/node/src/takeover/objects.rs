//! Brings every kernel object of the last epoch back. How each kind is restored is
//! [`unbroken_objects`]' matter, and the order of the phases is the takeover's.

use std::collections::BTreeMap;
use unbroken_image::{Object, ObjectId};
use unbroken_objects::{Error, Phase, Restored, Scene};

/// Restores `objects` on the calling thread's namespaces. All stand silently before the first one
/// speaks.
pub fn restore(objects: &BTreeMap<ObjectId, Object>, scene: &Scene) -> Result<Restored, Error> {
    let mut restored = Restored::default();
    for phase in [Phase::Make, Phase::GoLive] {
        go_through(phase, objects, scene, &mut restored)?;
    }
    Ok(restored)
}

/// Takes restored objects through a phase that needs nothing of the replica's namespaces.
pub fn complete(
    phase: Phase,
    objects: &BTreeMap<ObjectId, Object>,
    restored: &mut Restored,
) -> Result<(), Error> {
    go_through(phase, objects, &Scene::default(), restored)
}

fn go_through(
    phase: Phase,
    objects: &BTreeMap<ObjectId, Object>,
    scene: &Scene,
    restored: &mut Restored,
) -> Result<(), Error> {
    let before = restored.shortcomings.len();
    unbroken_objects::restore(phase, objects, scene, restored)?;
    for shortcoming in &restored.shortcomings[before..] {
        crate::log!("{shortcoming}");
    }
    Ok(())
}
