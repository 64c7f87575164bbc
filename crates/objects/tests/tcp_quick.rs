//! The quick ways to bring a connection up to date give what reading it whole gives.

mod common;

use common::connection::*;
use common::{Family, Net, Random, stream};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;
use unbroken_image::object::TcpConnection;
use unbroken_objects::tcp::{self, Ends, Known, Seen, Tracker};
use unbroken_sys::bpf::{Record, SocketProgram, SocketReader};

/// A connection as a primary follows it.
struct Followed {
    state: TcpConnection,
    tracker: Tracker,
    /// The number of the first byte that the service wrote.
    first: u32,
}

impl Followed {
    fn new(end: &TcpStream) -> Followed {
        let (state, tracker) = tcp::capture(end.as_fd()).unwrap();
        Followed {
            first: state.send_sequence,
            state,
            tracker,
        }
    }

    /// What the wire would have: all that was sent, which is all that was written unless some of
    /// it waits.
    fn sent(&self, wrote: usize) -> impl Fn(Ends, u32, usize, &mut Vec<u8>) -> bool + use<> {
        let first = self.first;
        move |_, from, length, into| {
            let start = from.wrapping_sub(first) as usize;
            if start + length != wrote {
                return false;
            }
            into.clear();
            into.extend(stream(TO_CLIENT, start, length));
            true
        }
    }

    fn look_by_calls(&mut self, end: &TcpStream, wrote: usize) {
        let sent = self.sent(wrote);
        self.look(end, &Known::new(None, &sent));
    }

    fn look(&mut self, end: &TcpStream, known: &Known<'_>) {
        let look = self.tracker.look(end.as_fd(), &mut self.state, known);
        look.unwrap();
    }

    /// As a capture does it: what the pass leaves open is asked for.
    fn look_by_pass(&mut self, end: &TcpStream, reader: &SocketReader, wrote: usize) -> Seen {
        let record = &record(end, reader);
        let before = self.state.clone();
        let sent = self.sent(wrote);
        let seen = self.tracker.look_at(record, &mut self.state, &sent);
        if seen != Seen::Moved {
            assert_eq!(self.state, before, "{seen:?}");
        }
        if seen == Seen::Unclear {
            self.look(end, &Known::new(Some(record), &sent));
        }
        seen
    }

    /// A whole capture with all that is known finds what one without finds.
    fn is_captured_alike(&self, end: &TcpStream, reader: &SocketReader, wrote: usize) -> bool {
        let sent = self.sent(wrote);
        let record = record(end, reader);
        let known = Known::new(Some(&record), &sent);
        let (mut quick, tracker) = tcp::capture_known(end.as_fd(), &known).unwrap();
        let (whole, _) = tcp::capture(end.as_fd()).unwrap();
        if tcp::fingerprint(end.as_fd()).unwrap() != *tracker.fingerprint() {
            return false;
        }
        (quick.timestamp, quick.timestamp_read_at_ns) =
            (whole.timestamp, whole.timestamp_read_at_ns);
        assert_eq!(quick, whole);
        true
    }

    /// Whether it could be compared: nothing came in between.
    fn is_right(&self, end: &TcpStream, after: &str) -> bool {
        let difference = tcp::difference(end.as_fd(), &self.state, &self.tracker).unwrap();
        assert_eq!(difference, None, "after {after}");
        tcp::fingerprint(end.as_fd()).unwrap() == *self.tracker.fingerprint()
    }
}

fn record(end: &TcpStream, reader: &SocketReader) -> Record {
    let mut records = Vec::new();
    reader.read(&mut records).unwrap();
    let own = |record: &&Record| record.descriptor() == end.as_raw_fd();
    *records.iter().find(own).unwrap()
}

fn reader() -> SocketReader {
    let program = SocketProgram::load().unwrap();
    program.reader(std::process::id().cast_signed()).unwrap()
}

/// Reads and writes of any length both ways, later without an answer from the client, then the end
/// of one or the other side.
#[test]
fn quick_looks_and_whole_ones_see_the_same() {
    let reader = reader();
    let (mut compared, mut moved, mut alike) = (0, 0, 0);
    for seed in 0..6 {
        let net = Net::new();
        let mut random = Random::new(seed);
        let (_listener, mut pair) = connect(&net, Family::V4);
        let mut followed = Followed::new(&pair.service);
        for round in 0..60 {
            if round == 40 {
                net.cut();
            }
            let length = 1 + random.below(4_000) as usize;
            let after = match random.below(4) {
                0 => {
                    pair.service_writes(length);
                    "a write of the service"
                }
                1 if round < 40 => {
                    pair.client_reads(length.min(pair.service_wrote - pair.client_read));
                    "a read of the client"
                }
                2 if round < 40 => {
                    pair.client_writes(length);
                    "a write of the client"
                }
                3 if round < 40 => {
                    pair.service_reads(pair.client_wrote - pair.service_read);
                    "a read of the service"
                }
                _ if round == 59 => {
                    pair.service.shutdown(Shutdown::Write).unwrap();
                    "the service's end"
                }
                _ => "nothing",
            };
            let wrote = pair.service_wrote;
            if random.flip() {
                followed.look_by_calls(&pair.service, wrote);
            } else if followed.look_by_pass(&pair.service, &reader, wrote) == Seen::Moved {
                moved += 1;
            }
            compared += usize::from(followed.is_right(&pair.service, after));
            alike += usize::from(followed.is_captured_alike(&pair.service, &reader, wrote));
        }
    }
    assert!(compared > 200, "{compared} comparisons");
    assert!(alike > 200, "{alike} whole captures");
    assert!(moved > 20, "{moved} were taken from a pass");
}

/// The kernel counts bytes only up to an urgent one, also when that has been read.
#[test]
fn bytes_behind_an_urgent_one_are_not_left_out() {
    let (net, reader) = (Net::new(), reader());
    let (_listener, pair) = connect(&net, Family::V4);
    let mut followed = Followed::new(&pair.service);
    let (client, service) = (&pair.client, &pair.service);
    send(client, b"abc", SendFlags::empty()).unwrap();
    send(client, b"!", SendFlags::OOB).unwrap();
    send(client, b"after", SendFlags::empty()).unwrap();
    let started = Instant::now();
    while tcp::capture(service.as_fd()).unwrap().0.receive_queue.len() < 9 {
        assert!(started.elapsed() < PATIENCE, "it never arrived");
    }
    let mut expect = |unread: &[u8]| {
        let (whole, _) = tcp::capture(service.as_fd()).unwrap();
        assert_eq!(whole.receive_queue, unread);
        followed.look_by_pass(service, &reader, 0);
        followed.is_right(service, "urgent data");
        assert_eq!(followed.state.receive_queue, unread);
    };
    expect(b"abc!after");
    let mut byte = [0; 1];
    recv(service, &mut byte[..], RecvFlags::OOB).unwrap();
    assert_eq!(&byte, b"!");
    expect(b"abc!after");
    let mut bytes = [0; 3];
    recv(service, &mut bytes[..], RecvFlags::empty()).unwrap();
    assert_eq!(&bytes, b"abc");
    expect(b"!after");
    let mut rest = [0; 5];
    recv(service, &mut rest[..], RecvFlags::empty()).unwrap();
    assert_eq!(&rest, b"after");
    expect(b"");
}

/// Repair mode needs a right that this thread gives up. A node that is killed while a socket is in
/// it leaves it so to a service that runs on.
#[test]
fn what_is_known_needs_no_repair_mode() {
    let (net, reader) = (Net::new(), reader());
    let (_listener, mut pair) = connect(&net, Family::V4);
    let followed = Followed::new(&pair.service);
    net.cut();
    pair.service_writes(1_000);
    let record = record(&pair.service, &reader);
    let sent = followed.sent(pair.service_wrote);
    let mut held = capabilities(None).unwrap();
    held.effective.remove(CapabilitySet::NET_ADMIN);
    set_capabilities(None, held).unwrap();
    let socket = pair.service.as_fd();
    assert!(tcp::capture(socket).is_err(), "that takes repair mode");
    let (state, _) = tcp::capture_known(socket, &Known::new(Some(&record), &sent)).unwrap();
    assert_eq!(state.send_queue, stream(TO_CLIENT, 0, 1_000));
}
