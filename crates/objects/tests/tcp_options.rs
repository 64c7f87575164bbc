//! Options of connections, and sockets without a connection.

mod common;

use common::connection::*;
use common::{Family, Net};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;
use unbroken_objects::{listener, tcp};
use unbroken_sys::{socket, sockopt};

#[test]
fn options_are_put_back() {
    let net = Net::new();
    let (_listener, pair) = connect(&net, Family::Mapped);
    let set = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
        (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 2),
        (libc::SOL_SOCKET, libc::SO_PRIORITY, 5),
        (libc::SOL_SOCKET, libc::SO_MARK, 7),
        (libc::SOL_SOCKET, libc::SO_SNDBUF, 100_000),
        (libc::SOL_SOCKET, libc::SO_RCVBUF, 300_000),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 33),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 11),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 44_000),
        (libc::IPPROTO_TCP, libc::TCP_LINGER2, 21),
        (libc::IPPROTO_TCP, libc::TCP_CORK, 1),
        (libc::IPPROTO_TCP, 25, 5_000),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        (libc::IPPROTO_IP, libc::IP_TTL, 77),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20),
    ];
    for (level, name, value) in set {
        sockopt::set_i32(pair.service.as_fd(), level, name, value).unwrap();
    }
    sockopt::set(
        pair.service.as_fd(),
        libc::IPPROTO_TCP,
        libc::TCP_CONGESTION,
        b"reno",
    )
    .unwrap();
    let linger = [1i32.to_ne_bytes(), 4i32.to_ne_bytes()].concat();
    sockopt::set(
        pair.service.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &linger,
    )
    .unwrap();
    pair.service
        .set_read_timeout(Some(Duration::from_millis(1_500)))
        .unwrap();
    let all = [
        (libc::SOL_SOCKET, libc::SO_REUSEADDR),
        (libc::SOL_SOCKET, libc::SO_REUSEPORT),
        (libc::SOL_SOCKET, libc::SO_LINGER),
        (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
        (libc::SOL_SOCKET, sockopt::SO_BUF_LOCK),
        (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    ];
    let read = move |end: &TcpStream| -> Vec<(i32, i32, Vec<u8>)> {
        let names = set
            .iter()
            .map(|(level, name, _)| (*level, *name))
            .chain(all);
        names
            .map(|(level, name)| {
                let mut value = [0; 16];
                let length = sockopt::get(end.as_fd(), level, name, &mut value).unwrap();
                (level, name, value[..length].to_vec())
            })
            .collect()
    };
    // The capture itself must leave the live socket as it is.
    let before = read(&pair.service);
    let (state, _) = tcp::capture(pair.service.as_fd()).unwrap();
    assert_eq!(read(&pair.service), before);
    net.cut();
    let end = make_live(&net, vec![(state.clone(), tcp::View::default())]).remove(0);
    assert_eq!(read(&end), before);
    // The harness gave the restored end a timeout of its own.
    end.set_read_timeout(Some(Duration::from_millis(1_500)))
        .unwrap();
    let (again, _) = tcp::capture(end.as_fd()).unwrap();
    assert_eq!(again.socket_options, state.socket_options);
}

#[test]
fn listeners_go_on() {
    each_family(|net, family| {
        let listener = net.service.run(move || {
            let fd = TcpListener::bind(family.listen_on()).unwrap();
            sockopt::set_i32(fd.as_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3).unwrap();
            socket::listen(fd.as_fd(), 17).unwrap();
            fd
        });
        assert!(listener::is_listener(listener.as_fd()).unwrap());
        let state = listener::capture(listener.as_fd()).unwrap();
        assert_eq!((state.backlog, state.listening), (17, true));
        let for_replica = state.clone();
        let restored = net
            .replica
            .run(move || listener::restore_all(&[&for_replica]).unwrap().remove(0));
        assert_eq!(listener::capture(restored.as_fd()).unwrap(), state);
        net.cut();
        net.connect_replica();
        let address = family.address(state.local.port());
        let mut client = net.client.run(move || TcpStream::connect(address).unwrap());
        client.write_all(b"x").unwrap();
        let (mut accepted, _) = TcpListener::from(restored).accept().unwrap();
        accepted.read_exact(&mut [0]).unwrap();
    });
}

#[test]
fn sockets_that_never_listened_go_on() {
    let net = Net::new();
    for address in ["10.77.0.1:0", "[::]:4567"] {
        let address: std::net::SocketAddr = address.parse().unwrap();
        for bound in [false, true] {
            let state = net.service.run(move || {
                let family = if address.is_ipv4() {
                    libc::AF_INET
                } else {
                    libc::AF_INET6
                };
                let fd = socket::open(family, libc::SOCK_STREAM, 0).unwrap();
                if bound {
                    socket::bind(fd.as_fd(), &address).unwrap();
                }
                assert!(listener::is_listener(fd.as_fd()).unwrap());
                listener::capture(fd.as_fd()).unwrap()
            });
            assert_eq!((state.listening, state.local.port() != 0), (false, bound));
            let for_replica = state.clone();
            let restored = net
                .replica
                .run(move || listener::restore_all(&[&for_replica]).unwrap().remove(0));
            assert_eq!(listener::capture(restored.as_fd()).unwrap(), state);
        }
    }
}
