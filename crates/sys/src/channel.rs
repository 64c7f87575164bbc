//! Unix seqpacket pairs between processes of ours: messages with descriptors and a sender's pid.
//!
//! The unsafe blocks build `msghdr` structures over live buffers whose lengths they pass, and
//! take ownership of descriptors that the kernel installed for this process.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Descriptors that one message can carry: the kernel's own limit (net/scm.h, SCM_MAX_FD).
pub const DESCRIPTORS_MAX: usize = 253;

// Room for SCM_RIGHTS with DESCRIPTORS_MAX and SCM_CREDENTIALS, aligned as cmsg(3) asks.
#[repr(C, align(8))]
struct ControlBuffer([u8; CONTROL_BYTES]);

const CONTROL_BYTES: usize = 1088;

/// One end of a connection that keeps message borders.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// One received message.
#[derive(Debug)]
pub struct Received {
    /// Bytes written to the caller's buffer; 0 when every holder of the other end is gone.
    pub length_bytes: usize,
    pub descriptors: Vec<OwnedFd>,
    /// The sending process in the receiver's pid namespace; only on a channel that asked for it.
    pub sender_pid: Option<i32>,
}

impl Channel {
    /// Two connected ends, close-on-exec.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let mut ends = [0; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: socketpair fills two integers.
        check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
        // SAFETY: both descriptors are new and ours.
        let [first, second] = ends.map(|end| Channel(unsafe { OwnedFd::from_raw_fd(end) }));
        Ok((first, second))
    }

    /// Asks for the sender's pid with each message received here.
    pub fn want_sender_pid(&self) -> io::Result<()> {
        let on: libc::c_int = 1;
        // SAFETY: the option is an int, which `on` is.
        check(unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PASSCRED,
                (&raw const on).cast(),
                mem::size_of_val(&on) as u32,
            )
        })
    }

    /// Sends one message; at most [`DESCRIPTORS_MAX`] descriptors go with it as duplicates.
    /// Never raises `SIGPIPE`; `EPIPE` when the other end is gone.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(0, bytes, descriptors)
    }

    /// The same, but does not wait for room: `WouldBlock` when there is none.
    pub fn try_send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(libc::MSG_DONTWAIT, bytes, descriptors)
    }

    fn send_with(
        &self,
        flags: libc::c_int,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        if descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut control = ControlBuffer([0; CONTROL_BYTES]);
        let mut part = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: all zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        if !descriptors.is_empty() {
            let length = mem::size_of_val(descriptors) as u32;
            message.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: pure arithmetic.
            message.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as usize;
            // SAFETY: the buffer is aligned and larger than CMSG_SPACE of DESCRIPTORS_MAX, so the
            // first header and its data lie inside it.
            unsafe {
                let header = libc::CMSG_FIRSTHDR(&raw const message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for (index, descriptor) in descriptors.iter().enumerate() {
                    data.add(index).write_unaligned(descriptor.as_raw_fd());
                }
            }
        }
        loop {
            // SAFETY: `message` points to live buffers of the lengths it names.
            let sent = unsafe {
                libc::sendmsg(
                    self.0.as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL | flags,
                )
            };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Waits for one message. A longer one than `buffer` is an error (`EMSGSIZE`).
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        self.receive_with(0, buffer)
    }

    /// The same, but does not wait: `WouldBlock` when there is no message.
    pub fn try_receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        self.receive_with(libc::MSG_DONTWAIT, buffer)
    }

    fn receive_with(&self, flags: libc::c_int, buffer: &mut [u8]) -> io::Result<Received> {
        let mut control = ControlBuffer([0; CONTROL_BYTES]);
        let mut part = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: all zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = control.0.len();
        let length_bytes = loop {
            // SAFETY: `message` points to live buffers of the lengths it names.
            let length = unsafe {
                libc::recvmsg(
                    self.0.as_raw_fd(),
                    &raw mut message,
                    libc::MSG_CMSG_CLOEXEC | flags,
                )
            };
            if length >= 0 {
                break length as usize;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        };
        let (descriptors, sender_pid) = read_control(&message);
        if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        Ok(Received {
            length_bytes,
            descriptors,
            sender_pid,
        })
    }
}

/// Takes over the descriptors in a received message's control part, and finds the sender.
fn read_control(message: &libc::msghdr) -> (Vec<OwnedFd>, Option<i32>) {
    let mut descriptors = Vec::new();
    let mut sender_pid = None;
    // SAFETY: the kernel wrote msg_controllen bytes of well-formed headers; the CMSG macros stay
    // inside them. Each number of SCM_RIGHTS is a descriptor installed for us alone.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            let data = libc::CMSG_DATA(header);
            let data_bytes = (*header).cmsg_len - (data as usize - header as usize);
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    let numbers = data.cast::<RawFd>();
                    for index in 0..data_bytes / mem::size_of::<RawFd>() {
                        let number = numbers.add(index).read_unaligned();
                        descriptors.push(OwnedFd::from_raw_fd(number));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                    let credentials = data.cast::<libc::ucred>().read_unaligned();
                    // 0 is a sender whose namespace the receiver cannot see.
                    sender_pid = (credentials.pid > 0).then_some(credentials.pid);
                }
                _ => {}
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    (descriptors, sender_pid)
}

impl From<OwnedFd> for Channel {
    fn from(descriptor: OwnedFd) -> Self {
        Channel(descriptor)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_bytes_descriptors_and_the_sender() {
        let (left, right) = Channel::pair().expect("socketpair");
        right.want_sender_pid().expect("SO_PASSCRED");
        left.send(b"hello", &[left.as_fd(), right.as_fd()])
            .expect("send");
        let mut buffer = [0; 16];
        let received = right.receive(&mut buffer).expect("receive");
        assert_eq!(&buffer[..received.length_bytes], b"hello");
        assert_eq!(received.descriptors.len(), 2);
        assert_eq!(received.sender_pid, Some(std::process::id() as i32));
        drop((left, received));
        assert_eq!(
            right
                .receive(&mut buffer)
                .expect("end of file")
                .length_bytes,
            0
        );
    }

    #[test]
    fn refuses_a_message_that_does_not_fit() {
        let (left, right) = Channel::pair().expect("socketpair");
        left.send(b"too long", &[]).expect("send");
        let error = right.receive(&mut [0; 4]).expect_err("cut off");
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    }
}
