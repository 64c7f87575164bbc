//! The few rtnetlink requests that a stage needs (`rtnetlink(7)`): links up, addresses, routes.
//!
//! Messages are built and read as bytes. The unsafe blocks are calls whose only pointers are a C
//! string and nothing else.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::FromRawFd;

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const DUMP: u16 = 0x300;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
const ATTRIBUTE_MTU: u16 = 4;
const ATTRIBUTE_QUEUE_LENGTH: u16 = 13;
const ATTRIBUTE_ADDRESS_FAMILIES: u16 = 26;
const ATTRIBUTE_IP6_GENERATION: u16 = 8;
const IP6_GENERATION_NONE: u8 = 1;
const NESTED: u16 = 0x8000;
const ADDRESS_NO_DUPLICATE_DETECTION: u8 = 0x02;
const ROUTE_TABLE_MAIN: u8 = 254;
const ROUTE_PROTOCOL_STATIC: u8 = 4;
const SCOPE_LINK: u8 = 253;
const SCOPE_UNIVERSE: u8 = 0;
const UNICAST: u8 = 1;

/// An address with the length of the prefix that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub address: IpAddr,
    pub length_bits: u8,
}

/// What [`Netlink::set_link`] changes; `None` and `false` leave things as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkChange {
    pub up: bool,
    pub mtu_bytes: Option<u32>,
    pub queue_packets: Option<u32>,
    /// No link-local IPv6 address, hence no router solicitations of the kernel's own.
    pub no_link_local: bool,
}

/// A route socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    socket: File,
    sequence: u32,
    buffer: Vec<u8>,
}

/// The index of the device `name` in the calling thread's network namespace.
pub fn link_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name)?;
    // SAFETY: a C string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours; read and write on a netlink socket that is not
        // connected talk to the kernel (netlink(7)).
        let socket = unsafe { File::from_raw_fd(socket) };
        Ok(Netlink {
            socket,
            sequence: 0,
            buffer: vec![0; 64 << 10],
        })
    }

    pub fn set_link(&mut self, index: u32, change: LinkChange) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        let up = if change.up { libc::IFF_UP as u32 } else { 0 };
        message.bytes(&[libc::AF_UNSPEC as u8, 0, 0, 0]);
        for word in [index, up, up] {
            message.bytes(&word.to_ne_bytes());
        }
        if let Some(mtu) = change.mtu_bytes {
            message.attribute(ATTRIBUTE_MTU, &mtu.to_ne_bytes());
        }
        if let Some(length) = change.queue_packets {
            message.attribute(ATTRIBUTE_QUEUE_LENGTH, &length.to_ne_bytes());
        }
        if change.no_link_local {
            let mode = encode_attribute(ATTRIBUTE_IP6_GENERATION, &[IP6_GENERATION_NONE]);
            let family = encode_attribute(libc::AF_INET6 as u16 | NESTED, &mode);
            message.attribute(ATTRIBUTE_ADDRESS_FAMILIES | NESTED, &family);
        }
        self.request(message)
    }

    /// Adds an address to a device, IPv6 without duplicate detection. `EEXIST` when it is there.
    pub fn add_address(&mut self, index: u32, address: Prefix) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWADDR, CREATE | EXCLUSIVE);
        let family = family(address.address);
        let flags = ADDRESS_NO_DUPLICATE_DETECTION;
        message.bytes(&[family, address.length_bits, flags, SCOPE_UNIVERSE]);
        message.bytes(&index.to_ne_bytes());
        let octets = octets(address.address);
        message.attribute(libc::IFA_LOCAL, &octets);
        message.attribute(libc::IFA_ADDRESS, &octets);
        self.request(message)
    }

    /// Adds a route through a device without a gateway, to everywhere when the prefix has length
    /// 0. `source` is what local programs send from. `EEXIST` when the host has such a route
    /// already, whatever its device: this is how two services never get one address.
    pub fn add_route(
        &mut self,
        index: u32,
        destination: Prefix,
        source: Option<IpAddr>,
    ) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWROUTE, CREATE | EXCLUSIVE);
        let family = family(destination.address);
        message.bytes(&[family, destination.length_bits, 0, 0]);
        message.bytes(&[ROUTE_TABLE_MAIN, ROUTE_PROTOCOL_STATIC, SCOPE_LINK, UNICAST]);
        message.bytes(&0u32.to_ne_bytes());
        if destination.length_bits > 0 {
            message.attribute(libc::RTA_DST, &octets(destination.address));
        }
        message.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        if let Some(source) = source {
            message.attribute(libc::RTA_PREFSRC, &octets(source));
        }
        self.request(message)
    }

    /// Every address of the namespace.
    pub fn addresses(&mut self) -> io::Result<Vec<Prefix>> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        self.dump(libc::RTM_GETADDR, 8, |header, attributes| {
            let found = find(attributes, libc::IFA_LOCAL)
                .or_else(|| find(attributes, libc::IFA_ADDRESS))?;
            Some(Prefix {
                address: address(found)?,
                length_bits: header[1],
            })
        })
    }

    /// The destination of every route of every table of the namespace, default routes left out.
    pub fn routes(&mut self) -> io::Result<Vec<Prefix>> {
        // struct rtmsg: family, destination length, source length, tos, table, protocol, scope,
        // type, flags.
        self.dump(libc::RTM_GETROUTE, 12, |header, attributes| {
            let found = find(attributes, libc::RTA_DST)?;
            Some(Prefix {
                address: address(found)?,
                length_bits: header[1],
            })
        })
    }

    /// Sends one request and reads the kernel's acknowledgement.
    fn request(&mut self, message: Message) -> io::Result<()> {
        self.sequence += 1;
        self.socket
            .write_all(&message.finish(self.sequence, REQUEST | ACKNOWLEDGE))?;
        let length = self.socket.read(&mut self.buffer)?;
        match messages(&self.buffer[..length]).next() {
            Some((MESSAGE_ERROR, payload)) => error_code(payload),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn dump(
        &mut self,
        kind: u16,
        header_bytes: usize,
        read: impl Fn(&[u8], &[u8]) -> Option<Prefix>,
    ) -> io::Result<Vec<Prefix>> {
        let mut message = Message::new(kind, DUMP);
        message.bytes(&vec![0; header_bytes]);
        self.sequence += 1;
        self.socket
            .write_all(&message.finish(self.sequence, REQUEST))?;
        let mut found = Vec::new();
        loop {
            let length = self.socket.read(&mut self.buffer)?;
            for (kind, payload) in messages(&self.buffer[..length]) {
                match kind {
                    MESSAGE_DONE => return Ok(found),
                    MESSAGE_ERROR => error_code(payload)?,
                    _ if payload.len() >= header_bytes => {
                        let (header, attributes) = payload.split_at(header_bytes);
                        found.extend(read(header, attributes));
                    }
                    _ => return Err(io::ErrorKind::InvalidData.into()),
                }
            }
        }
    }
}

/// A request in the making: `struct nlmsghdr`, then whatever was appended.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Message(bytes)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.0.extend(encode_attribute(kind, value));
    }

    fn finish(mut self, sequence: u32, flags: u16) -> Vec<u8> {
        let length = self.0.len() as u32;
        let flags = u16::from_ne_bytes([self.0[6], self.0[7]]) | flags;
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// `struct rtattr`, its value and the padding to four bytes.
fn encode_attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    bytes.extend_from_slice(&(length as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

/// The messages of one datagram: kind and payload. Ends at the first that is cut off.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(0..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let payload = bytes.get(16..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The value of the first attribute of a kind.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn error_code(payload: &[u8]) -> io::Result<()> {
    let code = payload
        .get(0..4)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_loopback_address() {
        let mut netlink = Netlink::open().expect("route socket");
        let loopback = Prefix {
            address: Ipv4Addr::LOCALHOST.into(),
            length_bits: 8,
        };
        assert!(netlink.addresses().expect("addresses").contains(&loopback));
        assert!(!netlink.routes().expect("routes").is_empty());
        assert_eq!(link_index("lo").expect("lo"), 1);
    }

    #[test]
    fn fuzz_netlink() {
        let mut address = Message::new(libc::RTM_NEWADDR, CREATE);
        address.bytes(&[libc::AF_INET as u8, 8, 0, 0, 1, 0, 0, 0]);
        address.attribute(libc::IFA_LOCAL, &[127, 0, 0, 1]);
        address.attribute(libc::IFA_ADDRESS, &[0; 16]);
        let mut error = Message::new(MESSAGE_ERROR, 0);
        error.bytes(&(-libc::EEXIST).to_ne_bytes());
        let mut dump = address.finish(1, 0);
        dump.extend(error.finish(1, 0));
        unbroken_fuzz::bytes("netlink", &[dump], |bytes| {
            for (_, payload) in messages(bytes) {
                let _ = error_code(payload);
                if let Some(attributes) = payload.get(8..) {
                    let _ = find(attributes, libc::IFA_LOCAL).and_then(super::address);
                }
            }
        });
    }

    #[test]
    fn cut_off_messages_end_the_walk() {
        let whole = Message::new(MESSAGE_DONE, 0).finish(1, 0);
        assert_eq!(messages(&whole).count(), 1);
        for length in 0..whole.len() {
            assert_eq!(messages(&whole[..length]).count(), 0);
        }
        let attribute = encode_attribute(7, b"value");
        assert_eq!(find(&attribute, 7), Some(&b"value"[..]));
        assert_eq!(find(&attribute[..6], 7), None);
        assert_eq!(find(&attribute, 8), None);
    }
}
