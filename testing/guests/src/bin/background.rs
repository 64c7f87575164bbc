//! A server that puts itself in the background, in one of the ways that servers have. It is told
//! which by a third argument; its number stands in a file.

#![allow(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getpgrp, getpid, getppid, getsid, setpgid, setsid};
use unbroken_guests::{Guest, Place, main as run, same, same_bytes};

/// Longer than it takes to notice that there are two processes.
const LEISURE: Duration = Duration::from_millis(300);
const SHORT_LIVES: usize = 57;

struct Background {
    way: String,
    file: PathBuf,
    ids: [Pid; 4],
    grown: Vec<u8>,
}

impl Guest for Background {
    fn set_up(place: &Place) -> Result<Self> {
        let mut guest = Self {
            way: way(),
            file: place.directory.join("pid"),
            ids: ids()?,
            grown: Vec::new(),
        };
        guest.remember()?;
        guest.is_as_expected()?;
        Ok(guest)
    }

    fn check(&mut self) -> Result<()> {
        same("pid, parent, group, session", ids()?, self.ids)?;
        self.is_as_expected()?;
        let written = std::fs::read_to_string(&self.file)?;
        same("number in the file", written, getpid().to_string())?;
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        let own = format!("{} ", getpid());
        ensure!(stat.starts_with(&own), "/proc shows {stat}");
        let expected = unbroken_guests::pattern(7, self.grown.len());
        same_bytes("memory", &self.grown, &expected)?;
        self.grown = unbroken_guests::pattern(7, self.grown.len() + 100_000);
        Ok(())
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words.split_once(' ') {
            None if words == "leave" => {
                leave(|| std::thread::sleep(LEISURE), 0)?;
                self.remember()?;
                // It will be, when the other one has ended.
                self.ids[1] = Pid::from_raw(1);
                Ok(())
            }
            None if words == "signalled" => {
                let mut set = SigSet::empty();
                set.add(Signal::SIGUSR1);
                same("signal", set.wait()?, Signal::SIGUSR1)
            }
            Some(("exit", code)) => std::process::exit(code.parse()?),
            Some(("leave", "when asked to end")) => {
                // SAFETY: what the handler does is safe in a handler (signal-safety(7)).
                unsafe { nix::sys::signal::signal(Signal::SIGTERM, LEAVE)? };
                Ok(())
            }
            _ => bail!("this guest does not know {words:?}"),
        }
    }
}

/// A process that is asked to end for the first time leaves a child in its place.
const LEAVE: nix::sys::signal::SigHandler = nix::sys::signal::SigHandler::Handler(leave_a_child);

extern "C" fn leave_a_child(_: i32) {
    // SAFETY: fork, _exit and signal are safe in a handler, and the process has one thread.
    unsafe {
        libc::signal(libc::SIGTERM, libc::SIG_DFL);
        if libc::fork() != 0 {
            libc::_exit(0);
        }
    }
}

impl Background {
    fn remember(&mut self) -> Result<()> {
        self.ids = ids()?;
        std::fs::write(&self.file, getpid().to_string())?;
        Ok(())
    }

    /// That the way led where it should: the check of the check.
    fn is_as_expected(&self) -> Result<()> {
        let [pid, parent, group, session] = self.ids.map(Pid::as_raw);
        same("parent", parent, 1)?;
        let expected = match &*self.way {
            "stay" => pid == 2 || session == 2,
            "once" | "at-once" | "fail" => pid == 3 && [group, session] == [3, 3],
            "same-session" => pid == 3 && [group, session] == [2, 2],
            "twice" => pid == 4 && [group, session] == [3, 3],
            "other-group" => pid == 4 && [group, session] == [3, 2],
            "thrice" => pid == 5 && [group, session] == [4, 3],
            "high" => pid > SHORT_LIVES as i32 && [group, session] == [pid, pid],
            _ => false,
        };
        ensure!(
            expected,
            "{}: pid {pid}, group {group}, session {session}",
            self.way
        );
        Ok(())
    }
}

fn ids() -> Result<[Pid; 4]> {
    Ok([getpid(), getppid(), getpgrp(), getsid(None)?])
}

fn way() -> String {
    std::env::args().nth(3).unwrap_or_default()
}

/// Goes on in a child; the parent ends with `code` after `before_end`.
fn leave(before_end: impl FnOnce(), code: i32) -> Result<()> {
    // SAFETY: the process has one thread.
    if let ForkResult::Parent { .. } = unsafe { fork()? } {
        before_end();
        // Nothing that belongs to the child is undone.
        // SAFETY: it only ends the process.
        unsafe { libc::_exit(code) };
    }
    Ok(())
}

/// As [`leave`], and the parent waits until this side of the pipe is closed everywhere else.
fn leave_when_ready() -> Result<std::io::PipeWriter> {
    let (mut ready, writer) = std::io::pipe()?;
    // SAFETY: the process has one thread.
    if let ForkResult::Parent { .. } = unsafe { fork()? } {
        drop(writer);
        let _ = std::io::Read::read(&mut ready, &mut [0]);
        // SAFETY: it only ends the process.
        unsafe { libc::_exit(0) };
    }
    Ok(writer)
}

fn go(way: &str) -> Result<()> {
    let none = Pid::from_raw(0);
    match way {
        "stay" => {}
        "once" => {
            let ready = leave_when_ready()?;
            setsid()?;
            drop(ready);
        }
        "same-session" => drop(leave_when_ready()?),
        "twice" => {
            let ready = leave_when_ready()?;
            setsid()?;
            leave(|| {}, 0)?;
            drop(ready);
        }
        "other-group" => {
            let ready = leave_when_ready()?;
            setpgid(none, none)?;
            leave(|| {}, 0)?;
            drop(ready);
        }
        "thrice" => {
            let ready = leave_when_ready()?;
            setsid()?;
            leave(|| {}, 0)?;
            setpgid(none, none)?;
            leave(|| {}, 0)?;
            drop(ready);
        }
        "at-once" => {
            leave(|| {}, 0)?;
            setsid()?;
        }
        "fail" => {
            leave(|| std::thread::sleep(LEISURE), 3)?;
            setsid()?;
        }
        "high" => {
            for _ in 0..SHORT_LIVES {
                // SAFETY: the process has one thread.
                match unsafe { fork()? } {
                    // SAFETY: it only ends the process.
                    ForkResult::Child => unsafe { libc::_exit(0) },
                    ForkResult::Parent { child } => drop(waitpid(child, None)?),
                }
            }
            let ready = leave_when_ready()?;
            setsid()?;
            drop(ready);
        }
        _ => bail!("there is no way {way:?}"),
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut waits = SigSet::empty();
    waits.add(Signal::SIGUSR1);
    if let Err(cause) = waits
        .thread_block()
        .map_err(Into::into)
        .and_then(|()| go(&way()))
    {
        eprintln!("{cause:#}");
        return ExitCode::FAILURE;
    }
    run::<Background>()
}
