//! UDP sockets, captured in one namespace and made again in another.

mod common;

use common::{Family, Net};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use unbroken_objects::udp;
use unbroken_sys::sockopt;

#[test]
fn unread_datagrams_come_back() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        for connected in [false, true] {
            let net = Net::new();
            let service = net
                .service
                .run(move || UdpSocket::bind(family.listen_on()).unwrap());
            sockopt::set_i32(service.as_fd(), libc::SOL_SOCKET, libc::SO_BROADCAST, 1).unwrap();
            sockopt::set_i32(service.as_fd(), libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, 3).unwrap();
            let address = family.address(service.local_addr().unwrap().port());
            let client = net.client.run(move || {
                let any = if address.is_ipv4() {
                    "0.0.0.0:0"
                } else {
                    "[::]:0"
                };
                let client = UdpSocket::bind(any).unwrap();
                client.connect(address).unwrap();
                client
            });
            client.send(b"hello").unwrap();
            let (_, from) = service.peek_from(&mut [0; 8]).unwrap();
            if connected {
                service.connect(from).unwrap();
            }
            client.send(&[3; 9_000]).unwrap();
            client.send(b"").unwrap();
            service
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut state = udp::capture(service.as_fd()).unwrap();
            while state.queue.len() < 3 && Instant::now() < deadline {
                state = udp::capture(service.as_fd()).unwrap();
            }
            let lengths: Vec<_> = state.queue.iter().map(|(_, bytes)| bytes.len()).collect();
            assert_eq!(lengths, [5, 9_000, 0], "{family:?}");
            assert!(state.queue.iter().all(|(source, _)| *source == from));
            let for_replica = state.clone();
            let restored = net
                .replica
                .run(move || udp::restore_all(&[&for_replica]).unwrap().remove(0));
            assert_eq!(udp::capture(restored.as_fd()).unwrap(), state);
            // Neither capture took anything, from the live socket or the restored one.
            for end in [service, UdpSocket::from(restored)] {
                for (source, bytes) in &state.queue {
                    let mut buffer = [0; 10_000];
                    let (length, found) = end.recv_from(&mut buffer).unwrap();
                    assert_eq!((&buffer[..length], found), (&bytes[..], *source));
                }
            }
        }
    }
}

#[test]
fn a_second_capture_sees_what_changed() {
    let net = Net::new();
    let service = net.service.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut state = udp::capture(service.as_fd()).unwrap();
    assert!(!udp::capture_queue_into(service.as_fd(), &mut state).unwrap());
    service
        .send_to(b"to myself", service.local_addr().unwrap())
        .unwrap();
    service.peek(&mut [0]).unwrap();
    assert!(udp::capture_queue_into(service.as_fd(), &mut state).unwrap());
    assert!(!udp::capture_queue_into(service.as_fd(), &mut state).unwrap());
    assert_eq!(udp::capture(service.as_fd()).unwrap(), state);
    service.recv(&mut [0]).unwrap();
    assert!(udp::capture_queue_into(service.as_fd(), &mut state).unwrap());
    assert!(state.queue.is_empty());
}

#[test]
fn a_fresh_socket_comes_back() {
    let socket =
        unbroken_sys::socket::open(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP).unwrap();
    let state = udp::capture(socket.as_fd()).unwrap();
    assert_eq!((state.local, state.remote), (None, None));
    let restored = udp::restore_all(&[&state]).unwrap().remove(0);
    assert_eq!(udp::capture(restored.as_fd()).unwrap(), state);
}
