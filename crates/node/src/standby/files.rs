//! The files that the replica names: references to them, as the replica's own mounts show them.
//!
//! A reference comes as the service's mounts show the file, which end with the service. What can be
//! found on the replica's is kept as it is there: then the path that the replica sees, and what
//! lies beside a directory, is as in the service. A name is looked up only for this, and what it
//! leads to counts only if it is the very file; from then on names may change.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::FileIdentity;
use unbroken_link::{LinkError, ReferenceReader};
use unbroken_sys::{descriptor, fdinfo, file_handle};
use unbroken_tracee::replica::{Files, References};

/// What the kernel writes behind the path of a file that has no name any more.
const DELETED: &str = " (deleted)";

pub struct StandbyFiles {
    arrivals: ReferenceReader,
    references: References,
    /// Of the replica's mounts.
    root: OwnedFd,
}

impl StandbyFiles {
    pub fn new(arrivals: ReferenceReader, root: OwnedFd) -> StandbyFiles {
        StandbyFiles {
            arrivals,
            references: HashMap::new(),
            root,
        }
    }

    /// Takes in what came with a record.
    pub fn receive(&mut self, messages: u64) -> Result<(), LinkError> {
        for (identity, came) in self.arrivals.receive(messages)? {
            let reference = match find(self.root.as_fd(), came.as_fd()) {
                Ok(Some(own)) => own,
                // It serves as it is, whatever its path looks like.
                Ok(None) | Err(_) => came,
            };
            self.references.insert(identity, reference);
        }
        Ok(())
    }

    /// Lets go of what nothing names any more.
    pub fn release(&mut self, released: &[FileIdentity]) {
        for identity in released {
            self.references.remove(identity);
        }
    }

    pub fn files(&self) -> Files<'_> {
        Files {
            references: &self.references,
            root: self.root.as_fd(),
        }
    }

    /// All of them; none are left.
    pub fn take(&mut self) -> References {
        std::mem::take(&mut self.references)
    }
}

/// The file of `reference` as the mounts below `root` show it.
fn find(root: BorrowedFd<'_>, reference: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let mut link = Vec::new();
    fdinfo::own_link(reference, &mut link)?;
    let Ok(path) = String::from_utf8(link) else {
        return Ok(None);
    };
    let wanted = identity(reference)?;
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let named = fdinfo::c_path(&path).and_then(|path| descriptor::open_beneath(root, &path, flags));
    let found = match named {
        Ok(named) if identity(named.as_fd())? == wanted => named,
        _ => match find_nameless(root, reference, &path)? {
            Some(found) if identity(found.as_fd())? == wanted => found,
            _ => return Ok(None),
        },
    };
    Ok(Some(found))
}

/// The same of a file without a name: by its handle, on the filesystem on which the directory lies
/// where it last had one.
fn find_nameless(
    root: BorrowedFd<'_>,
    reference: BorrowedFd<'_>,
    path: &str,
) -> io::Result<Option<OwnedFd>> {
    let path = path.strip_suffix(DELETED).unwrap_or(path);
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let mut above = path;
    while let Some((parent, _)) = above.rsplit_once('/') {
        above = parent;
        let parent = if parent.is_empty() { "/" } else { parent };
        let parent = fdinfo::c_path(parent)?;
        if let Ok(directory) = descriptor::open_beneath(root, &parent, flags) {
            let handle = file_handle::of(reference)?;
            return file_handle::open(directory.as_fd(), &handle, libc::O_PATH).map(Some);
        }
    }
    Ok(None)
}

fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let status = descriptor::status(fd)?;
    Ok((status.device, status.inode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::fd::OwnedFd;

    fn reference(file: &File) -> OwnedFd {
        fdinfo::reopen(file.as_fd(), libc::O_PATH).unwrap()
    }

    /// A directory of its own, removed when dropped.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let name = format!("unbroken-files-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_found_under_its_name_and_without_one_and_nothing_else_is() {
        let scratch = Scratch::new("find");
        let (path, other) = (scratch.0.join("a"), scratch.0.join("b"));
        fs::write(&path, "content").unwrap();
        let file = File::open(&path).unwrap();
        let came = reference(&file);
        let root = File::open("/").unwrap();
        let found = || find(root.as_fd(), came.as_fd()).unwrap().unwrap();
        let is_it = |found: OwnedFd| {
            let opened = fdinfo::reopen(found.as_fd(), libc::O_RDONLY).unwrap();
            let mut text = String::new();
            io::Read::read_to_string(&mut File::from(opened), &mut text).unwrap();
            assert_eq!(text, "content");
        };
        is_it(found());
        fs::rename(&path, &other).unwrap();
        fs::write(&path, "another file").unwrap();
        is_it(found());
        fs::remove_file(&other).unwrap();
        is_it(found());
    }

    #[test]
    fn a_removed_directory_is_found() {
        let scratch = Scratch::new("removed");
        let path = scratch.0.join("d");
        fs::create_dir(&path).unwrap();
        let came = reference(&File::open(&path).unwrap());
        fs::remove_dir(&path).unwrap();
        let root = File::open("/").unwrap();
        let found = find(root.as_fd(), came.as_fd()).unwrap().unwrap();
        let identities = [came.as_fd(), found.as_fd()].map(|fd| identity(fd).unwrap());
        assert_eq!(identities[0], identities[1]);
    }
}
