//! Where a service lives on this machine: /run/unbroken/NAME, and the lock that says whether
//! anything of ours still lives there.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use unbroken_sys::claim_lock as lock;

/// Parent of every service's directory: a tmpfs, so a reboot empties it.
pub const RUN_ROOT: &str = "/run/unbroken";

/// Longest name of a service. With it the control socket's path stays inside the 108 bytes of
/// `sockaddr_un` and an nftables table name inside its 256.
pub const NAME_LENGTH_MAX: usize = 32;

/// Why a name is not a service's name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    #[error(
        "name {0:?} is empty or longer than {NAME_LENGTH_MAX} characters; give 1 to {NAME_LENGTH_MAX}"
    )]
    Length(String),
    #[error(
        "name {name:?} has the character {character:?}; use only a-z, 0-9, '-', '_' and '.', and \
         begin with a letter or a digit"
    )]
    Character { name: String, character: char },
}

/// A checked name: 1 to 32 of `a-z 0-9 - _ .`, beginning with a letter or a digit, so that it is
/// safe as a file name and as part of a table name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(String);

impl ServiceName {
    /// Checks `name`.
    ///
    /// # Errors
    /// [`NameError`] says which rule is broken.
    pub fn new(name: &str) -> Result<ServiceName, NameError> {
        if name.is_empty() || name.len() > NAME_LENGTH_MAX {
            return Err(NameError::Length(name.into()));
        }
        let bad = name.char_indices().find(|&(index, character)| {
            let plain = character.is_ascii_lowercase() || character.is_ascii_digit();
            !(plain || index > 0 && matches!(character, '-' | '_' | '.'))
        });
        match bad {
            Some((_, character)) => Err(NameError::Character {
                name: name.into(),
                character,
            }),
            None => Ok(ServiceName(name.into())),
        }
    }

    /// A name made from the last part of a command's path: what cannot stand in a name becomes
    /// `-`. `service` when nothing is left.
    pub fn from_command(command: &str) -> ServiceName {
        let base = command.rsplit('/').next().unwrap_or_default();
        let name: String = base
            .to_ascii_lowercase()
            .chars()
            .map(|character| match character {
                'a'..='z' | '0'..='9' | '-' | '_' | '.' => character,
                _ => '-',
            })
            .skip_while(|character| !character.is_ascii_alphanumeric())
            .take(NAME_LENGTH_MAX)
            .collect();
        ServiceName(if name.is_empty() {
            "service".into()
        } else {
            name
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for ServiceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for ServiceName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<ServiceName, NameError> {
        ServiceName::new(name)
    }
}

/// The directory of one service. Nothing is created by making the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDirectory {
    name: ServiceName,
    path: PathBuf,
}

/// Why a service's directory could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error(
        "service {0} is already running; see `unbroken status {0}`, end it with `unbroken stop \
         {0}`, or choose another --name"
    )]
    Taken(ServiceName),
    #[error("cannot {operation} {}: {cause}", .path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
}

impl RunDirectory {
    /// /run/unbroken/NAME.
    pub fn new(name: ServiceName) -> RunDirectory {
        RunDirectory::within(Path::new(RUN_ROOT), name)
    }

    /// The same below another root: tests stay out of /run.
    pub fn within(root: &Path, name: ServiceName) -> RunDirectory {
        let path = root.join(name.as_str());
        RunDirectory { name, path }
    }

    /// The services that have a directory below `root`, by name; none when there is no `root`.
    ///
    /// # Errors
    /// What reading the directory says, other than that it does not exist.
    pub fn all(root: &Path) -> io::Result<Vec<RunDirectory>> {
        let entries = match fs::read_dir(root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut directories: Vec<RunDirectory> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| ServiceName::new(entry.file_name().to_str()?).ok())
            .map(|name| RunDirectory::within(root, name))
            .filter(|directory| directory.path.is_dir())
            .collect();
        directories.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(directories)
    }

    pub fn name(&self) -> &ServiceName {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    pub fn status_page(&self) -> PathBuf {
        self.path.join("status-page")
    }

    pub fn control(&self) -> PathBuf {
        self.path.join("control")
    }

    fn lock(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// Takes the name for the calling process and makes the directory, empty but for the lock;
    /// what a dead service left there is removed.
    ///
    /// # Errors
    /// [`ClaimError::Taken`] when a process of ours still lives under that name.
    pub fn claim(&self) -> Result<Claim, ClaimError> {
        for attempt in 0.. {
            let file = match self.open_lock() {
                // Removed by its last owner between the making of the directory and the open.
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempt < 16 => continue,
                opened => opened.map_err(self.failed("make the lock file of"))?,
            };
            if !lock::try_exclusive(&file).map_err(self.failed("lock"))? {
                return Err(ClaimError::Taken(self.name.clone()));
            }
            // The one who held it before may have removed the directory between our open and our
            // lock: then this is the lock of a file that nobody else will ever find.
            if self.is_current(&file) {
                self.remove_all_but_lock().map_err(self.failed("empty"))?;
                return Ok(Claim { lock: file.into() });
            }
        }
        Err(ClaimError::Taken(self.name.clone()))
    }

    fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> ClaimError {
        let path = self.path.clone();
        move |cause| ClaimError::Io {
            operation,
            path: path.clone(),
            cause,
        }
    }

    fn open_lock(&self) -> io::Result<File> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.path)?;
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(self.lock())
    }

    fn is_current(&self, lock: &File) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        match (lock.metadata(), fs::metadata(self.lock())) {
            (Ok(held), Ok(named)) => identity(held) == identity(named),
            _ => false,
        }
    }

    fn remove_all_but_lock(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.path() == self.lock() {
                continue;
            }
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Whether any process of ours holds the name. Disturbs nobody.
    ///
    /// # Errors
    /// What opening or testing the lock says, other than that there is none.
    pub fn is_alive(&self) -> io::Result<bool> {
        match File::open(self.lock()) {
            Ok(file) => lock::is_held(&file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes the directory and what is in it, and the root when it was the last; only the holder
    /// of the [`Claim`] may.
    ///
    /// # Errors
    /// What the removal says, other than that there is nothing.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(root) = self.path.parent() {
            // Fails while other services have theirs in it, as it should.
            let _ = fs::remove_dir(root);
        }
        Ok(())
    }
}

/// The hold on a service's name. It belongs to an open file description, so every process that
/// inherits the descriptor keeps the name, and the kernel gives it up with the last of them.
/// Close-on-exec as all of std's descriptors: who starts a node hands it on explicitly. The
/// service must not inherit it.
#[derive(Debug)]
pub struct Claim {
    lock: OwnedFd,
}

impl Claim {
    /// The claim that a parent handed on.
    pub fn from_descriptor(lock: OwnedFd) -> Claim {
        Claim { lock }
    }
}

impl AsFd for Claim {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_root::TestRoot;

    #[test]
    fn names() {
        for good in ["a", "irc-1", "x.y_z", "0", &"n".repeat(32)] {
            assert!(ServiceName::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            ".",
            "..",
            ".a",
            "A",
            "a/b",
            "a b",
            "ä",
            &"n".repeat(33),
        ] {
            assert!(ServiceName::new(bad).is_err(), "{bad}");
        }
        let from = |command| ServiceName::from_command(command).as_str().to_owned();
        assert_eq!(from("/usr/sbin/My Server"), "my-server");
        assert_eq!(from("./--x"), "x");
        assert_eq!(from("///"), "service");
    }

    #[test]
    fn second_claim_is_refused_until_the_last_holder_is_gone() {
        let root = TestRoot::new();
        let directory = RunDirectory::within(root.path(), ServiceName::new("one").expect("name"));
        assert!(!directory.is_alive().expect("test"));
        let claim = directory.claim().expect("claim");
        assert!(directory.is_alive().expect("test"));
        assert!(matches!(directory.claim(), Err(ClaimError::Taken(_))));
        let inherited =
            Claim::from_descriptor(claim.as_fd().try_clone_to_owned().expect("duplicate"));
        drop(claim);
        assert!(directory.is_alive().expect("test"));
        drop(inherited);
        assert!(!directory.is_alive().expect("test"));
    }

    #[test]
    fn a_claim_empties_what_a_dead_service_left() {
        let root = TestRoot::new();
        let directory = RunDirectory::within(root.path(), ServiceName::new("two").expect("name"));
        fs::create_dir(directory.path()).expect("directory");
        fs::write(directory.status_page(), "old").expect("file");
        assert_eq!(RunDirectory::all(root.path()).expect("list").len(), 1);
        let old = directory.claim().expect("claim");
        assert!(!directory.status_page().exists());
        directory.remove().expect("remove");
        let _new = directory
            .claim()
            .expect("the name is free once the directory is gone");
        drop(old);
        assert!(directory.is_alive().expect("test"));
        directory.remove().expect("remove");
        assert_eq!(RunDirectory::all(root.path()).expect("list"), []);
    }

    #[test]
    fn fuzz_names() {
        unbroken_fuzz::text("service-name", &["chat", "a-1", "x_y.z"], |text| {
            if let Ok(name) = ServiceName::new(text) {
                let path = RunDirectory::new(name).path().to_owned();
                assert_eq!(path.parent(), Some(Path::new(RUN_ROOT)), "{text:?}");
            }
        });
    }
}
