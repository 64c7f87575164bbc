//! The packets of a takeover: what wakes listeners, what brings sockets to their state, what
//! clients may have lost.

use crate::stage::address::Addresses;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use unbroken_image::{Object, ObjectId};
use unbroken_objects::tcp::{Inject, Resend};
use unbroken_wire::Tuple;
use unbroken_wire::craft::{self, Direction, SegmentNumbers};
use unbroken_wire::packet::Timestamps;
use unbroken_wire::tun::{ClientSide, ServiceSide};

/// The discard port: a client that opens connections from there does not exist.
const PRIMER_PORT: u16 = 9;
/// Of TCP options that every segment carries, as Linux sends them.
const TIMESTAMPS_BYTES: u32 = 12;

/// Gives every listener a SYN, so that it takes the cookies of handshakes that the old kernel
/// began (KERNEL.md, Syncookies). The answers go to the host's own address, whose kernel knows of
/// nothing and says so; a listener that hands out cookies keeps nothing to be reset.
pub fn prime_listeners(
    service: &ServiceSide,
    objects: &BTreeMap<ObjectId, Object>,
    addresses: &Addresses,
) -> io::Result<()> {
    for object in objects.values() {
        if let Object::TcpListener(listener) = object
            && listener.listening
        {
            for tuple in primers(listener.local, addresses) {
                // Lost, it leaves one kind of connection to be reset: its client tries again.
                let _ = service.write(craft::syn(tuple, 1).frame())?;
            }
        }
    }
    Ok(())
}

/// A tuple for each address family in which the listener hears.
fn primers(local: SocketAddr, addresses: &Addresses) -> impl Iterator<Item = Tuple> {
    let v4 = (
        IpAddr::from(addresses.service_v4),
        IpAddr::from(addresses.host_v4),
    );
    let v6 = addresses
        .v6
        .map(|(host, service)| (IpAddr::from(service), IpAddr::from(host)));
    let anywhere = local.ip().is_unspecified();
    let port = local.port();
    [Some(v4), v6]
        .into_iter()
        .flatten()
        .filter_map(move |(service, host)| {
            let hears = match (anywhere, local.ip()) {
                (true, IpAddr::V4(_)) => service.is_ipv4(),
                // An IPv6 listener may hear IPv4, too; one that does not lets the SYN go by.
                (true, IpAddr::V6(_)) => true,
                (false, address) => address.to_canonical() == service,
            };
            let tuple = Tuple::new((service, port).into(), (host, PRIMER_PORT).into());
            hears.then_some(tuple)
        })
}

/// Gives restored sockets the packets of their clients that they need first.
pub fn inject(service: &ServiceSide, injects: &[Inject]) -> io::Result<()> {
    for inject in injects {
        let tuple = Tuple::new(inject.destination, inject.source);
        let numbers = SegmentNumbers {
            sequence: inject.sequence,
            acknowledgement: inject.acknowledgement,
            window: inject.window,
            timestamps: inject.timestamps.map(timestamps),
        };
        let packet = match inject.fin {
            true => craft::fin(tuple, Direction::ToService, numbers),
            false => craft::ack(tuple, Direction::ToService, numbers),
        };
        let _ = service.write(packet.frame())?;
    }
    Ok(())
}

/// Says to clients again what they may not have heard.
pub fn resend(clients: &ClientSide, resends: &[(Resend, Vec<u8>)]) -> io::Result<()> {
    for (resend, data) in resends {
        let tuple = Tuple::new(resend.local, resend.remote);
        let mut numbers = SegmentNumbers {
            sequence: resend.sequence,
            acknowledgement: resend.acknowledgement,
            window: resend.window,
            timestamps: resend.timestamps.map(timestamps),
        };
        let options_bytes = numbers.timestamps.map_or(0, |_| TIMESTAMPS_BYTES);
        let mss = u16::try_from(resend.segment_bytes + options_bytes).unwrap_or(u16::MAX);
        for packet in craft::data_segments(&craft::Resend {
            tuple,
            numbers,
            mss,
            data,
        }) {
            let _ = clients.send_crafted(&packet)?;
        }
        numbers.sequence = numbers.sequence.wrapping_add(data.len() as u32);
        if resend.fin {
            let _ = clients.send_crafted(&craft::fin(tuple, Direction::ToClient, numbers))?;
        } else if data.is_empty() {
            let _ = clients.send_crafted(&craft::ack(tuple, Direction::ToClient, numbers))?;
        }
    }
    Ok(())
}

fn timestamps((value, echo): (u32, u32)) -> Timestamps {
    Timestamps { value, echo }
}
