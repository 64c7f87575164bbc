//! TUN devices with virtio-net headers and segmentation offload.
//!
//! The unsafe blocks are ioctls on a descriptor that we just opened; each passes a pointer to a
//! live local of the size that `linux/if_tun.h` fixes for the request.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

// linux/if_tun.h
const TUN_SET_INTERFACE: libc::c_ulong = 0x4004_54ca;
const TUN_SET_OFFLOAD: libc::c_ulong = 0x4004_54d0;
const OFFLOAD_CHECKSUM: u32 = 0x01;
const OFFLOAD_TCP4: u32 = 0x02;
const OFFLOAD_TCP6: u32 = 0x04;
const OFFLOAD_TCP_ECN: u32 = 0x08;
const OFFLOAD_UDP4: u32 = 0x20;
const OFFLOAD_UDP6: u32 = 0x40;

#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    padding: [u8; 22],
}

/// A TUN device made by [`create`]. It is not persistent: it lives as long as a descriptor of it.
#[derive(Debug)]
pub struct Tun {
    /// One packet a read or write, each after a header of [`VIRTIO_HEADER_BYTES`]; nonblocking.
    pub descriptor: OwnedFd,
    pub name: String,
}

/// Creates a TUN device in the network namespace of the calling thread.
///
/// `pattern` is a name of at most 15 bytes, or a pattern such as `ub%d` of which the kernel takes
/// the first free number. Bare IP packets; checksum and TCP segmentation are left to us, UDP
/// segmentation too where the driver knows it. Errors: `ENOENT` or `ENODEV` when the driver is
/// missing, `EPERM` without `CAP_NET_ADMIN`, `EBUSY` when the name is taken.
pub fn create(pattern: &str) -> io::Result<Tun> {
    if pattern.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The device belongs to the namespace in which /dev/net/tun was opened
    // (drivers/net/tun.c, tun_chr_open), so open and ioctl happen on one thread.
    let descriptor: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?
        .into();
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16,
        padding: [0; 22],
    };
    request.name[..pattern.len()].copy_from_slice(pattern.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one struct ifreq (40 bytes), which `request` is.
    let set = unsafe { libc::ioctl(descriptor.as_raw_fd(), TUN_SET_INTERFACE, &raw mut request) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    let tcp = OFFLOAD_CHECKSUM | OFFLOAD_TCP4 | OFFLOAD_TCP6 | OFFLOAD_TCP_ECN;
    // UDP segmentation came with Linux 6.2 and is taken only as a pair.
    if set_offload(&descriptor, tcp | OFFLOAD_UDP4 | OFFLOAD_UDP6).is_err() {
        set_offload(&descriptor, tcp)?;
    }
    let length = request
        .name
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(libc::IFNAMSIZ);
    let name = String::from_utf8_lossy(&request.name[..length]).into_owned();
    Ok(Tun { descriptor, name })
}

fn set_offload(descriptor: &OwnedFd, offload: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let set = unsafe {
        libc::ioctl(
            descriptor.as_raw_fd(),
            TUN_SET_OFFLOAD,
            libc::c_ulong::from(offload),
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
