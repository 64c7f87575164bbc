//! Where the guest stands: its root and its working directory are renamed, and the latter is removed;
//! its program is replaced by another file of the same name, twice.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{AtFlags, OFlag, open, renameat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::chroot;
use std::os::fd::{AsFd, OwnedFd};
use unbroken_guests::{Guest, Place, main as run, same};

const PROGRAM: &str = "program";

struct Places {
    checks: usize,
    /// What holds the root, the program, and the names that both had.
    above: OwnedFd,
    /// Of its own program, root and working directory.
    expected: [u64; 3],
    program_bytes: u64,
    /// The /proc from before the change of root.
    proc: OwnedFd,
}

impl Guest for Places {
    fn set_up(place: &Place) -> Result<Self> {
        let root = place.directory.join("root");
        fs::create_dir_all(root.join("working"))?;
        let directory = |path: &Path| open(path, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty());
        let (above, proc) = (directory(&place.directory)?, directory(Path::new("/proc"))?);
        chroot(&root)?;
        std::env::set_current_dir("/working")?;
        let mut guest = Self {
            checks: 0,
            above,
            expected: [0; 3],
            program_bytes: 0,
            proc,
        };
        guest.expected = guest.inodes()?;
        guest.program_bytes = guest.program()?.metadata()?.len();
        Ok(guest)
    }

    fn check(&mut self) -> Result<()> {
        same(
            "program, root, working directory",
            self.inodes()?,
            self.expected,
        )?;
        same(
            "length of the program",
            self.program()?.metadata()?.len(),
            self.program_bytes,
        )?;
        let working = std::env::current_dir();
        self.checks += 1;
        match self.checks {
            1 => {
                same("working directory", working?, PathBuf::from("/working"))?;
                fs::rename("/working", "/moved")?;
                self.rename("root", "root.old")?;
                self.replace_program()?;
            }
            2 => {
                same("working directory", working?, PathBuf::from("/moved"))?;
                fs::remove_dir("/moved")?;
                self.replace_program()?;
            }
            _ => ensure!(
                working.is_err(),
                "the working directory has a name: {working:?}"
            ),
        }
        Ok(())
    }
}

impl Places {
    fn inodes(&self) -> Result<[u64; 3]> {
        let inode = |name: &str| -> Result<u64> {
            let status = fstatat(self.proc.as_fd(), name, AtFlags::empty());
            Ok(status.with_context(|| name.to_owned())?.st_ino)
        };
        let (root, working) = (fs::metadata("/")?.ino(), fs::metadata(".")?.ino());
        same("root", inode("self/root")?, root)?;
        same("working directory", inode("self/cwd")?, working)?;
        Ok([inode("self/exe")?, root, working])
    }

    fn program(&self) -> Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let opened = nix::fcntl::openat(self.proc.as_fd(), "self/exe", flags, Mode::empty())?;
        Ok(opened.into())
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        renameat(self.above.as_fd(), from, self.above.as_fd(), to)?;
        Ok(())
    }

    /// As a package manager does it: another file is renamed over it.
    fn replace_program(&self) -> Result<()> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT;
        let other = nix::fcntl::openat(self.above.as_fd(), "other", flags, Mode::S_IRWXU)?;
        nix::unistd::write(&other, b"another program")?;
        drop(other);
        self.rename("other", PROGRAM)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let Some(directory) = arguments.get(2) else {
        return run::<Places>();
    };
    let program = Path::new(directory).join(PROGRAM);
    if Path::new(&arguments[0]) == program {
        return run::<Places>();
    }
    // Its own copy, which it may replace.
    let copied = std::env::current_exe().and_then(|own| fs::copy(own, &program));
    let failed = match copied {
        Ok(_) => Command::new(&program).args(&arguments[1..]).exec(),
        Err(error) => error,
    };
    eprintln!("{}: {failed}", program.display());
    ExitCode::FAILURE
}
