//! The addresses of a service and of the host's end of its link, and how free ones are found.

use super::error::Error;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use unbroken_sys::netlink::{Netlink, Prefix};

/// The pool of IPv4 pairs: four addresses a service, of which the first stays unused so that a
/// pair looks like any point-to-point /30.
const POOL_V4: u32 = u32::from_be_bytes([10, 211, 0, 0]);
const POOL_PAIRS: u32 = 1 << 14;

/// The pool of IPv6 pairs: fd75:6e62::/32 out of the unique local addresses of RFC 4193.
const POOL_V6: u128 = 0xfd75_6e62 << 96;

/// Both ends of the link between the host and one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    pub host_v4: Ipv4Addr,
    pub service_v4: Ipv4Addr,
    /// Host and service; `None` on a machine without IPv6.
    pub v6: Option<(Ipv6Addr, Ipv6Addr)>,
}

impl Addresses {
    /// The pair of this number, with `wanted` in the place of the service's own of that family.
    fn of_pair(number: u32, wanted: Option<IpAddr>, with_v6: bool) -> Addresses {
        let base = POOL_V4 + 4 * number;
        let base_v6 = POOL_V6 + (u128::from(number) << 16);
        let mut addresses = Addresses {
            host_v4: (base + 1).into(),
            service_v4: (base + 2).into(),
            v6: with_v6.then(|| ((base_v6 + 1).into(), (base_v6 + 2).into())),
        };
        match wanted {
            Some(IpAddr::V4(address)) => addresses.service_v4 = address,
            Some(IpAddr::V6(address)) => {
                addresses.v6 = Some(((base_v6 + 1).into(), address));
            }
            None => {}
        }
        addresses
    }

    /// Every address of the link, the service's first.
    pub fn all(&self) -> impl Iterator<Item = IpAddr> {
        let v6 = self.v6.map(|(host, service)| [service.into(), host.into()]);
        [self.service_v4.into(), self.host_v4.into()]
            .into_iter()
            .chain(v6.into_iter().flatten())
    }
}

/// Whether this machine's kernel speaks IPv6 and nobody has switched it off for new devices.
pub fn ipv6_available() -> bool {
    Path::new("/proc/net/if_inet6").exists()
        && std::fs::read_to_string("/proc/sys/net/ipv6/conf/default/disable_ipv6")
            .is_ok_and(|value| value.trim() == "0")
}

/// Proposes, in order, addresses that collide with no address and no route of the calling
/// thread's network namespace. Default routes collide with nothing.
///
/// Another service may take a proposal before it is used: adding the route decides (see
/// [`super::host::HostLink`]), and then the next proposal is tried.
pub fn pick_free_addresses(
    wanted: Option<IpAddr>,
) -> Result<impl Iterator<Item = Addresses>, Error> {
    let mut netlink = Netlink::open().map_err(Error::during("open a route socket"))?;
    let mut taken = netlink
        .addresses()
        .map_err(Error::during("list the host's addresses"))?;
    for address in &mut taken {
        address.length_bits = if address.address.is_ipv4() { 32 } else { 128 };
    }
    if let Some(address) = wanted
        && taken.iter().any(|used| used.address == address)
    {
        return Err(Error::AddressTaken { address });
    }
    // A wider route that covers a wanted address is how a network sends it here: no collision.
    taken.extend(
        netlink
            .routes()
            .map_err(Error::during("list the host's routes"))?,
    );
    let with_v6 = ipv6_available();
    let free = (0..POOL_PAIRS)
        .map(move |number| Addresses::of_pair(number, wanted, with_v6))
        .filter(move |addresses| {
            let mut own = addresses.all().filter(|&address| Some(address) != wanted);
            !own.any(|address| taken.iter().any(|prefix| covers(*prefix, address)))
        });
    Ok(free)
}

fn covers(prefix: Prefix, address: IpAddr) -> bool {
    let differing = match (prefix.address, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            (network.to_bits() ^ address.to_bits()).leading_zeros()
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            (network.to_bits() ^ address.to_bits()).leading_zeros()
        }
        _ => return false,
    };
    prefix.length_bits > 0 && differing >= u32::from(prefix.length_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_cover_their_addresses_only() {
        let prefix = |text: &str, length_bits| Prefix {
            address: text.parse().expect("an address"),
            length_bits,
        };
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert!(covers(prefix("10.0.0.0", 8), ip("10.211.0.1")));
        assert!(covers(prefix("10.211.0.1", 32), ip("10.211.0.1")));
        assert!(!covers(prefix("10.211.0.1", 32), ip("10.211.0.2")));
        assert!(
            !covers(prefix("0.0.0.0", 0), ip("10.211.0.2")),
            "a default route"
        );
        assert!(!covers(prefix("fd00::", 8), ip("10.211.0.2")));
        assert!(covers(prefix("fd00::", 8), ip("fd75:6e62::1")));
    }

    #[test]
    fn pairs_are_distinct_and_take_the_wanted_address() {
        let first = Addresses::of_pair(0, None, true);
        let second = Addresses::of_pair(1, None, true);
        assert!(
            first
                .all()
                .all(|address| second.all().all(|other| other != address))
        );
        let wanted: IpAddr = "198.51.100.7".parse().expect("an address");
        assert!(
            Addresses::of_pair(0, Some(wanted), false)
                .all()
                .any(|address| address == wanted)
        );
        let wanted: IpAddr = "2001:db8::7".parse().expect("an address");
        assert!(
            Addresses::of_pair(0, Some(wanted), false)
                .all()
                .any(|address| address == wanted)
        );
    }
}
