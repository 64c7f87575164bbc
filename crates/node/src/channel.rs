//! Messages with descriptors between processes of ours.

use serde::{Serialize, de::DeserializeOwned};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use unbroken_image::{decode, encode_into};
use unbroken_sys::channel::Channel;

/// The longest message: a service's configuration with its environment fits well, and so does a
/// user who is in 65,536 groups, the most there can be.
const MESSAGE_BYTES_MAX: usize = 320 << 10;

/// Sends one message and copies of `descriptors`.
pub fn send<T: Serialize>(
    channel: &Channel,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut bytes = Vec::new();
    encode_into(message, &mut bytes);
    channel.send(&bytes, descriptors)
}

/// Receives one message, with its descriptors, and its sender if the channel asked for it.
/// `UnexpectedEof` when the other end is gone.
pub fn receive<T: DeserializeOwned>(
    channel: &Channel,
) -> io::Result<(T, Vec<OwnedFd>, Option<i32>)> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let received = match channel.receive(&mut bytes) {
        Ok(received) if received.length_bytes > 0 => received,
        Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
        // It went and left something unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Err(error) => return Err(error),
    };
    let message = decode("a message", &bytes[..received.length_bytes])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((message, received.descriptors, received.sender_pid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (left, right) = Channel::pair().expect("pair");
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        send(&left, &7u32, &[write.as_fd()]).expect("send");
        drop(write);
        let (message, descriptors, _) = receive::<u32>(&right).expect("receive");
        assert_eq!((message, descriptors.len()), (7, 1));
        rustix::io::write(&descriptors[0], b"x").expect("write");
        drop(descriptors);
        let mut buffer = [0; 8];
        assert_eq!(rustix::io::read(&read, &mut buffer).expect("read"), 1);
    }

    #[test]
    fn an_end_that_is_gone_is_told_as_such_whatever_it_left_unread() {
        for unread in [false, true] {
            let (left, right) = Channel::pair().expect("pair");
            if unread {
                send(&right, &7u32, &[]).expect("send");
            }
            drop(left);
            let error = receive::<u32>(&right).expect_err("nobody is there");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    /// What a node is sent by the one that it started.
    #[test]
    fn fuzz_notices() {
        use crate::primary::Notice;
        let samples = [
            Notice::Empty,
            Notice::Warm,
            Notice::Refused("a reason".to_owned()),
        ];
        let samples = samples.map(|notice| {
            let mut bytes = Vec::new();
            encode_into(&notice, &mut bytes);
            bytes
        });
        unbroken_fuzz::bytes("notice", &samples, |bytes| {
            let _ = decode::<Notice>("a notice", bytes);
        });
    }
}
