//! Which files a standby has references to: each that its image names, from the record that names
//! it to the epoch in which nothing does any more.
//!
//! While the service stands a reference is only opened, and only to a file that no name led to
//! before. It is sent when the service runs, ahead of the record.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use unbroken_image::{FileIdentity, Mapping, Object, ObjectId, Pid, ProcessDelta};
use unbroken_link::Reference;

/// What names files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum User {
    Object(ObjectId),
    Map(Pid),
    Program(Pid),
    /// Root and working directory.
    Directories(Pid),
}

#[derive(Debug, Default)]
pub(super) struct References {
    /// Of each user the files that it names, each once.
    used: HashMap<User, Vec<FileIdentity>>,
    /// Of the last epoch.
    processes: Vec<Pid>,
    /// How many users each file has that the standby can refer to, or will with the next record.
    counts: HashMap<FileIdentity, usize>,
    /// To go with the next record.
    pub waiting: Vec<Reference>,
    /// Files that had no user at some moment of this epoch.
    idle: Vec<FileIdentity>,
}

impl References {
    /// Opens a reference to a file, unless the standby can refer to it.
    pub fn need(
        &mut self,
        file: FileIdentity,
        open: impl FnOnce() -> io::Result<Arc<OwnedFd>>,
    ) -> io::Result<()> {
        if file != FileIdentity::default()
            && let Entry::Vacant(entry) = self.counts.entry(file)
        {
            self.waiting.push((file, open()?));
            entry.insert(0);
            self.idle.push(file);
        }
        Ok(())
    }

    /// Takes in what the map of a process shows.
    pub fn map(&mut self, pid: Pid, mappings: &[Mapping]) {
        let mut files: Vec<FileIdentity> = mappings.iter().filter_map(Mapping::file).collect();
        files.sort_unstable();
        files.dedup();
        self.uses(User::Map(pid), &files);
    }

    /// Takes in the processes of an epoch, which are all that there are.
    pub fn take_processes(&mut self, processes: &[ProcessDelta]) {
        let gone = |pid: &Pid| processes.iter().all(|delta| delta.pid != *pid);
        for pid in self
            .processes
            .extract_if(.., |pid| gone(pid))
            .collect::<Vec<_>>()
        {
            for user in [User::Map(pid), User::Program(pid), User::Directories(pid)] {
                self.uses(user, &[]);
            }
        }
        for delta in processes {
            let pid = delta.pid;
            if !self.processes.contains(&pid) {
                self.processes.push(pid);
            }
            if let Some(mappings) = &delta.memory.mappings {
                self.map(pid, mappings);
            }
            if let Some(layout) = &delta.memory.layout {
                self.uses(User::Program(pid), &[layout.executable]);
            }
            if let Some(state) = &delta.state {
                let root = state.root_directory.identity;
                match state.working_directory.identity {
                    same if same == root => self.uses(User::Directories(pid), &[root]),
                    other => self.uses(User::Directories(pid), &[root, other]),
                }
            }
        }
    }

    /// Takes in an object, to whose file [`References::need`] was said.
    pub fn take_object(&mut self, id: ObjectId, object: &Object) {
        if let Some(file) = object.file() {
            self.uses(User::Object(id), &[file]);
        }
    }

    pub fn object_gone(&mut self, id: ObjectId) {
        self.uses(User::Object(id), &[]);
    }

    /// The files to which the standby needs no reference any more when it has applied this epoch.
    pub fn take_released(&mut self) -> Vec<FileIdentity> {
        let counts = &mut self.counts;
        let mut released = std::mem::take(&mut self.idle);
        released.retain(|file| counts.get(file) == Some(&0) && counts.remove(file).is_some());
        released
    }

    fn uses(&mut self, user: User, files: &[FileIdentity]) {
        if self.used.get(&user).map_or(&[][..], Vec::as_slice) == files {
            return;
        }
        for file in files {
            if let Some(count) = self.counts.get_mut(file) {
                *count += 1;
            }
        }
        let before = match files {
            [] => self.used.remove(&user),
            _ => self.used.insert(user, files.to_vec()),
        };
        for file in before.into_iter().flatten() {
            if let Some(count) = self.counts.get_mut(&file) {
                *count -= 1;
                if *count == 0 {
                    self.idle.push(file);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use unbroken_image::object::Directory;

    fn file(inode: u64) -> FileIdentity {
        FileIdentity { device: 1, inode }
    }

    fn directory(inode: u64) -> Object {
        Object::Directory(Directory {
            path: String::new(),
            identity: file(inode),
            flags: 0,
            position: 0,
        })
    }

    fn take(references: &mut References, id: u64, inode: u64) {
        let open = || Ok(Arc::new(File::open("/dev/null")?.into()));
        references.need(file(inode), open).unwrap();
        references.take_object(ObjectId(id), &directory(inode));
    }

    fn sent(references: &mut References) -> Vec<u64> {
        let waiting = references.waiting.drain(..);
        waiting.map(|(identity, _)| identity.inode).collect()
    }

    #[test]
    fn a_file_is_referred_to_once_and_as_long_as_anything_names_it() {
        let mut references = References::default();
        take(&mut references, 1, 7);
        take(&mut references, 2, 7);
        take(&mut references, 3, 8);
        assert_eq!(sent(&mut references), [7, 8]);
        assert_eq!(references.take_released(), []);
        references.object_gone(ObjectId(1));
        assert_eq!(references.take_released(), []);
        references.object_gone(ObjectId(2));
        // Another name for it in the same epoch keeps it.
        references.object_gone(ObjectId(3));
        take(&mut references, 4, 8);
        assert_eq!(references.take_released(), [file(7)]);
        assert_eq!(sent(&mut references), []);
        take(&mut references, 5, 7);
        assert_eq!(sent(&mut references), [7]);
    }

    #[test]
    fn what_nothing_came_to_name_is_released_with_the_epoch() {
        let mut references = References::default();
        let open = || Ok(Arc::new(File::open("/dev/null")?.into()));
        references.need(file(9), open).unwrap();
        assert_eq!(references.take_released(), [file(9)]);
        assert_eq!(references.take_released(), []);
    }

    #[test]
    fn what_has_no_lasting_identity_needs_none() {
        let mut references = References::default();
        let never = || panic!("nothing is to be opened");
        references.need(FileIdentity::default(), never).unwrap();
        references.take_object(ObjectId(1), &directory(0));
        assert_eq!(references.take_released(), []);
    }
}
