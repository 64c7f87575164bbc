//! One route by `rtnetlink(7)`: that packets for ::1 may come in by a device other than lo.
//!
//! The blocks rely on: `socket`, `if_nametoindex` take no pointer but a C string; the new
//! descriptor is owned by nobody else.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv6Addr;
use std::os::fd::FromRawFd;

/// Behind the kernel's own route for ::1 on lo, whose metric is 0: what goes out is not touched.
const METRIC: u32 = 2048;
/// nlmsghdr and rtmsg of linux/netlink.h, linux/rtnetlink.h.
const MESSAGE_BYTES: usize = 16 + 12 + (4 + 16) + (4 + 4) + (4 + 4);

/// Adds `local ::1 dev DEVICE` to the local table of the calling thread's network namespace. One
/// that is there already is no error. It vanishes with the device.
pub fn add_loopback_ipv6(device: &str) -> io::Result<()> {
    let name = CString::new(device)?;
    // SAFETY: a C string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and owned by this File alone.
    let mut socket = unsafe { File::from_raw_fd(socket) };
    socket.write_all(&request(index))?;
    let mut answer = [0; 512];
    let length = socket.read(&mut answer)?;
    match error_number(&answer[..length])? {
        0 | libc::EEXIST => Ok(()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

fn request(device_index: u32) -> Vec<u8> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let mut message = Vec::with_capacity(MESSAGE_BYTES);
    message.extend((MESSAGE_BYTES as u32).to_ne_bytes());
    message.extend(libc::RTM_NEWROUTE.to_ne_bytes());
    message.extend((flags as u16).to_ne_bytes());
    // Sequence and port: one request on a socket of its own needs neither.
    message.extend([0; 8]);
    // rtm_family, dst_len, src_len, tos, table, protocol, scope, type, flags.
    message.extend([libc::AF_INET6 as u8, 128, 0, 0]);
    message.extend([
        libc::RT_TABLE_LOCAL,
        libc::RTPROT_STATIC,
        libc::RT_SCOPE_UNIVERSE,
        libc::RTN_LOCAL,
    ]);
    message.extend([0; 4]);
    attribute(&mut message, libc::RTA_DST, &Ipv6Addr::LOCALHOST.octets());
    attribute(&mut message, libc::RTA_OIF, &device_index.to_ne_bytes());
    attribute(&mut message, libc::RTA_PRIORITY, &METRIC.to_ne_bytes());
    message
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend((4 + value.len() as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
}

/// The positive errno of an NLMSG_ERROR answer; 0 is an acknowledgement.
fn error_number(answer: &[u8]) -> io::Result<i32> {
    let kind = answer.get(4..6).map(|bytes| [bytes[0], bytes[1]]);
    let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok());
    match (kind.map(u16::from_ne_bytes), code) {
        (Some(kind), Some(code)) if i32::from(kind) == libc::NLMSG_ERROR => {
            Ok(-i32::from_ne_bytes(code))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_as_long_as_it_says() {
        let message = request(7);
        assert_eq!(message.len(), MESSAGE_BYTES);
        assert_eq!(message[..4], (MESSAGE_BYTES as u32).to_ne_bytes());
    }

    #[test]
    fn an_unknown_device_is_said() {
        let error = add_loopback_ipv6("no-such-device").expect_err("unknown");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        assert!(error_number(&[0; 36]).is_err());
        assert!(error_number(&[]).is_err());
    }
}
