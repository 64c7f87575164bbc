//! A service that is not root: users, groups, capabilities; and that a file which only they may
//! open can still be opened, and one that only root may open cannot.

use std::fs::OpenOptions;
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::unistd::{getgroups, getresgid, getresuid};
use unbroken_guests::{Guest, Place, main as run, refused, same};

struct Credentials {
    place: Place,
    before: String,
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
        Ok(Self {
            place: place.clone(),
            before: shown()?,
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

fn main() -> ExitCode {
    run::<Credentials>()
}
