//! `--publish`: a port on the host's own addresses, loopback included, that leads to the service.
//!
//! Destination NAT in the host's network namespace, one nftables table for each service: packets
//! keep their way through the gate, connections live as long as conntrack remembers them, and no
//! process of ours stands in between, so a takeover changes nothing here. Only a client on a
//! loopback address gets another source address, because 127.0.0.1 means nothing on another
//! device; all others are seen by the service as they are.

mod nft;
mod port;

pub use port::{ParsePortError, PublishedPort};

use crate::directory::{RunDirectory, ServiceName};
use crate::status_page::StatusPage;
use std::fmt::Write;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use unbroken_sys::local_route;

/// Where the published ports lead.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The TUN device of the service on the host.
    pub device: &'a str,
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
}

/// Why a port cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error(
        "cannot publish port {0}: another program on this host uses it (see `ss -tlnp`); end that \
         program or publish another port"
    )]
    InUse(PublishedPort),
    #[error("cannot publish port {port}: service {name} publishes it already")]
    InUseByService {
        port: PublishedPort,
        name: ServiceName,
    },
    #[error("cannot publish port {0}: this host does not have the address")]
    NoSuchAddress(PublishedPort),
    #[error("cannot publish port {0}: the service has no address of that family")]
    NoSuchFamily(PublishedPort),
    #[error("cannot publish port {port}: {cause}")]
    Bind {
        port: PublishedPort,
        cause: io::Error,
    },
    #[error("cannot publish ports: the program nft is missing; apt-get install nftables")]
    NoProgram,
    #[error("cannot publish ports: nft says: {0}")]
    Rejected(String),
    #[error("cannot publish ports: {operation} {subject}: {cause}")]
    Io {
        operation: &'static str,
        subject: String,
        cause: io::Error,
    },
}

/// The table of a service. The name is one that nft takes without quotes.
fn table_name(name: &ServiceName) -> String {
    format!("unbroken-{name}")
}

/// Publishes `ports` of the service at `target`; a table that a dead service of that name left is
/// replaced in the same step. Must be called in the host's network namespace.
///
/// # Returns
/// Warnings for the user, one line each.
///
/// # Errors
/// [`PublishError`]; nothing stays published then.
pub fn publish(
    name: &ServiceName,
    target: &Target<'_>,
    ports: &[PublishedPort],
) -> Result<Vec<String>, PublishError> {
    if ports.is_empty() {
        return Ok(Vec::new());
    }
    for port in ports {
        check_family(port, target)?;
        check_free(port)?;
    }
    allow_loopback_clients(target)?;
    nft::run(&table(name, target, ports))?;
    Ok(forwarding_warning(ports).into_iter().collect())
}

/// Takes back everything that [`publish`] made for the name; nothing published is no error.
///
/// # Errors
/// [`PublishError`], when nft is there and fails.
pub fn withdraw(name: &ServiceName) -> Result<(), PublishError> {
    let table = table_name(name);
    // Adding first makes the deletion of a table that is not there succeed.
    match nft::run(&format!(
        "add table inet {table}\ndelete table inet {table}\n"
    )) {
        // Without the program nothing can have been published.
        Err(PublishError::NoProgram) => Ok(()),
        other => other,
    }
}

/// Ports of other services are not bound by anybody, so their status pages are asked. Two services that
/// are started at the same moment may both be let through; then the first keeps the port.
///
/// # Errors
/// [`PublishError::InUseByService`].
pub fn check_other_services(
    root: &Path,
    name: &ServiceName,
    ports: &[PublishedPort],
) -> Result<(), PublishError> {
    let others = RunDirectory::all(root).unwrap_or_default();
    for other in others.iter().filter(|other| other.name() != name) {
        let Ok(page) = StatusPage::open_to_read(other) else {
            continue;
        };
        if !other.is_alive().unwrap_or(false) {
            continue;
        }
        let published = page.snapshot(0).published;
        let taken: Vec<PublishedPort> = published
            .split(", ")
            .filter_map(|port| port.parse().ok())
            .collect();
        let clash = |port: &&PublishedPort| taken.iter().any(|other| port.overlaps(other));
        if let Some(port) = ports.iter().find(clash) {
            return Err(PublishError::InUseByService {
                port: *port,
                name: other.name().clone(),
            });
        }
    }
    Ok(())
}

fn check_family(port: &PublishedPort, target: &Target<'_>) -> Result<(), PublishError> {
    let fits = match port.address {
        None => target.ipv4.is_some() || target.ipv6.is_some(),
        Some(IpAddr::V4(_)) => target.ipv4.is_some(),
        Some(IpAddr::V6(_)) => target.ipv6.is_some(),
    };
    fits.then_some(()).ok_or(PublishError::NoSuchFamily(*port))
}

/// A port that a program of the host listens on would be taken away from it silently: NAT comes
/// before sockets. So it is tried whether the port can be had.
fn check_free(port: &PublishedPort) -> Result<(), PublishError> {
    for address in port.socket_addresses() {
        match TcpListener::bind(address).map_err(|cause| (cause.kind(), cause)) {
            Ok(_) => {}
            Err((io::ErrorKind::AddrInUse, _)) => return Err(PublishError::InUse(*port)),
            // No IPv6 on this machine, and nobody asked for it by name.
            Err(_) if port.address.is_none() && address.is_ipv6() => {}
            Err((io::ErrorKind::AddrNotAvailable, _)) => {
                return Err(PublishError::NoSuchAddress(*port));
            }
            Err((_, cause)) => return Err(PublishError::Bind { port: *port, cause }),
        }
    }
    Ok(())
}

/// Lets packets between a loopback address and the service's device be routed: for IPv4 the
/// sysctl (ip-sysctl: route_localnet), for IPv6 a local route for ::1 on the device, without which
/// answers find no way in [measured on 6.18]. Both vanish with the device.
fn allow_loopback_clients(target: &Target<'_>) -> Result<(), PublishError> {
    let device = target.device;
    if target.ipv4.is_some() {
        for switch in ["route_localnet", "forwarding"] {
            let path = format!("/proc/sys/net/ipv4/conf/{device}/{switch}");
            std::fs::write(&path, "1").map_err(|cause| PublishError::Io {
                operation: "cannot write",
                subject: path,
                cause,
            })?;
        }
    }
    if target.ipv6.is_some() {
        local_route::add_loopback_ipv6(device).map_err(|cause| PublishError::Io {
            operation: "cannot route ::1 through",
            subject: device.into(),
            cause,
        })?;
    }
    Ok(())
}

/// A port for other hosts needs a host that forwards. We do not switch that on: it would make a
/// router of every host that runs a service.
fn forwarding_warning(ports: &[PublishedPort]) -> Option<String> {
    let for_others = ports
        .iter()
        .any(|port| port.address.is_none_or(|address| !address.is_loopback()));
    let forwards = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
        .is_ok_and(|switch| switch.trim() == "1");
    (for_others && !forwards).then(|| {
        "published ports are reachable from this host only, because it does not forward; for \
         other hosts: sysctl -w net.ipv4.ip_forward=1"
            .into()
    })
}

/// The whole table, as one transaction that replaces an older one.
fn table(name: &ServiceName, target: &Target<'_>, ports: &[PublishedPort]) -> String {
    let table = table_name(name);
    let device = target.device;
    let rules: String = ports
        .iter()
        .flat_map(|port| rules(port, target))
        .fold(String::new(), |text, rule| text + "  " + &rule + "\n");
    let mut text = String::new();
    // Priorities as numbers: nft knows the name dstnat only for prerouting.
    let _ = write!(
        text,
        "add table inet {table}
delete table inet {table}
table inet {table} {{
 chain from-others {{
  type nat hook prerouting priority -100; policy accept;
  iifname \"{device}\" accept
{rules} }}
 chain from-this-host {{
  type nat hook output priority -100; policy accept;
{rules} }}
 chain from-loopback {{
  type nat hook postrouting priority 100; policy accept;
  oifname \"{device}\" ip saddr 127.0.0.0/8 masquerade
  oifname \"{device}\" ip6 saddr ::1 masquerade
 }}
}}
"
    );
    text
}

fn rules(port: &PublishedPort, target: &Target<'_>) -> Vec<String> {
    let wanted = |address: IpAddr| match port.address {
        None => true,
        Some(wanted) => wanted.is_ipv4() == address.is_ipv4(),
    };
    let targets = [target.ipv4.map(IpAddr::V4), target.ipv6.map(IpAddr::V6)];
    targets
        .into_iter()
        .flatten()
        .filter(|address| wanted(*address))
        .map(|service| {
            let family = if service.is_ipv4() { "ip" } else { "ip6" };
            let destination = match port.address {
                Some(address) if !address.is_unspecified() => format!("{family} daddr {address}"),
                _ if service.is_ipv4() => "meta nfproto ipv4 fib daddr type local".into(),
                _ => "meta nfproto ipv6 fib daddr type local".into(),
            };
            let to = SocketAddr::new(service, port.service_port);
            format!(
                "{destination} tcp dport {} dnat {family} to {to}",
                port.port
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status_page::Identity;
    use crate::test_root::TestRoot;

    const TARGET: Target<'static> = Target {
        device: "ub3",
        ipv4: Some(Ipv4Addr::new(10, 211, 0, 2)),
        ipv6: Some(Ipv6Addr::new(0xfd75, 0, 0, 0, 0, 0, 0, 2)),
    };

    fn rules_of(port: &str) -> Vec<String> {
        rules(&port.parse().expect("port"), &TARGET)
    }

    #[test]
    fn rules_follow_the_address() {
        assert_eq!(
            rules_of("8080:80"),
            [
                "meta nfproto ipv4 fib daddr type local tcp dport 8080 dnat ip to 10.211.0.2:80",
                "meta nfproto ipv6 fib daddr type local tcp dport 8080 dnat ip6 to [fd75::2]:80",
            ]
        );
        assert_eq!(
            rules_of("192.0.2.1:80"),
            ["ip daddr 192.0.2.1 tcp dport 80 dnat ip to 10.211.0.2:80"]
        );
        assert_eq!(
            rules_of("[::1]:80"),
            ["ip6 daddr ::1 tcp dport 80 dnat ip6 to [fd75::2]:80"]
        );
        assert_eq!(
            rules_of("0.0.0.0:80"),
            ["meta nfproto ipv4 fib daddr type local tcp dport 80 dnat ip to 10.211.0.2:80"]
        );
    }

    #[test]
    fn a_port_of_another_service_is_refused_while_that_lives() {
        let root = TestRoot::new();
        let other = ServiceName::new("other").expect("name");
        let directory = RunDirectory::within(root.path(), other);
        let claim = directory.claim().expect("claim");
        let identity = Identity {
            command: "",
            address: "",
            published: "79, 127.0.0.1:80",
        };
        StatusPage::create(&directory, &identity).expect("status page");
        let name = ServiceName::new("one").expect("name");
        let check = |port: &str| {
            let ports = [port.parse().expect("port")];
            check_other_services(root.path(), &name, &ports)
        };
        let error = check("80:8080").expect_err("taken");
        assert_eq!(
            error.to_string(),
            "cannot publish port 80:8080: service other publishes it already"
        );
        assert!(check("127.0.0.2:80").is_ok());
        drop(claim);
        assert!(check("80").is_ok());
    }

    #[test]
    fn a_family_that_the_service_lacks_is_refused() {
        let only_ipv4 = Target {
            ipv6: None,
            ..TARGET
        };
        let port = "[::1]:80".parse().expect("port");
        let error = check_family(&port, &only_ipv4).expect_err("no IPv6");
        assert!(matches!(error, PublishError::NoSuchFamily(_)), "{error}");
        assert!(check_family(&"80".parse().expect("port"), &only_ipv4).is_ok());
    }

    #[test]
    fn a_port_in_use_or_on_a_foreign_address_is_refused() {
        let other = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = other.local_addr().expect("address").port();
        let published = |text: String| check_free(&text.parse().expect("port"));
        let error = published(format!("127.0.0.1:{port}:80")).expect_err("in use");
        assert!(matches!(error, PublishError::InUse(_)), "{error}");
        let error = published(format!("{port}:80")).expect_err("in use");
        assert!(matches!(error, PublishError::InUse(_)), "{error}");
        let error = published("192.0.2.99:80".into()).expect_err("foreign");
        assert!(matches!(error, PublishError::NoSuchAddress(_)), "{error}");
    }
}
