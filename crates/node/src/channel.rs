//! Messages with descriptors between processes of ours, over a `SOCK_SEQPACKET` pair.

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The longest message; a service's configuration with its environment fits well.
const MESSAGE_BYTES_MAX: usize = 160 * 1024;
const DESCRIPTORS_MAX: usize = 32;

/// Both ends of a new channel; neither is inherited across exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one message and copies of `descriptors`.
pub fn send<T: Serialize>(
    channel: BorrowedFd<'_>,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    sendmsg(
        channel,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives one message; `None` when the other side has closed the channel.
///
/// Blocks unless the channel is nonblocking.
pub fn receive<T: DeserializeOwned>(
    channel: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg(channel, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let message = postcard::from_bytes(&bytes[..received.bytes]).map_err(io::Error::other)?;
    Ok(Some((message, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (left, right) = pair().expect("pair");
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        send(left.as_fd(), &7u32, &[write.as_fd()]).expect("send");
        drop(write);
        let (message, descriptors) = receive::<u32>(right.as_fd())
            .expect("receive")
            .expect("one");
        assert_eq!((message, descriptors.len()), (7, 1));
        rustix::io::write(&descriptors[0], b"x").expect("write");
        drop(descriptors);
        let mut buffer = [0; 8];
        assert_eq!(rustix::io::read(&read, &mut buffer).expect("read"), 1);
    }

    #[test]
    fn a_closed_channel_is_an_end_not_an_error() {
        let (left, right) = pair().expect("pair");
        drop(left);
        assert!(receive::<u32>(right.as_fd()).expect("receive").is_none());
    }

    /// What a node is sent by the one that starts it.
    #[test]
    fn fuzz_notices() {
        use crate::primary::Notice;
        let samples = [
            Notice::Empty,
            Notice::Warm,
            Notice::Refused("a reason".to_owned()),
        ];
        let samples = samples.map(|notice| postcard::to_stdvec(&notice).expect("encode"));
        unbroken_fuzz::bytes("notice", &samples, |bytes| {
            let _ = postcard::from_bytes::<Notice>(bytes);
        });
    }
}
