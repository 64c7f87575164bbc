//! What cannot be replicated while it lasts, and passes: descriptors in flight on a Unix socket,
//! bytes on a Unix connection that is not accepted yet, a child that has ended and is not waited
//! for. A connection that is not accepted and has said nothing is no hindrance.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use unbroken_guests::{Guest, Place, main as run, same, same_bytes};

struct Hindrances {
    pair: (UnixStream, UnixStream),
    listener: UnixListener,
    path: PathBuf,
    /// Not accepted, and silent.
    silent: UnixStream,
    child: Option<Child>,
}

impl Guest for Hindrances {
    fn set_up(place: &Place) -> Result<Self> {
        let path = place.directory.join("listener");
        let listener = UnixListener::bind(&path)?;
        Ok(Self {
            pair: UnixStream::pair()?,
            silent: UnixStream::connect(&path)?,
            listener,
            path,
            child: None,
        })
    }

    /// Accepts the silent one and talks over it; another one waits then.
    fn check(&mut self) -> Result<()> {
        let (mut accepted, _) = self.listener.accept().context("accept")?;
        self.silent.write_all(b"hello")?;
        let mut heard = [0; 5];
        accepted.read_exact(&mut heard)?;
        same_bytes("over an accepted connection", &heard, b"hello")?;
        accepted.write_all(b"there")?;
        self.silent.read_exact(&mut heard)?;
        same_bytes("the other way", &heard, b"there")?;
        self.silent = UnixStream::connect(&self.path)?;
        Ok(())
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words {
            "send a descriptor" => self.send_descriptor(),
            "take the descriptor" => self.take_descriptor(),
            "speak unaccepted" => Ok(self.silent.write_all(b"early")?),
            "accept" => self.accept_early(),
            "leave a child" => {
                self.child = Some(Command::new("/bin/true").spawn()?);
                Ok(())
            }
            "wait for the child" => {
                let mut child = self.child.take().context("no child")?;
                same("its exit code", child.wait()?.code(), Some(0))
            }
            _ => bail!("this guest does not know {words:?}"),
        }
    }
}

impl Hindrances {
    /// The receiving end of a pipe with something in it, whose only descriptor is the one in flight.
    fn send_descriptor(&self) -> Result<()> {
        let (read, write) = nix::unistd::pipe()?;
        File::from(write).write_all(b"passed on")?;
        let rights = [read.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&rights)];
        let text = [IoSlice::new(b"x")];
        sendmsg::<()>(
            self.pair.0.as_raw_fd(),
            &text,
            &message,
            MsgFlags::empty(),
            None,
        )?;
        Ok(())
    }

    fn take_descriptor(&self) -> Result<()> {
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut text = [0; 1];
        let mut buffers = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::empty();
        let end = self.pair.1.as_raw_fd();
        let message = recvmsg::<()>(end, &mut buffers, Some(&mut space), flags)?;
        let Some(ControlMessageOwned::ScmRights(rights)) = message.cmsgs()?.next() else {
            bail!("no descriptor came");
        };
        let fd = *rights.first().context("no descriptor came")?;
        // SAFETY: the kernel has just made this descriptor for us.
        let passed = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut found = Vec::new();
        File::from(passed).read_to_end(&mut found)?;
        same_bytes("through the descriptor", &found, b"passed on")
    }

    fn accept_early(&mut self) -> Result<()> {
        let (mut accepted, _) = self.listener.accept()?;
        let mut heard = [0; 5];
        accepted.read_exact(&mut heard)?;
        same_bytes("said before the accept", &heard, b"early")?;
        self.silent = UnixStream::connect(&self.path)?;
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Hindrances>()
}
