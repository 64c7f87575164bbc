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
    let listener = net.service.run(move || TcpListener::bind(family.listen_on()).unwrap());
    let address = family.address(listener.local_addr().unwrap().port());
    let client = net.client.run(move || TcpStream::connect(address).unwrap());
    let (service, _) = listener.accept().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    let pair = Pair {
        client,
        service,
        client_wrote: 0,
        client_read: 0,
        service_wrote: 0,
        service_read: 0,
    };
    (listener, pair)
}

impl Pair {
    fn client_writes(&mut self, length: usize) {
        write_what_fits(&mut self.client, TO_SERVICE, &mut self.client_wrote, length);
    }

    fn service_writes(&mut self, length: usize) {
        write_what_fits(&mut self.service, TO_CLIENT, &mut self.service_wrote, length);
    }

    fn client_reads(&mut self, length: usize) {
        expect(&mut self.client, TO_CLIENT, &mut self.client_read, length);
    }

    fn service_reads(&mut self, length: usize) {
        expect(&mut self.service, TO_SERVICE, &mut self.service_read, length);
    }

    /// Reads all that is on its way both ways, then more of it, then both ends to the end.
    fn finish(&mut self, client_open: bool, service_open: bool) {
        for (open, from, wrote, salt) in [
            (client_open, &mut self.client, &mut self.client_wrote, TO_SERVICE),
            (service_open, &mut self.service, &mut self.service_wrote, TO_CLIENT),
        ] {
            if open {
                write_what_fits(from, salt, wrote, 20_000);
                from.shutdown(Shutdown::Write).unwrap();
            }
        }
        self.client_reads(self.service_wrote - self.client_read);
        self.service_reads(self.client_wrote - self.service_read);
        assert_eq!(self.client.read(&mut [0]).unwrap(), 0, "the client reads past the end");
        assert_eq!(self.service.read(&mut [0]).unwrap(), 0, "the service reads past the end");
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
    assert!(bytes == stream(salt, *read, length), "stream {salt} differs behind byte {read}");
    *read += length;
}

/// Captures the service's end and lets the replica go on with it. `view` is made of the client's
/// end after the cut.
fn take_over(net: &Net, pair: &mut Pair) -> TcpConnection {
    net.cut();
    let state = capture_checked(&pair.service);
    go_on(net, pair, state, None)
}

/// A full capture, which a second reading by the quick way must confirm.
fn capture_checked(end: &TcpStream) -> TcpConnection {
    let (state, mut tracker) = tcp::capture(end.as_fd()).unwrap();
    assert_eq!(*tracker.fingerprint(), tcp::fingerprint(end.as_fd()).unwrap());
    let mut again = state.clone();
    tracker.capture_into(end.as_fd(), &mut again, true).unwrap();
    assert_eq!(state, again);
    state
}

fn go_on(net: &Net, pair: &mut Pair, state: TcpConnection, acknowledged: Option<u32>) -> TcpConnection {
    let state = Arc::new(state);
    let for_replica = Arc::clone(&state);
    let live = net.replica.run(move || {
        let view = tcp::View { client_acknowledged: acknowledged, ..tcp::View::default() };
        tcp::prepare(&for_replica, view).unwrap().go_live().unwrap()
    });
    net.connect_replica();
    if let Some(inject) = live.inject {
        net.client.run(move || packet::inject(&inject));
    }
    if let Some(resend) = live.resend {
        let for_replica = Arc::clone(&state);
        net.replica.run(move || packet::resend(&resend, &for_replica));
    }
    pair.service = TcpStream::from(live.fd);
    pair.service.set_read_timeout(Some(PATIENCE)).unwrap();
    Arc::try_unwrap(state).unwrap_or_else(|state| (*state).clone())
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
        assert!(state.sent_bytes > 0 && (state.sent_bytes as usize) < state.send_queue.len(), "{} of {}", state.sent_bytes, state.send_queue.len());
        pair.finish(true, true);
    });
}
