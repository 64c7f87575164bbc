//! Calls that change a slot's flag, or something of what it names.

use super::announced::{Announced, Announcement};
use super::{Changes, Mirror};
use crate::Error;
use std::collections::BTreeSet;
use unbroken_image::{Descriptor, DescriptorChange, Fd, ObjectId, Pid};

impl Mirror {
    /// Flags of slots, and objects that calls changed: those objects.
    pub(super) fn touch_announced(
        &mut self,
        announcements: &[Announcement],
        before: &[(Pid, Fd, Option<Descriptor>)],
        duplicated: bool,
        changes: &mut Changes,
    ) -> Result<BTreeSet<ObjectId>, Error> {
        let mut named = BTreeSet::new();
        for (index, Announcement { pid, thread, what }) in announcements.iter().enumerate() {
            match *what {
                Announced::Object { fd } => {
                    // A slot that this update looked at needs no second look.
                    if !before
                        .iter()
                        .any(|(owner, slot, _)| (owner, *slot) == (pid, fd))
                    {
                        self.read_close_on_exec(*pid, fd, changes)?;
                    }
                    named.extend(self.slot(*pid, fd).map(|slot| slot.object));
                    let left_since = self
                        .namings
                        .last(*pid, fd)
                        .is_some_and(|(last, by)| index < last || by != *thread);
                    if left_since {
                        let held = before
                            .iter()
                            .filter(|(owner, slot, _)| (owner, *slot) == (pid, fd));
                        named.extend(held.filter_map(|(_, _, old)| old.map(|old| old.object)));
                    }
                    if left_since && duplicated {
                        // The number may have been another name of anything in the table.
                        let process = self.processes.get(pid);
                        let slots = process.into_iter().flat_map(|process| process.slots.all());
                        named.extend(slots.map(|(_, slot)| slot.object));
                    }
                }
                Announced::CloseRange {
                    first,
                    last,
                    close_on_exec: true,
                } if first <= last => {
                    let Some(process) = self.processes.get(pid) else {
                        continue;
                    };
                    let range = process.slots.all().range(first..=last);
                    let numbers: Vec<Fd> = range.map(|(fd, _)| *fd).collect();
                    for fd in numbers {
                        self.read_close_on_exec(*pid, fd, changes)?;
                    }
                }
                // What a new object is not is one of which any call may have been lost.
                Announced::Everything => {
                    let process = self.processes.get(pid);
                    let slots = process.into_iter().flat_map(|process| process.slots.all());
                    named.extend(slots.map(|(_, slot)| slot.object));
                }
                _ => {}
            }
        }
        named.retain(|id| self.objects.contains_key(id));
        let told = changes.appeared.iter().chain(&changes.touched);
        let told: BTreeSet<ObjectId> = told.copied().collect();
        changes.touched.extend(named.difference(&told));
        Ok(named)
    }

    fn read_close_on_exec(&mut self, pid: Pid, fd: Fd, changes: &mut Changes) -> Result<(), Error> {
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        let Some(mut descriptor) = process.slots.get(fd) else {
            return Ok(());
        };
        let close_on_exec = process.source.close_on_exec(fd, &mut self.text)?;
        if descriptor.close_on_exec != close_on_exec {
            descriptor.close_on_exec = close_on_exec;
            process.slots.insert(fd, descriptor);
            changes
                .slots
                .retain(|(owner, change)| (*owner, change.fd) != (pid, fd));
            changes.slots.push((
                pid,
                DescriptorChange {
                    fd,
                    descriptor: Some(descriptor),
                },
            ));
        }
        Ok(())
    }
}
