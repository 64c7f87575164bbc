//! Connections of a real client, taken over by another namespace: every phase, byte-exact.

mod common;

use common::{Family, Net, Random, packet, stream};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use unbroken_image::object::{TcpConnection, TcpPhase};
use unbroken_objects::{listener, tcp};
use unbroken_sys::{socket, sockopt};

/// Stands for "for ever": a stalled connection fails the test instead of hanging it.
const PATIENCE: Duration = Duration::from_secs(30);

const TO_SERVICE: u64 = 1;
const TO_CLIENT: u64 = 2;

/// A client and the service's end of its connection.
struct Pair {
    client: TcpStream,
    service: TcpStream,
    /// Bytes that each side has written and read so far.
    client_wrote: usize,
    client_read: usize,
    service_wrote: usize,
    service_read: usize,
}

fn connect(net: &Net, family: Family) -> (TcpListener, Pair) {
    let listener = net
        .service
        .run(move || TcpListener::bind(family.listen_on()).unwrap());
    let pair = connect_to(net, family, &listener);
    (listener, pair)
}

fn connect_to(net: &Net, family: Family, listener: &TcpListener) -> Pair {
    let address = family.address(listener.local_addr().unwrap().port());
    let client = net.client.run(move || TcpStream::connect(address).unwrap());
    let (service, _) = listener.accept().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    Pair {
        client,
        service,
        client_wrote: 0,
        client_read: 0,
        service_wrote: 0,
        service_read: 0,
    }
}

impl Pair {
    fn client_writes(&mut self, length: usize) {
        write_what_fits(&mut self.client, TO_SERVICE, &mut self.client_wrote, length);
    }

    fn service_writes(&mut self, length: usize) {
        write_what_fits(
            &mut self.service,
            TO_CLIENT,
            &mut self.service_wrote,
            length,
        );
    }

    fn client_reads(&mut self, length: usize) {
        expect(&mut self.client, TO_CLIENT, &mut self.client_read, length);
    }

    fn service_reads(&mut self, length: usize) {
        expect(
            &mut self.service,
            TO_SERVICE,
            &mut self.service_read,
            length,
        );
    }

    /// Reads all that is on its way both ways, then more of it, then both ends to the end.
    fn finish(&mut self, client_open: bool, service_open: bool) {
        for (open, from, wrote, salt) in [
            (
                client_open,
                &mut self.client,
                &mut self.client_wrote,
                TO_SERVICE,
            ),
            (
                service_open,
                &mut self.service,
                &mut self.service_wrote,
                TO_CLIENT,
            ),
        ] {
            if open {
                write_what_fits(from, salt, wrote, 20_000);
                from.shutdown(Shutdown::Write).unwrap();
            }
        }
        self.client_reads(self.service_wrote - self.client_read);
        self.service_reads(self.client_wrote - self.service_read);
        assert_eq!(
            self.client.read(&mut [0]).unwrap(),
            0,
            "the client reads past the end"
        );
        assert_eq!(
            self.service.read(&mut [0]).unwrap(),
            0,
            "the service reads past the end"
        );
    }
}

fn write_what_fits(end: &mut TcpStream, salt: u64, wrote: &mut usize, length: usize) {
    end.set_nonblocking(true).unwrap();
    let bytes = stream(salt, *wrote, length);
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match end.write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("write: {error}"),
        }
    }
    *wrote += length - rest.len();
    end.set_nonblocking(false).unwrap();
}

fn expect(end: &mut TcpStream, salt: u64, read: &mut usize, length: usize) {
    let mut bytes = vec![0; length];
    end.read_exact(&mut bytes)
        .unwrap_or_else(|error| panic!("stream {salt} at {read}, {length} wanted: {error}"));
    assert!(
        bytes == stream(salt, *read, length),
        "stream {salt} differs behind byte {read}"
    );
    *read += length;
}

/// Cuts the network, captures the service's end and lets the replica go on with it.
fn take_over(net: &Net, pair: &mut Pair) -> TcpConnection {
    net.cut();
    let state = capture_checked(&pair.service);
    let live = make_live(net, vec![(state.clone(), tcp::View::default())]);
    pair.service = live.into_iter().next().unwrap();
    state
}

/// A full capture, which a second reading by the quick way must confirm.
fn capture_checked(end: &TcpStream) -> TcpConnection {
    let (state, mut tracker) = tcp::capture(end.as_fd()).unwrap();
    let mut again = state.clone();
    tracker.capture_into(end.as_fd(), &mut again, true).unwrap();
    // Kernel timers run on: they may send more of the queue and acknowledge, and do not change
    // what the streams hold.
    let numbers = |state: &TcpConnection| {
        (
            state.phase,
            state.send_sequence,
            state.receive_sequence,
            state.local,
            state.remote,
        )
    };
    assert_eq!(numbers(&state), numbers(&again));
    assert!(
        state.send_queue == again.send_queue,
        "the send queues differ"
    );
    assert!(
        state.receive_queue == again.receive_queue,
        "the receive queues differ"
    );
    state
}

/// Restores all in the replica's place, moves the network there, then lets them speak.
fn make_live(net: &Net, states: Vec<(TcpConnection, tcp::View)>) -> Vec<TcpStream> {
    let states = Arc::new(states);
    let for_replica = Arc::clone(&states);
    let all = net.replica.run(move || {
        let prepared: Vec<_> = for_replica
            .iter()
            .map(|(state, view)| tcp::prepare(state, *view).unwrap())
            .collect();
        prepared
            .into_iter()
            .map(|one| one.go_live().unwrap())
            .collect::<Vec<_>>()
    });
    net.connect_replica();
    let mut ends = Vec::new();
    for (index, live) in all.into_iter().enumerate() {
        if let Some(inject) = live.inject {
            net.client.run(move || packet::inject(&inject));
        }
        if let Some(resend) = live.resend {
            let states = Arc::clone(&states);
            net.replica
                .run(move || packet::resend(&resend, &states[index].0));
        }
        let end = TcpStream::from(live.fd);
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        ends.push(end);
    }
    ends
}

/// Waits until nothing is unacknowledged; from then on a fingerprint stays what it is.
fn wait_until_quiet(end: &TcpStream) {
    for _ in 0..2_000 {
        let (state, tracker) = tcp::capture(end.as_fd()).unwrap();
        if state.send_queue.is_empty() && state.receive_queue.is_empty() {
            assert_eq!(
                *tracker.fingerprint(),
                tcp::fingerprint(end.as_fd()).unwrap()
            );
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("the connection never came to rest");
}

/// Waits until the kernel has brought the service's end to `phase`.
fn wait_for_phase(end: &TcpStream, phase: TcpPhase) {
    for _ in 0..2_000 {
        if tcp::capture(end.as_fd()).unwrap().0.phase == phase {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("the socket never came to {phase:?}");
}

fn each_family(test: impl Fn(Net, Family)) {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        test(Net::new(), family);
    }
}

#[test]
fn a_quiet_connection_goes_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.client_writes(5_000);
        pair.service_reads(5_000);
        pair.service_writes(3_000);
        pair.client_reads(3_000);
        wait_until_quiet(&pair.service);
        let state = take_over(&net, &mut pair);
        assert_eq!(state.phase, TcpPhase::Established);
        pair.finish(true, true);
    });
}

#[test]
fn queues_both_ways_go_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.client_writes(30_000);
        pair.service_reads(10_000);
        net.cut();
        pair.service_writes(200_000);
        let state = take_over(&net, &mut pair);
        assert!(
            state.sent_bytes > 0 && (state.sent_bytes as usize) < state.send_queue.len(),
            "{} of {}",
            state.sent_bytes,
            state.send_queue.len()
        );
        pair.finish(true, true);
    });
}

#[test]
fn an_own_fin_on_its_way_goes_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.client_writes(3_000);
        net.cut();
        pair.service_writes(5_000);
        pair.service.shutdown(Shutdown::Write).unwrap();
        let state = take_over(&net, &mut pair);
        assert_eq!((state.phase, state.fin_sent), (TcpPhase::FinWait1, true));
        pair.finish(true, false);
    });
}

#[test]
fn an_own_fin_behind_unsent_bytes_goes_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        net.cut();
        pair.service_writes(200_000);
        pair.service.shutdown(Shutdown::Write).unwrap();
        let state = take_over(&net, &mut pair);
        assert_eq!((state.phase, state.fin_sent), (TcpPhase::FinWait1, false));
        pair.finish(true, false);
    });
}

#[test]
fn an_acknowledged_own_fin_goes_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.service_writes(3_000);
        pair.service.shutdown(Shutdown::Write).unwrap();
        wait_for_phase(&pair.service, TcpPhase::FinWait2);
        pair.client_writes(4_000);
        let state = take_over(&net, &mut pair);
        assert_eq!(state.phase, TcpPhase::FinWait2);
        pair.finish(true, false);
    });
}

#[test]
fn a_fin_of_the_peer_goes_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.client_writes(3_000);
        pair.client.shutdown(Shutdown::Write).unwrap();
        wait_for_phase(&pair.service, TcpPhase::CloseWait);
        net.cut();
        pair.service_writes(100_000);
        let state = take_over(&net, &mut pair);
        assert_eq!(state.phase, TcpPhase::CloseWait);
        wait_for_phase(&pair.service, TcpPhase::CloseWait);
        pair.finish(false, true);
    });
}

#[test]
fn fins_of_both_go_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.client_writes(3_000);
        pair.client.shutdown(Shutdown::Write).unwrap();
        wait_for_phase(&pair.service, TcpPhase::CloseWait);
        net.cut();
        pair.service_writes(2_000);
        pair.service.shutdown(Shutdown::Write).unwrap();
        let state = take_over(&net, &mut pair);
        assert_eq!(state.phase, TcpPhase::LastAck);
        pair.finish(false, false);
    });
}

#[test]
fn fins_that_crossed_go_on() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        net.cut_towards_client();
        pair.service_writes(2_000);
        pair.service.shutdown(Shutdown::Write).unwrap();
        pair.client_writes(3_000);
        pair.client.shutdown(Shutdown::Write).unwrap();
        wait_for_phase(&pair.service, TcpPhase::Closing);
        let state = take_over(&net, &mut pair);
        assert_eq!(state.phase, TcpPhase::Closing);
        pair.finish(false, false);
    });
}

#[test]
fn what_the_client_acknowledged_is_not_sent_again() {
    for fin_too in [false, true] {
        each_family(|net, family| acknowledged_after_the_capture(&net, family, fin_too));
    }
}

fn acknowledged_after_the_capture(net: &Net, family: Family, fin_too: bool) {
    let (_listener, mut pair) = connect(net, family);
    net.cut_towards_client();
    pair.service_writes(9_000);
    pair.service.shutdown(Shutdown::Write).unwrap();
    let state = capture_checked(&pair.service);
    assert_eq!((state.sent_bytes, state.fin_sent), (9_000, true));
    // The client gets everything after the capture, as it does when output is released while
    // the next epoch is under way.
    net.client.ip(&["link set c0 nomaster"]);
    pair.client_reads(9_000);
    assert_eq!(pair.client.read(&mut [0]).unwrap(), 0);
    wait_for_phase(&pair.service, TcpPhase::FinWait2);
    net.cut();
    let acknowledged = state.send_sequence.wrapping_add(9_000 + u32::from(fin_too));
    let view = tcp::View {
        client_acknowledged: Some(acknowledged),
        ..tcp::View::default()
    };
    pair.service = make_live(net, vec![(state, view)]).remove(0);
    wait_for_phase(&pair.service, TcpPhase::FinWait2);
    pair.finish(true, false);
}

#[test]
fn a_reset_connection_reads_as_before() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.client_writes(3_000);
        // Closing with unread bytes resets.
        pair.service_writes(10);
        pair.client.peek(&mut [0]).unwrap();
        drop(std::mem::replace(
            &mut pair.client,
            pair.service.try_clone().unwrap(),
        ));
        wait_for_phase(&pair.service, TcpPhase::Closed);
        let state = take_over(&net, &mut pair);
        assert_eq!(state.error, libc::ECONNRESET);
        pair.service_reads(3_000);
        let error = pair.service.read(&mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET));
        assert_eq!(pair.service.read(&mut [0]).unwrap(), 0);
        assert_eq!(
            pair.service.write(&[0]).unwrap_err().raw_os_error(),
            Some(libc::EPIPE)
        );
    });
}

#[test]
fn a_finished_connection_reads_as_before() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.client_writes(70_000);
        pair.service.shutdown(Shutdown::Write).unwrap();
        pair.client.shutdown(Shutdown::Write).unwrap();
        wait_for_phase(&pair.service, TcpPhase::Closed);
        let state = take_over(&net, &mut pair);
        assert_eq!(
            (state.error, state.receive_queue.len()),
            (0, pair.client_wrote)
        );
        pair.service_reads(pair.client_wrote);
        assert_eq!(pair.service.read(&mut [0]).unwrap(), 0);
    });
}

#[test]
fn a_handshake_on_its_way_goes_on() {
    let net = Net::new();
    let server = net
        .client
        .run(|| TcpListener::bind(("10.77.0.2", 0)).unwrap());
    let target = server.local_addr().unwrap();
    net.cut();
    let connecting = net.service.run(move || {
        let fd = socket::open(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0).unwrap();
        let error = socket::connect(fd.as_fd(), &target).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
        fd
    });
    let (state, _) = tcp::capture(connecting.as_fd()).unwrap();
    assert_eq!((state.phase, state.remote), (TcpPhase::SynSent, target));
    let local = state.local;
    drop(connecting);
    let mut end = make_live(&net, vec![(state.clone(), tcp::View::default())]).remove(0);
    let (mut accepted, peer) = server.accept().unwrap();
    assert_eq!(peer, local);
    accepted.write_all(b"hello").unwrap();
    end.set_nonblocking(false).unwrap();
    let mut bytes = [0; 5];
    end.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    // The handshake began with the same number as the one that was lost.
    let (now, _) = tcp::capture(end.as_fd()).unwrap();
    assert_eq!(now.send_sequence, state.send_sequence.wrapping_add(1));
}

#[test]
fn a_connection_that_the_service_closes_still_delivers() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        net.cut();
        pair.service_writes(200_000);
        // Captured when the close is announced: the kernel will finish alone, without a
        // descriptor. So does the replica's.
        drop(take_over(&net, &mut pair));
        drop(std::mem::replace(
            &mut pair.service,
            pair.client.try_clone().unwrap(),
        ));
        pair.client_reads(pair.service_wrote);
        assert_eq!(pair.client.read(&mut [0]).unwrap(), 0);
    });
}

#[test]
fn a_full_window_both_ways_goes_on() {
    let net = Net::new();
    let (_listener, mut pair) = connect(&net, Family::V4);
    pair.client_writes(8_000_000);
    pair.service_writes(8_000_000);
    thread::sleep(Duration::from_millis(20));
    let state = take_over(&net, &mut pair);
    assert!(state.receive_queue.len() > 100_000 && state.send_queue.len() > 100_000);
    // Both sides write at once: acknowledgements ride on data that a shrunken window would drop.
    let mut client = pair.client.try_clone().unwrap();
    let from = pair.client_wrote;
    let writer = thread::spawn(move || client.write_all(&stream(TO_SERVICE, from, 3_000_000)));
    let reader = {
        let mut client = pair.client.try_clone().unwrap();
        let (mut read, wrote) = (pair.client_read, pair.service_wrote);
        thread::spawn(move || expect(&mut client, TO_CLIENT, &mut read, wrote))
    };
    pair.client_wrote += 3_000_000;
    pair.service_reads(pair.client_wrote);
    writer.join().unwrap().unwrap();
    reader.join().unwrap();
}

#[test]
fn options_are_put_back() {
    let net = Net::new();
    let (_listener, mut pair) = connect(&net, Family::Mapped);
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
            .run(move || listener::restore(&for_replica).unwrap());
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
                .run(move || listener::restore(&for_replica).unwrap());
            assert_eq!(listener::capture(restored.as_fd()).unwrap(), state);
        }
    }
}

#[test]
fn many_connections_in_any_phase_go_on() {
    let seed = std::env::var("SEED").map_or(0x5eed, |seed| seed.parse().expect("SEED is a number"));
    for round in 0..10 {
        println!("SEED={seed}, round {round}");
        many_connections(&mut Random::new(seed + round));
    }
}

fn many_connections(random: &mut Random) {
    let net = Net::new();
    // What the handshake negotiates differs from round to round.
    for name in [
        "ipv4.tcp_timestamps",
        "ipv4.tcp_sack",
        "ipv4.tcp_window_scaling",
    ] {
        net.client
            .sysctl(name, if random.below(4) == 0 { "0" } else { "1" });
    }
    let family = [Family::V4, Family::V6, Family::Mapped][random.below(3) as usize];
    let (listener, first) = connect(&net, family);
    let mut pairs = vec![first];
    while pairs.len() < 20 {
        pairs.push(connect_to(&net, family, &listener));
    }
    let mut closed = Vec::new();
    for pair in &mut pairs {
        closed.push(live_a_while(pair, random));
    }
    if random.flip() {
        net.cut();
    } else {
        net.cut_towards_client();
    }
    for (pair, closed) in pairs.iter_mut().zip(&mut closed) {
        live_on_in_the_dark(pair, closed, random);
    }
    net.cut();
    let listening = listener::capture(listener.as_fd()).unwrap();
    let _listener = net
        .replica
        .run(move || listener::restore(&listening).unwrap());
    let states = pairs
        .iter()
        .map(|pair| (capture_checked(&pair.service), tcp::View::default()));
    let ends = make_live(&net, states.collect());
    for ((pair, end), (client, service)) in pairs.iter_mut().zip(ends).zip(closed) {
        pair.service = end;
        pair.finish(!client, !service);
    }
}

/// Traffic that arrives; says which sides closed: (client, service).
fn live_a_while(pair: &mut Pair, random: &mut Random) -> (bool, bool) {
    pair.client_writes(random.below(60_000) as usize);
    let some = random.below(pair.client_wrote as u64 + 1) as usize;
    pair.service_reads(some);
    pair.service_writes(random.below(60_000) as usize);
    let some = random.below(pair.service_wrote as u64 + 1) as usize;
    pair.client_reads(some);
    let closed = (random.below(4) == 0, random.below(4) == 0);
    if closed.0 {
        pair.client.shutdown(Shutdown::Write).unwrap();
    }
    // A connection that both have closed is gone; the other tests have those.
    if closed.1 && !closed.0 {
        pair.service.shutdown(Shutdown::Write).unwrap();
    }
    (closed.0, closed.1 && !closed.0)
}

/// Traffic that is lost, at least one way.
fn live_on_in_the_dark(pair: &mut Pair, closed: &mut (bool, bool), random: &mut Random) {
    if !closed.1 && random.flip() {
        pair.service_writes(random.below(150_000) as usize);
    }
    if !closed.0 && random.flip() {
        pair.client_writes(random.below(50_000) as usize);
    }
    if !closed.1 && random.below(4) == 0 {
        pair.service.shutdown(Shutdown::Write).unwrap();
        closed.1 = true;
    }
    if !closed.0 && random.below(4) == 0 {
        pair.client.shutdown(Shutdown::Write).unwrap();
        closed.0 = true;
    }
}
