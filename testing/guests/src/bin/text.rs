//! Text that is written to now and then, as by a compiler at run time or a dynamic linker: made
//! writable, written, and made what it was; by the program itself, by a call that copies to
//! memory, and by a child.

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid};
use unbroken_guests::area::Area;
use unbroken_guests::raw::call;
use unbroken_guests::text::Text;
use unbroken_guests::{Guest, Place, main as run, refused, same};

struct Written(Text);

impl Guest for Written {
    fn set_up(place: &Place) -> Result<Self> {
        Ok(Self(Text::map(place)?))
    }

    fn check(&mut self) -> Result<()> {
        self.0.compare()
    }

    /// Any number of words, done one after the other.
    fn step(&mut self, words: &str) -> Result<()> {
        let text = &mut self.0;
        for word in words.split(' ') {
            match word {
                "open" => text.open()?,
                "write" => text.change(write_plainly)?,
                "copy" => {
                    text.change(|area, offset, bytes| area.copy_in(getpid(), offset, bytes))?
                }
                "close" => text.close()?,
                "overreach" => {
                    let copied = text.area().copy_in(getpid(), 0, b"never");
                    refused("copying to text", copied, libc::EFAULT)?;
                }
                "child" => text.change(write_by_child)?,
                _ => bail!("this guest does not know {word:?}"),
            }
        }
        Ok(())
    }
}

fn write_plainly(area: &Area, offset: usize, bytes: &[u8]) -> io::Result<()> {
    area.write(offset, bytes);
    Ok(())
}

/// The text is open then. One half is copied there, the other goes through the file.
fn write_by_child(area: &Area, offset: usize, bytes: &[u8]) -> Result<()> {
    let parent = getpid();
    // SAFETY: this program has one thread, so its child may do all that it may.
    match unsafe { fork()? } {
        ForkResult::Child => {
            let code = match write_to_parent(parent, area, offset, bytes) {
                Ok(()) => 0,
                Err(cause) => {
                    eprintln!("child: {cause:#}");
                    1
                }
            };
            // SAFETY: ends the child without what its parent wants done at its own end.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => same(
            "the child's end",
            waitpid(child, None)?,
            WaitStatus::Exited(child, 0),
        ),
    }
}

fn write_to_parent(parent: Pid, area: &Area, offset: usize, bytes: &[u8]) -> Result<()> {
    let (pid, place) = (parent.as_raw() as u64, (area.address() + offset) as u64);
    for request in [
        libc::PTRACE_SEIZE,
        libc::PTRACE_ATTACH,
        libc::PTRACE_POKEDATA,
    ] {
        let arguments = [u64::from(request), pid, place, 7];
        let traced = call(libc::SYS_ptrace, arguments);
        refused("tracing the parent", traced, libc::EPERM)?;
    }
    let (first, second) = bytes.split_at(bytes.len() / 2);
    area.copy_in(parent, offset, first).context("copy")?;
    let path = format!("/proc/{parent}/mem");
    let memory = OpenOptions::new().write(true).open(path)?;
    memory.write_all_at(second, place + first.len() as u64)?;
    ensure!(
        area.read(offset, bytes.len()) != bytes,
        "it wrote to itself"
    );
    Ok(())
}

fn main() -> ExitCode {
    run::<Written>()
}
