//! Connections of a real client, taken over by another namespace: every phase, byte-exact.

mod common;

use common::connection::*;
use common::{Family, Net, stream};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use unbroken_image::object::TcpPhase;
use unbroken_objects::tcp::{self, Known};
use unbroken_sys::{socket, sockopt};

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
        heard: Some(tcp::Heard {
            acknowledgement: acknowledged,
            window: 512,
        }),
        ..tcp::View::default()
    };
    pair.service = make_live(net, vec![(state, view)]).remove(0);
    wait_for_phase(&pair.service, TcpPhase::FinWait2);
    pair.finish(true, false);
}

#[test]
fn what_was_sent_since_the_reading_is_not_waited_for() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        sockopt::set_i32(
            pair.service.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUFFORCE,
            1 << 20,
        )
        .unwrap();
        // The client's kernel takes a part, so that there is something left at the end.
        let taken = 60_000;
        sockopt::set_i32(
            pair.client.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUF,
            taken,
        )
        .unwrap();
        pair.service_writes(400_000);
        assert_eq!(pair.service_wrote, 400_000);
        pair.service.shutdown(Shutdown::Write).unwrap();
        // Read before the last close, the kernel goes on with it afterwards, as the client reads.
        let read = capture_checked(&pair.service);
        pair.client_reads(150_000);
        net.cut();
        let later = capture_checked(&pair.service);
        let heard = Some(tcp::Heard {
            acknowledgement: later.send_sequence,
            window: (later.window.snd_wnd >> later.send_window_scale) as u16,
        });
        assert!(later.send_sequence.wrapping_sub(read.send_sequence) > read.sent_bytes);
        let view = tcp::View {
            heard,
            ..tcp::View::default()
        };
        pair.service = make_orphan_live(&net, read, view);
        pair.finish(true, false);
    });
}

#[test]
fn an_error_that_was_taken_does_not_come_again() {
    each_family(|net, family| {
        let (_listener, mut pair) = connect(&net, family);
        pair.service_writes(10);
        pair.client.peek(&mut [0]).unwrap();
        drop(std::mem::replace(
            &mut pair.client,
            pair.service.try_clone().unwrap(),
        ));
        wait_for_phase(&pair.service, TcpPhase::Closed);
        let (mut state, mut tracker) = tcp::capture(pair.service.as_fd()).unwrap();
        assert_eq!(state.error, libc::ECONNRESET);
        let mut look = |state: &mut _| {
            let fd = pair.service.as_fd();
            tracker.look(fd, state, &Known::NOTHING).unwrap()
        };
        assert!(!look(&mut state), "nothing happened");
        assert!((&pair.service).read(&mut [0]).is_err());
        assert!(look(&mut state), "the error was taken");
        assert_eq!(state.error, 0);
        assert!(!look(&mut state));
    });
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
fn connections_inside_the_service_go_on() {
    for address in ["127.0.0.1:0", "[::1]:0", "10.77.0.1:0"] {
        for (client_shut, server_shut) in [(false, false), (true, false), (true, true)] {
            inside_the_service(address, client_shut, server_shut);
        }
    }
}

fn inside_the_service(address: &'static str, client_shut: bool, server_shut: bool) {
    let net = Net::new();
    let (client, service) = net.service.run(move || {
        let listener = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    });
    let mut pair = Pair {
        client,
        service,
        client_wrote: 0,
        client_read: 0,
        service_wrote: 0,
        service_read: 0,
    };
    pair.client_writes(40_000);
    pair.service_writes(500);
    pair.service_reads(7_000);
    if client_shut {
        pair.client.shutdown(Shutdown::Write).unwrap();
        wait_for_phase(&pair.service, TcpPhase::CloseWait);
    }
    if server_shut {
        pair.service.shutdown(Shutdown::Write).unwrap();
        wait_for_phase(&pair.service, TcpPhase::Closed);
    }
    let states = [&pair.client, &pair.service].map(capture_checked);
    let states = states.map(|state| (state, tcp::View::default()));
    let mut ends = make_live(&net, states.into()).into_iter();
    (pair.client, pair.service) = (ends.next().unwrap(), ends.next().unwrap());
    pair.finish(!client_shut, !server_shut);
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
    let mut state = capture_checked(&pair.service);
    while state.receive_queue.len() < 100_000 || state.send_queue.len() < 100_000 {
        pair.client_writes(100_000);
        pair.service_writes(100_000);
        state = capture_checked(&pair.service);
    }
    take_over(&net, &mut pair);
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
