//! The two ends of the wire. Both descriptors are nonblocking TUN devices with a virtio network
//! header of [`VNET_HEADER_BYTES`](crate::packet::VNET_HEADER_BYTES) in front of each packet.

use crate::craft::CraftedPacket;
use crate::gate::{OutputKind, ReleasedFrame};
use crate::merge::Joined;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What became of a packet that was to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a refused packet is lost unless somebody counts or repeats it"]
pub enum Sent {
    Whole,
    /// The kernel would not take it: the device is down, its queue is full, or the packet is not
    /// one. Networks lose packets; whoever sent it sends it again.
    Refused,
}

/// The device in the service's network namespace: what the service sends is read here, what
/// clients send is written here.
#[derive(Debug)]
pub struct ServiceSide(File);

/// The device on the host: what clients send is read here. Writing takes proof that the output may
/// leave.
#[derive(Debug)]
pub struct ClientSide(File);

impl ServiceSide {
    pub fn new(tun: OwnedFd) -> Self {
        Self(tun.into())
    }

    /// Reads one frame of the service's output; `None` when there is none now.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        read_frame(&self.0, frame)
    }

    /// Gives the service a frame of input.
    pub fn write(&self, frame: &[u8]) -> io::Result<Sent> {
        write_frame(&self.0, frame)
    }
}

impl ClientSide {
    pub fn new(tun: OwnedFd) -> Self {
        Self(tun.into())
    }

    /// Reads one frame of clients' input; `None` when there is none now.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        read_frame(&self.0, frame)
    }

    /// Sends a released packet; chunks of standard output do not go this way and are refused.
    pub fn send(&self, frame: ReleasedFrame<'_>) -> io::Result<Sent> {
        match frame.kind() {
            OutputKind::Packet => write_frame(&self.0, frame.bytes()),
            OutputKind::StandardOutput | OutputKind::StandardError => Err(io::Error::new(
                ErrorKind::InvalidInput,
                "a chunk of text is no packet",
            )),
        }
    }

    /// Sends segments that were joined, as one packet if the kernel takes that.
    pub fn send_joined(&self, joined: &Joined<'_>) -> io::Result<()> {
        if joined.frames().len() > 1 {
            let front = joined.front();
            let mut parts = Vec::with_capacity(1 + joined.frames().len());
            parts.push(IoSlice::new(&front));
            parts.extend(joined.payloads().map(IoSlice::new));
            if write_parts(&self.0, &parts)? == Sent::Whole {
                return Ok(());
            }
        }
        for frame in joined.frames() {
            let _ = self.send(*frame)?;
        }
        Ok(())
    }

    /// Sends a packet that a takeover built from committed state.
    pub fn send_crafted(&self, packet: &CraftedPacket) -> io::Result<Sent> {
        write_frame(&self.0, packet.frame())
    }
}

impl AsFd for ServiceSide {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for ClientSide {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn read_frame(mut tun: &File, frame: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match tun.read(frame) {
            Ok(length_bytes) => return Ok(Some(length_bytes)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn write_frame(tun: &File, frame: &[u8]) -> io::Result<Sent> {
    write_parts(tun, &[IoSlice::new(frame)])
}

fn write_parts(mut tun: &File, parts: &[IoSlice<'_>]) -> io::Result<Sent> {
    loop {
        match tun.write_vectored(parts) {
            Ok(_) => return Ok(Sent::Whole),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if is_refusal(&error) => return Ok(Sent::Refused),
            Err(error) => return Err(error),
        }
    }
}

/// `tun_get_user` (`drivers/net/tun.c`): EAGAIN and ENOMEM without memory for the packet, ENOBUFS
/// with a full queue, EIO while the device is down, EINVAL for a packet that is none.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOMEM | libc::ENOBUFS | libc::EIO | libc::EINVAL)
    )
}
