//! Which directions of a UDP socket are shut down, as sock_diag tells it.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use unbroken_sys::socket;
use unbroken_sys::udp_diag::UdpDiag;

#[test]
fn each_way_to_shut_down_is_told() {
    for address in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
        for (how, expected) in [
            (None, 0),
            (Some(libc::SHUT_RD), 1),
            (Some(libc::SHUT_WR), 2),
            (Some(libc::SHUT_RDWR), 3),
        ] {
            let [one, peer] = [(); 2].map(|()| UdpSocket::bind(address).expect("bind"));
            let remote = peer.local_addr().expect("getsockname");
            one.connect(remote).expect("connect");
            if let Some(how) = how {
                socket::shutdown(one.as_fd(), how).expect("shutdown");
            }
            let diag = UdpDiag::of_namespace(one.as_fd()).expect("open sock_diag");
            let local = one.local_addr().expect("getsockname");
            let told = diag.shutdown(one.as_fd(), local, remote);
            assert_eq!(told.expect("ask"), Some(expected), "{address} {how:?}");
        }
    }
}
