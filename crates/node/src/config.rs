//! What one service is to be run as: the same for every node of it, whoever starts them.

use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr};

/// The two ends of the link between the host and the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkAddresses {
    pub host_v4: Ipv4Addr,
    pub service_v4: Ipv4Addr,
    /// `None` on a machine without IPv6.
    pub v6: Option<(Ipv6Addr, Ipv6Addr)>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    pub name: String,
    /// Program and arguments, as bytes: neither need be UTF-8.
    pub command: Vec<Vec<u8>>,
    pub environment: Vec<(Vec<u8>, Vec<u8>)>,
    pub working_directory: Vec<u8>,
    pub user: Option<UserIds>,
    pub addresses: LinkAddresses,
    pub mtu_bytes: u32,
    /// Where the service and the capture run.
    pub service_core: usize,
    /// Where everything else of ours runs.
    pub spare_core: usize,
    /// Compare the mirror with the kernel after every epoch (I7); for tests.
    pub verify: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserIds {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// The cores of a service: the last allowed one is the spare core, the first is the service's.
/// One core does, slowly.
pub fn choose_cores(allowed: &[usize]) -> (usize, usize) {
    let first = allowed.first().copied().unwrap_or(0);
    (first, allowed.last().copied().unwrap_or(first))
}
