//! A server run without protection: what clients are validated against, and the other side of
//! every comparison.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{send, wait_until};
use crate::{PATIENCE, Scratch, Signal};

/// An unprotected server on the loopback of the calling thread's namespace.
#[derive(Debug)]
pub struct Plain {
    child: Child,
    address: SocketAddr,
}

impl Plain {
    /// Starts `command` and waits until it accepts connections on `port`.
    pub fn start(command: &[String], port: u16, scratch: &Scratch) -> Result<Self> {
        let [program, arguments @ ..] = command else {
            bail!("no command to start")
        };
        let log = File::create(scratch.path().join("plain.log"))?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut plain = Self { child, address };
        plain.wait_listening()?;
        Ok(plain)
    }

    fn wait_listening(&mut self) -> Result<()> {
        let (child, address) = (&mut self.child, self.address);
        wait_until(&format!("a listener on {address}"), PATIENCE, || {
            if let Some(status) = child.try_wait()? {
                bail!("the server ended before it listened: {status}");
            }
            Ok(TcpStream::connect(address).ok().map(drop))
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Kills the server as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        send(self.child.id() as i32, Signal::SIGKILL)?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // It may have been killed already; either way it is gone and reaped after this.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
