//! What a process has besides memory and descriptors: pid, parent, umask, working directory,
//! limits, nice value, personality, prctl settings, environment, arguments.

use std::ffi::CString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{getpgrp, getpid, getppid, getsid};
use unbroken_guests::raw::{call, prctl_get, prctl_set};
use unbroken_guests::{Guest, Place, main as run, same};

const NAME: &[u8] = b"a guest's name\0";

struct Process {
    ids: [i32; 5],
    directory: PathBuf,
    environment: Vec<(String, String)>,
    round: u64,
}

fn ids() -> Result<[i32; 5]> {
    let thread = call(libc::SYS_gettid, [0; 4])? as i32;
    Ok([
        getpid().as_raw(),
        getppid().as_raw(),
        getpgrp().as_raw(),
        getsid(None)?.as_raw(),
        thread,
    ])
}

impl Guest for Process {
    fn set_up(place: &Place) -> Result<Self> {
        let directory = place.directory.join("working directory");
        std::fs::create_dir_all(&directory)?;
        std::env::set_current_dir(&directory)?;
        let process = Self {
            ids: ids()?,
            directory,
            environment: std::env::vars().collect(),
            round: 0,
        };
        process.arm()?;
        Ok(process)
    }

    fn check(&mut self) -> Result<()> {
        same("pid, parent, group, session, thread", ids()?, self.ids)?;
        same(
            "working directory",
            std::env::current_dir()?,
            self.directory.clone(),
        )?;
        std::fs::write(format!("round {}", self.round), "x")?;
        ensure!(
            self.directory
                .join(format!("round {}", self.round))
                .exists(),
            "a relative path leads elsewhere"
        );
        let mask = umask(Mode::from_bits_truncate(0o22));
        same("umask", mask.bits(), 0o27 + 0o100 * (self.round as u32 % 2))?;
        for (resource, soft, hard) in self.limits() {
            same(&format!("{resource:?}"), getrlimit(resource)?, (soft, hard))?;
        }
        same("nice", nice()?, nice_in(self.round) as i64)?;
        const ADDR_NO_RANDOMIZE: i64 = 0x004_0000;
        same(
            "personality",
            call(libc::SYS_personality, [0xffff_ffff, 0, 0, 0])?,
            ADDR_NO_RANDOMIZE,
        )?;
        for (name, option, expected) in [
            ("dumpable", libc::PR_GET_DUMPABLE, 1 - self.round as i64 % 2),
            ("no_new_privs", libc::PR_GET_NO_NEW_PRIVS, 1),
            ("timer slack", libc::PR_GET_TIMERSLACK, 77_000),
            ("huge pages disabled", libc::PR_GET_THP_DISABLE, 1),
            ("keep capabilities", libc::PR_GET_KEEPCAPS, 0),
        ] {
            same(name, prctl_get(option)?, expected)?;
        }
        let mut name = std::fs::read("/proc/thread-self/comm").context("read the thread's name")?;
        name.pop();
        same("thread name", name, NAME[..NAME.len() - 1].to_vec())?;
        self.as_started().context("as it was started")?;
        self.round += 1;
        self.arm()
    }
}

impl Process {
    fn arm(&self) -> Result<()> {
        umask(Mode::from_bits_truncate(
            0o27 + 0o100 * (self.round as u32 % 2),
        ));
        for (resource, soft, hard) in self.limits() {
            setrlimit(resource, soft, hard).with_context(|| format!("{resource:?}"))?;
        }
        call(libc::SYS_setpriority, [0, 0, nice_in(self.round), 0])?;
        call(libc::SYS_personality, [0x004_0000, 0, 0, 0])?;
        prctl_set(libc::PR_SET_DUMPABLE, 1 - self.round % 2)?;
        prctl_set(libc::PR_SET_NO_NEW_PRIVS, 1)?;
        prctl_set(libc::PR_SET_TIMERSLACK, 77_000)?;
        prctl_set(libc::PR_SET_THP_DISABLE, 1)?;
        let name = CString::from_vec_with_nul(NAME.to_vec())?;
        nix::sys::prctl::set_name(&name)?;
        Ok(())
    }

    fn limits(&self) -> [(Resource, u64, u64); 3] {
        [
            (Resource::RLIMIT_NOFILE, 500 - self.round, 900),
            (Resource::RLIMIT_CORE, 0, 4096),
            (
                Resource::RLIMIT_STACK,
                (4 << 20) + self.round * 4096,
                8 << 20,
            ),
        ]
    }

    /// What the program loader left is still read from where it was.
    fn as_started(&self) -> Result<()> {
        let environment: Vec<_> = std::env::vars().collect();
        ensure!(environment == self.environment, "another environment");
        let arguments: Vec<String> = std::env::args().collect();
        let line = std::fs::read("/proc/self/cmdline")?;
        same(
            "arguments",
            String::from_utf8_lossy(&line).into_owned(),
            arguments.join("\0") + "\0",
        )?;
        let shown = std::fs::read("/proc/self/environ")?;
        ensure!(shown.len() > 1, "the environment does not show");
        same(
            "executable",
            std::fs::read_link("/proc/self/exe")?,
            std::path::Path::new(&arguments[0]).canonicalize()?,
        )?;
        let auxiliary = std::fs::read("/proc/self/auxv")?;
        same("page size", rustix::param::page_size(), 4096)?;
        ensure!(auxiliary.len() > 100, "the auxiliary vector does not show");
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        ensure!(stat.contains("guest's name"), "{stat}");
        Ok(())
    }
}

/// It grows, and there is none beyond 19.
fn nice_in(round: u64) -> u64 {
    (3 + round).min(19)
}

/// The call gives 20 less the nice value.
fn nice() -> Result<i64> {
    Ok(20 - call(libc::SYS_getpriority, [0, 0, 0, 0])?)
}

fn main() -> ExitCode {
    run::<Process>()
}
