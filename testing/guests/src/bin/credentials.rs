//! A service that is not root: users, groups, capabilities; and that a file which only they may
//! open can still be opened, and one that only root may open cannot; and that what it made without a
//! name is its own.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::unistd::{getgroups, getresgid, getresuid};
use unbroken_guests::{Guest, Place, main as run, refused, same};

struct Credentials {
    place: Place,
    before: String,
    pipe: [File; 2],
    memory: File,
}

/// The lines of /proc/self/status that credentials make.
fn shown() -> Result<String> {
    let names = [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
    ];
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let lines = status
        .lines()
        .filter(|line| names.iter().any(|name| line.starts_with(name)));
    Ok(lines.collect::<Vec<_>>().join("; "))
}

impl Guest for Credentials {
    fn set_up(place: &Place) -> Result<Self> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let memory = memfd_create(c"own", MFdFlags::MFD_CLOEXEC)?;
        nix::sys::stat::fchmod(&memory, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(Self {
            place: place.clone(),
            before: shown()?,
            pipe: [read.into(), write.into()],
            memory: memory.into(),
        })
    }

    fn check(&mut self) -> Result<()> {
        same("credentials", shown()?, self.before.clone())?;
        let other = std::thread::spawn(shown).join();
        let other = other.map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        same("credentials of a new thread", other, self.before.clone())?;
        let (users, groups) = (getresuid()?, getresgid()?);
        let user = users.real.as_raw();
        same(
            "users",
            (user, users.effective.as_raw(), users.saved.as_raw()),
            (65534, 65534, 65534),
        )?;
        let group = groups.real.as_raw();
        same(
            "groups",
            (group, groups.effective.as_raw(), groups.saved.as_raw()),
            (65534, 65534, 65534),
        )?;
        let others: Vec<u32> = getgroups()?
            .into_iter()
            .map(|group| group.as_raw())
            .collect();
        same(
            "other groups",
            others.iter().all(|group| *group == 65534),
            true,
        )?;
        std::fs::write(self.place.directory.join("mine"), "x")
            .context("write a file of one's own")?;
        self.open_own_again()?;
        refused(
            "opening a file of root's",
            OpenOptions::new().read(true).open("/etc/shadow"),
            libc::EACCES,
        )?;
        let root = nix::unistd::setuid(nix::unistd::Uid::from_raw(0));
        refused(
            "becoming root",
            root.map_err(std::io::Error::from),
            libc::EPERM,
        )
    }
}

impl Credentials {
    /// As a program does that is told to write to /dev/stdout.
    fn open_own_again(&mut self) -> Result<()> {
        let again = |file: &File| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            OpenOptions::new().write(true).open(path)
        };
        let mut write = again(&self.pipe[1]).context("open a pipe of one's own")?;
        write.write_all(b"word")?;
        let mut word = [0; 4];
        self.pipe[0].read_exact(&mut word)?;
        same("word", &word, b"word")?;
        again(&self.memory).context("open a memfd of one's own")?;
        for (file, mode) in [(&self.pipe[0], 0o600), (&self.memory, 0o600)] {
            let status = file.metadata()?;
            same("owner", (status.uid(), status.gid()), (65534, 65534))?;
            same("mode", status.mode() & 0o7777, mode)?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Credentials>()
}
