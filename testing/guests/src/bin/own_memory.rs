//! The memory of a process as a file: /proc/PID/mem writes past the protection of every page. The
//! program writes to its own text through it, with a descriptor that it opens for the moment and
//! with one that it keeps. What it can keep and a replica cannot: the memory of another process,
//! and files of processes and threads that end.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, gettid};
use unbroken_guests::area::{Area, PAGE};
use unbroken_guests::raw::call;
use unbroken_guests::text::{PAGES, Text};
use unbroken_guests::{Guest, Place, main as run, same_bytes};

struct OwnMemory {
    text: Text,
    held: Option<File>,
    thread: Option<Companion>,
}

impl Guest for OwnMemory {
    fn set_up(place: &Place) -> Result<Self> {
        Ok(Self {
            text: Text::map(place)?,
            held: None,
            thread: None,
        })
    }

    fn check(&mut self) -> Result<()> {
        self.text.compare()
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words {
            "write" => {
                let memory = open("/proc/self/mem")?;
                self.text.change(|area, offset, bytes| {
                    memory.write_all_at(bytes, (area.address() + offset) as u64)
                })?;
            }
            "hold" => self.held = Some(open("/proc/self/mem")?),
            "hold by a thread" => self.held = Some(of_a_thread("mem")?),
            "write held" => {
                let memory = self.held.as_ref().context("nothing is held")?;
                self.text.change(|area, offset, bytes| {
                    memory.write_all_at(bytes, (area.address() + offset) as u64)
                })?;
            }
            "read held" => {
                let memory = self.held.as_ref().context("nothing is held")?;
                let area = self.text.area();
                let mut found = vec![0; PAGES * PAGE];
                memory.read_exact_at(&mut found, area.address() as u64)?;
                same_bytes("by the held file", &found, &area.read(0, PAGES * PAGE))?;
            }
            "write to the vdso" => open("/proc/self/mem")?.write_all_at(b"x", vdso()?.end - 1)?,
            "renew the vdso" => {
                let (place, length) = (vdso()?.start, vdso()?.end - vdso()?.start);
                let arguments = [place, length, libc::MADV_DONTNEED as u64, 0];
                call(libc::SYS_madvise, arguments)?;
            }
            "point" => self.point()?,
            "write there" => self.write_there()?,
            "hold memory of a child" => self.held = Some(of_a_child("mem")?),
            "hold state of a child" => self.held = Some(of_a_child("stat")?),
            "hold state of a thread" => self.held = Some(of_a_thread("stat")?),
            "hold state of a living thread" => {
                let thread = Companion::start()?;
                self.held = Some(thread.open("stat")?);
                self.thread = Some(thread);
            }
            "read state" => {
                let thread = self.thread.as_ref().context("no thread")?;
                let state = self.held.as_ref().context("nothing is held")?;
                let mut found = vec![0; 64];
                let length = state.read_at(&mut found, 0)?;
                let number = format!("{} ", thread.tid);
                ensure!(
                    found[..length].starts_with(number.as_bytes()),
                    "{:?} is not of thread {number}",
                    String::from_utf8_lossy(&found)
                );
            }
            "end the thread" => self.thread = None,
            "let go" => self.held = None,
            _ => bail!("this guest does not know {words:?}"),
        }
        Ok(())
    }
}

impl OwnMemory {
    /// Puts the position to where the next change goes.
    fn point(&mut self) -> Result<()> {
        let memory = self.held.as_mut().context("nothing is held")?;
        let place = (self.text.area().address() + self.text.next()) as u64;
        memory.seek(SeekFrom::Start(place))?;
        Ok(())
    }

    fn write_there(&mut self) -> Result<()> {
        let memory = self.held.as_mut().context("nothing is held")?;
        let write = |_: &Area, _, bytes: &[u8]| memory.write_all(bytes);
        Ok(self.text.change(write)?)
    }
}

/// Where the kernel's own code is, whose last bytes nobody needs.
fn vdso() -> Result<Range<u64>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    let (start, rest) = line
        .and_then(|line| line.split_once('-'))
        .context("no vDSO")?;
    let (end, _) = rest.split_once(' ').context("no end")?;
    Ok(u64::from_str_radix(start, 16)?..u64::from_str_radix(end, 16)?)
}

fn open(path: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| path.to_owned())
}

/// A thread that waits for its end.
struct Companion {
    tid: Pid,
    thread: Option<JoinHandle<()>>,
    /// Closed, it ends the thread.
    end: Option<Sender<()>>,
}

impl Companion {
    fn start() -> Result<Self> {
        let (say, hear) = channel();
        let (end, ends) = channel();
        let thread = std::thread::spawn(move || {
            let _ = say.send(gettid());
            let _ = ends.recv();
        });
        Ok(Self {
            tid: hear.recv()?,
            thread: Some(thread),
            end: Some(end),
        })
    }

    /// A file that is named by it.
    fn open(&self, name: &str) -> Result<File> {
        let path = format!("/proc/self/task/{}/{name}", self.tid);
        let mut options = File::options();
        let file = options.read(true).write(name == "mem").open(&path);
        file.context(path)
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A file that is named by a thread which has ended since.
fn of_a_thread(name: &str) -> Result<File> {
    Companion::start()?.open(name)
}

/// A file of a process that has ended since.
fn of_a_child(name: &str) -> Result<File> {
    let (read, write) = nix::unistd::pipe()?;
    // SAFETY: the child only waits until its parent lets go of the pipe, and ends.
    match unsafe { fork()? } {
        ForkResult::Child => {
            drop(write);
            let _ = nix::unistd::read(&read, &mut [0]);
            // SAFETY: ends the child without what its parent wants done at its own end.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            let file = File::open(format!("/proc/{child}/{name}"));
            drop(write);
            waitpid(child, None)?;
            Ok(file?)
        }
    }
}

fn main() -> ExitCode {
    run::<OwnMemory>()
}
