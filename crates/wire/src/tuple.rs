use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use unbroken_image::object::TcpConnection;

/// The two ends of a connection: ours (the service's) and the client's. IPv4-mapped addresses are
/// kept as IPv4, as they are on the wire, and scopes and flow labels are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tuple {
    local: SocketAddr,
    remote: SocketAddr,
}

impl Tuple {
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            local: canonical(local),
            remote: canonical(remote),
        }
    }

    pub fn local(&self) -> SocketAddr {
        self.local
    }

    pub fn remote(&self) -> SocketAddr {
        self.remote
    }
}

impl From<&TcpConnection> for Tuple {
    fn from(connection: &TcpConnection) -> Self {
        Self::new(connection.local, connection.remote)
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_address_is_the_ipv4_address() {
        let mapped = "[::ffff:10.0.0.1]:80".parse().unwrap();
        let plain = "10.0.0.1:80".parse().unwrap();
        assert_eq!(Tuple::new(mapped, mapped), Tuple::new(plain, plain));
    }
}
