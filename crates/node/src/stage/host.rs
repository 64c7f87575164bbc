//! The host's end of the link to a service.

use super::address::{Addresses, pick_free_addresses};
use super::error::Error;
use super::sysctl;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use unbroken_sys::netlink::{LinkChange, Netlink, Prefix, link_index};
use unbroken_sys::tun;

/// Packets that a TUN device keeps for us. A full queue drops, and a dropped packet comes back
/// only by a retransmission 200 ms later.
pub const QUEUE_PACKETS: u32 = 10_000;

/// A TUN device in the host's network namespace, the routes to a service through it, and the
/// host's own address on it. All of it vanishes with the last duplicate of the descriptor.
#[derive(Debug)]
pub struct HostLink {
    /// Nonblocking; one packet a read or write, after a virtio-net header.
    pub tun: OwnedFd,
    pub name: String,
    pub addresses: Addresses,
}

impl HostLink {
    /// Makes the link in the calling thread's network namespace, the service at `wanted` or, of
    /// each family for which none is wanted, at a free address.
    pub fn create(wanted: Option<IpAddr>, mtu_bytes: u32) -> Result<HostLink, Error> {
        for addresses in pick_free_addresses(wanted)? {
            match HostLink::create_with(addresses, mtu_bytes) {
                // Someone was faster; unless it is about the address that the user insists on.
                Err(Error::AddressTaken { address }) if Some(address) != wanted => {}
                other => return other,
            }
        }
        Err(Error::NoFreeAddress)
    }

    /// Makes the link with exactly these addresses.
    pub fn create_with(addresses: Addresses, mtu_bytes: u32) -> Result<HostLink, Error> {
        let device = tun::create("ub%d").map_err(Error::tun)?;
        let mut netlink = Netlink::open().map_err(Error::during("open a route socket"))?;
        let index = link_index(&device.name)
            .map_err(Error::during(format!("find the device {}", device.name)))?;
        bring_up(
            &mut netlink,
            &device.name,
            index,
            mtu_bytes,
            addresses.v6.is_some(),
        )?;
        let v4 = Some((addresses.host_v4.into(), addresses.service_v4.into()));
        let v6 = addresses
            .v6
            .map(|(host, service)| (host.into(), service.into()));
        for (host, service) in v4.into_iter().chain(v6) {
            add_address(&mut netlink, index, host)?;
            add_route(&mut netlink, index, single(service), Some(host))?;
        }
        Ok(HostLink {
            tun: device.descriptor,
            name: device.name,
            addresses,
        })
    }
}

/// Raises a TUN device that carries no traffic of the kernel's own.
pub(super) fn bring_up(
    netlink: &mut Netlink,
    name: &str,
    index: u32,
    mtu_bytes: u32,
    with_v6: bool,
) -> Result<(), Error> {
    if with_v6 {
        let conf = format!("net/ipv6/conf/{name}");
        sysctl::write(&format!("{conf}/disable_ipv6"), "0")?;
        sysctl::write(&format!("{conf}/accept_dad"), "0")?;
        sysctl::write(&format!("{conf}/accept_ra"), "0")?;
    }
    // The kernel handles a message's flags before the rest of it, so a link-local address would
    // be made if one message did both.
    let quiet = LinkChange {
        mtu_bytes: Some(mtu_bytes),
        queue_packets: Some(QUEUE_PACKETS),
        no_link_local: with_v6,
        ..LinkChange::default()
    };
    let up = LinkChange {
        up: true,
        ..LinkChange::default()
    };
    for change in [quiet, up] {
        netlink
            .set_link(index, change)
            .map_err(Error::during(format!("bring up {name}")))?;
    }
    Ok(())
}

/// Adds one address that belongs to this device alone.
pub(super) fn add_address(netlink: &mut Netlink, index: u32, address: IpAddr) -> Result<(), Error> {
    netlink
        .add_address(index, single(address))
        .map_err(|source| taken_or(source, address, "add the address"))
}

/// Adds one route, for which nothing else may exist.
pub(super) fn add_route(
    netlink: &mut Netlink,
    index: u32,
    destination: Prefix,
    source: Option<IpAddr>,
) -> Result<(), Error> {
    netlink
        .add_route(index, destination, source)
        .map_err(|source| taken_or(source, destination.address, "add a route to"))
}

fn taken_or(source: io::Error, address: IpAddr, operation: &str) -> Error {
    match source.raw_os_error() {
        Some(libc::EEXIST) => Error::AddressTaken { address },
        _ => Error::during(format!("{operation} {address}"))(source),
    }
}

fn single(address: IpAddr) -> Prefix {
    Prefix {
        address,
        length_bits: if address.is_ipv4() { 32 } else { 128 },
    }
}
