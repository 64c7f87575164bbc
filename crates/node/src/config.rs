//! What one service is to be run as: the same for every node of it, whoever starts them.

use crate::inherited::Inherited;
use crate::stage::address::Addresses;
use crate::stage::launch::Identity;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    pub name: String,
    /// Program and arguments, as bytes: neither need be UTF-8.
    pub command: Vec<Vec<u8>>,
    pub user: Option<UserIds>,
    /// What the service begins with of what `run` was started with.
    pub inherited: Inherited,
    pub addresses: Addresses,
    pub mtu_bytes: u32,
    /// Where the service and the capture run.
    pub service_core: usize,
    /// Where everything else of ours runs.
    pub spare_core: usize,
    /// Compare the mirror with the kernel after every epoch (I7); for tests.
    pub verify: bool,
    pub bounds: Bounds,
}

/// How much is kept where there is another way to go on with more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// Announcements between two captures that are kept one by one.
    pub announcements: usize,
    /// Epochs on their way; a larger one goes in parts.
    pub journal_bytes: usize,
    /// Input since the last epoch that the standby has applied.
    pub input_log_bytes: usize,
}

impl Bounds {
    pub const USUAL: Bounds = Bounds {
        announcements: 16 << 10,
        journal_bytes: 128 << 20,
        input_log_bytes: 32 << 20,
    };
    /// For tests: all is passed again and again.
    pub const SMALL: Bounds = Bounds {
        announcements: 20,
        journal_bytes: 16 << 20,
        input_log_bytes: 256 << 10,
    };
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserIds {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

impl From<UserIds> for Identity {
    fn from(ids: UserIds) -> Identity {
        Identity {
            user: ids.uid,
            group: ids.gid,
            groups: ids.groups,
        }
    }
}

/// The cores of a service: the last allowed one is the spare core, the first is the service's.
/// One core does, slowly.
pub fn choose_cores(allowed: &[usize]) -> (usize, usize) {
    let first = allowed.first().copied().unwrap_or(0);
    (first, allowed.last().copied().unwrap_or(first))
}
