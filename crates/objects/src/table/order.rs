//! Which descriptors share a description: objects sorted by `kcmp`.
//!
//! The kernel's comparison is a total order, so one new descriptor is found among n objects in
//! log n calls, and a whole table is sorted in n log n.

use crate::{Context, Error};
use std::cmp::Ordering;
use std::io;
use unbroken_image::ObjectId;

/// The objects whose inode does not tell them apart, in the kernel's order. Each must have a slot
/// that is known to name it still.
#[derive(Debug, Default)]
pub(crate) struct Order(Vec<ObjectId>);

impl Order {
    /// Finds the object that `compare` (an object against the one that is looked for) calls
    /// equal; else the place where it belongs.
    pub fn find(
        &self,
        mut compare: impl FnMut(ObjectId) -> io::Result<Ordering>,
    ) -> Result<Result<ObjectId, usize>, Error> {
        let (mut low, mut high) = (0, self.0.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let id = self.0[middle];
            match compare(id).during("compare a descriptor with object", id)? {
                Ordering::Equal => return Ok(Ok(id)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }

    pub fn insert(&mut self, place: usize, id: ObjectId) {
        self.0.insert(place, id);
    }

    pub fn retain(&mut self, keep: impl FnMut(&ObjectId) -> bool) {
        self.0.retain(keep);
    }

    pub fn all(&self) -> &[ObjectId] {
        &self.0
    }
}
