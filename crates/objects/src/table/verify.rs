//! The comparison of the mirror with the kernel (invariant I7).

use super::Mirror;
use crate::Error;
use crate::classify::classify_into;
use crate::kinds::Kind;
use std::cmp::Ordering;
use std::os::fd::AsFd;
use unbroken_image::{Fd, Object, Pid};
use unbroken_sys::kcmp;

impl Mirror {
    /// Compares every slot, every identity, every epoll instance and every connection with the
    /// kernel. What differs, in words; empty when the mirror is right.
    pub fn verify(&mut self) -> Result<Vec<String>, Error> {
        let mut differences = Vec::new();
        for (pid, process) in &self.processes {
            self.verify_slots(*pid, process, &mut differences)?;
        }
        self.verify_order(&mut differences);
        for (id, entry) in &self.objects {
            if entry.kind != Kind::Epoll {
                continue;
            }
            let kernel = Object::Epoll(self.epoll_in_kernel(*id)?);
            if entry.reading.state.as_ref() != Some(&kernel) {
                differences.push(format!(
                    "epoll {id}: {:?}, kernel {kernel:?}",
                    entry.reading.state
                ));
            }
        }
        self.verify_readings(&mut differences)?;
        Ok(differences)
    }

    fn verify_readings(&mut self, differences: &mut Vec<String>) -> Result<(), Error> {
        // A packet that came, or left by a timer, after the last capture had heard what moved: this
        // one heard of it, unless nothing tells.
        for (id, difference) in std::mem::take(&mut self.moved_at_rest) {
            if self.objects.contains_key(&id) && !self.volatile.contains(&id) {
                differences.push(difference);
            }
        }
        for (id, entry) in &self.objects {
            let Some(verify) = entry
                .kind
                .methods_if_any()
                .and_then(|methods| methods.verify)
            else {
                continue;
            };
            let at_rest = !self.volatile.contains(id);
            let fd = self.duplicate(*id)?;
            if let Some(difference) = verify(&entry.reading, fd.as_fd(), at_rest)? {
                let difference = format!("object {id}: {difference}");
                match at_rest {
                    true => self.moved_at_rest.push((*id, difference)),
                    false => differences.push(difference),
                }
            }
        }
        Ok(())
    }

    fn verify_slots(
        &self,
        pid: Pid,
        process: &super::Process,
        differences: &mut Vec<String>,
    ) -> Result<(), Error> {
        let mut list = Vec::new();
        let mut text = Vec::new();
        process.source.list(&mut list)?;
        let known: Vec<i32> = process.slots.all().keys().map(|fd| fd.0).collect();
        if known != list {
            differences.push(format!("process {pid}: slots {known:?}, kernel {list:?}"));
        }
        for (fd, descriptor) in process.slots.all() {
            let place = format!("process {pid} slot {fd}");
            let Some(entry) = self.objects.get(&descriptor.object) else {
                differences.push(format!("{place}: object {} is unknown", descriptor.object));
                continue;
            };
            if !entry.slots.contains(&(pid, *fd)) {
                differences.push(format!("{place}: object {} lacks it", descriptor.object));
            }
            let Some(duplicate) = process.source.duplicate(*fd)? else {
                continue;
            };
            let (kind, status) = classify_into(duplicate.as_fd(), &self.outputs, &mut text)?;
            if (kind, status.inode) != (entry.kind, entry.identity.inode) {
                differences.push(format!(
                    "{place}: {:?} inode {}, kernel {kind:?} inode {}",
                    entry.kind, entry.identity.inode, status.inode
                ));
            }
            let close_on_exec = process.source.close_on_exec(*fd, &mut text)?;
            if close_on_exec != descriptor.close_on_exec {
                differences.push(format!("{place}: close-on-exec is {close_on_exec}"));
            }
            let (owner, first) = self.certain_slot(descriptor.object);
            if !is(owner, first, process.source.host_pid, *fd, Ordering::Equal) {
                differences.push(format!("{place}: not the description of slot {first}"));
            }
        }
        Ok(())
    }

    fn verify_order(&self, differences: &mut Vec<String>) {
        for pair in self.order.all().windows(2) {
            let ((owner, fd), (other, second)) =
                (self.certain_slot(pair[0]), self.certain_slot(pair[1]));
            if !is(owner, fd, other, Fd(second), Ordering::Less) {
                differences.push(format!(
                    "objects {} and {} are not in order",
                    pair[0], pair[1]
                ));
            }
        }
    }
}

fn is(owner: i32, fd: i32, other: i32, second: Fd, expected: Ordering) -> bool {
    kcmp::files(owner, fd, other, second.0).is_ok_and(|order| order == expected)
}
