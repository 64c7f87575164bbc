//! What `--publish` names: a port of this host and the service's port behind it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// One published TCP port: `[IP:]PORT[:SERVICE_PORT]`, an IPv6 address in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PublishedPort {
    /// The host's address; `None` for all of them, loopback included; 0.0.0.0 or :: for all of
    /// one family.
    pub address: Option<IpAddr>,
    pub port: u16,
    /// The port that the service listens on.
    pub service_port: u16,
}

impl PublishedPort {
    /// Whether both name the same port of at least one address of this host.
    pub fn overlaps(&self, other: &PublishedPort) -> bool {
        let addresses = match (self.address, other.address) {
            (Some(one), Some(two)) if one.is_ipv4() == two.is_ipv4() => {
                one == two || one.is_unspecified() || two.is_unspecified()
            }
            (Some(_), Some(_)) => false,
            _ => true,
        };
        self.port == other.port && addresses
    }

    /// The addresses that a program would have to bind to offer this port itself: one, or the
    /// wildcards of both families.
    pub(super) fn socket_addresses(&self) -> Vec<SocketAddr> {
        let addresses = match self.address {
            Some(address) => vec![address],
            None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        let with_port = |address| SocketAddr::new(address, self.port);
        addresses.into_iter().map(with_port).collect()
    }
}

/// Why a text names no port.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{text:?} is no [IP:]PORT[:SERVICE_PORT]: {what}; for example 6667, 8080:80, 127.0.0.1:6667 or \
     [::1]:8080:80"
)]
pub struct ParsePortError {
    text: String,
    what: &'static str,
}

impl FromStr for PublishedPort {
    type Err = ParsePortError;

    fn from_str(text: &str) -> Result<PublishedPort, ParsePortError> {
        parse(text).map_err(|what| ParsePortError {
            text: text.into(),
            what,
        })
    }
}

fn parse(text: &str) -> Result<PublishedPort, &'static str> {
    let (address, ports) = split_address(text)?;
    let (port, service_port) = match ports.split_once(':') {
        Some((port, service_port)) => (parse_port(port)?, parse_port(service_port)?),
        None => (parse_port(ports)?, parse_port(ports)?),
    };
    Ok(PublishedPort {
        address,
        port,
        service_port,
    })
}

fn split_address(text: &str) -> Result<(Option<IpAddr>, &str), &'static str> {
    if let Some(rest) = text.strip_prefix('[') {
        let (address, ports) = rest
            .split_once("]:")
            .ok_or("an address in brackets ends with ]:PORT")?;
        let address = address
            .parse::<Ipv6Addr>()
            .map_err(|_| "what stands in brackets is no IPv6 address")?;
        return Ok((Some(address.into()), ports));
    }
    if text.matches(':').count() > 2 {
        return Err("an IPv6 address stands in brackets");
    }
    match text.split_once(':') {
        Some((first, ports)) if first.contains('.') => {
            let address = first
                .parse::<Ipv4Addr>()
                .map_err(|_| "what stands before the port is no IPv4 address")?;
            Ok((Some(address.into()), ports))
        }
        _ => Ok((None, text)),
    }
}

fn parse_port(text: &str) -> Result<u16, &'static str> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a port is a number from 1 to 65535"),
        Ok(port) => Ok(port),
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "{}", SocketAddr::new(address, self.port))?,
            None => write!(f, "{}", self.port)?,
        }
        if self.service_port != self.port {
            write!(f, ":{}", self.service_port)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_ones_and_their_text() {
        let cases: [(&str, Option<&str>, u16, u16); 6] = [
            ("6667", None, 6667, 6667),
            ("8080:80", None, 8080, 80),
            ("127.0.0.1:6667", Some("127.0.0.1"), 6667, 6667),
            ("192.0.2.1:8080:80", Some("192.0.2.1"), 8080, 80),
            ("[::1]:6667", Some("::1"), 6667, 6667),
            ("[2001:db8::1]:8080:80", Some("2001:db8::1"), 8080, 80),
        ];
        for (text, address, port, service_port) in cases {
            let parsed: PublishedPort = text.parse().expect(text);
            let address = address.map(|address| address.parse().expect(text));
            assert_eq!(parsed.address, address, "{text}");
            assert_eq!((parsed.port, parsed.service_port), (port, service_port));
            assert_eq!(parsed.to_string(), text);
        }
    }

    #[test]
    fn overlaps() {
        let overlap = |one: &str, two: &str| {
            let one: PublishedPort = one.parse().expect(one);
            let two: PublishedPort = two.parse().expect(two);
            assert_eq!(one.overlaps(&two), two.overlaps(&one));
            one.overlaps(&two)
        };
        assert!(overlap("80", "80:8080"));
        assert!(overlap("80", "127.0.0.1:80"));
        assert!(overlap("0.0.0.0:80", "127.0.0.1:80"));
        assert!(!overlap("0.0.0.0:80", "[::1]:80"));
        assert!(!overlap("127.0.0.1:80", "127.0.0.2:80"));
        assert!(!overlap("80", "81:80"));
    }

    #[test]
    fn bad_ones() {
        for text in [
            "",
            "0",
            "65536",
            "x",
            "1:",
            ":1",
            "1:2:3",
            "::1:80",
            "1.2.3:80",
            "[::1]",
            "[::1]80",
            "[1.2.3.4]:80",
            "1.2.3.4",
            "1.2.3.4:",
            "80:0",
            "-1",
            "8 0",
        ] {
            let parsed = text.parse::<PublishedPort>();
            assert!(parsed.is_err(), "{text:?} gave {parsed:?}");
        }
    }

    #[test]
    fn fuzz_ports() {
        let samples = [
            "6667",
            "8080:80",
            "127.0.0.1:6667",
            "[::1]:8080:80",
            "[fd00::1]:80",
        ];
        unbroken_fuzz::text("published-port", &samples, |text| {
            if let Ok(port) = text.parse::<PublishedPort>() {
                assert_eq!(port.to_string().parse(), Ok(port), "{text:?}");
            }
        });
    }
}
