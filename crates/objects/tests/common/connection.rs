//! A client, its connection to the service, and the replica's going on with it.

use super::{Family, Net, packet, stream};
use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;
use unbroken_image::object::{TcpConnection, TcpPhase};
use unbroken_image::{Object, ObjectId};
use unbroken_objects::tcp::{self, Seen, Tracker};
use unbroken_objects::{Phase, Restored, Scene};
use unbroken_sys::bpf::{Record, SocketProgram};

/// Stands for "for ever": a stalled connection fails the test instead of hanging it.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub const TO_SERVICE: u64 = 1;
pub const TO_CLIENT: u64 = 2;

/// A client and the service's end of its connection.
pub struct Pair {
    pub client: TcpStream,
    pub service: TcpStream,
    /// Bytes that each side has written and read so far.
    pub client_wrote: usize,
    pub client_read: usize,
    pub service_wrote: usize,
    pub service_read: usize,
}

pub fn connect(net: &Net, family: Family) -> (TcpListener, Pair) {
    let listener = net
        .service
        .run(move || TcpListener::bind(family.listen_on()).unwrap());
    let pair = connect_to(net, family, &listener);
    (listener, pair)
}

pub fn connect_to(net: &Net, family: Family, listener: &TcpListener) -> Pair {
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
    pub fn client_writes(&mut self, length: usize) {
        write_what_fits(&mut self.client, TO_SERVICE, &mut self.client_wrote, length);
    }

    pub fn service_writes(&mut self, length: usize) {
        write_what_fits(
            &mut self.service,
            TO_CLIENT,
            &mut self.service_wrote,
            length,
        );
    }

    pub fn client_reads(&mut self, length: usize) {
        expect(&mut self.client, TO_CLIENT, &mut self.client_read, length);
    }

    pub fn service_reads(&mut self, length: usize) {
        expect(
            &mut self.service,
            TO_SERVICE,
            &mut self.service_read,
            length,
        );
    }

    /// Reads all that is on its way both ways, then more of it, then both ends to the end.
    pub fn finish(&mut self, client_open: bool, service_open: bool) {
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

pub fn write_what_fits(end: &mut TcpStream, salt: u64, wrote: &mut usize, length: usize) {
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

pub fn expect(end: &mut TcpStream, salt: u64, read: &mut usize, length: usize) {
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
pub fn take_over(net: &Net, pair: &mut Pair) -> TcpConnection {
    net.cut();
    let state = capture_checked(&pair.service);
    let live = make_live(net, vec![(state.clone(), tcp::View::default())]);
    pair.service = live.into_iter().next().unwrap();
    state
}

/// A full capture, which a second reading by the quick way must confirm.
pub fn capture_checked(end: &TcpStream) -> TcpConnection {
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
    expect_the_pass_to_agree(end, &state, tracker);
    state
}

/// What a pass over all sockets says of a connection is what was captured of it, or is left open.
fn expect_the_pass_to_agree(end: &TcpStream, state: &TcpConnection, mut tracker: Tracker) {
    static PROGRAM: LazyLock<SocketProgram> = LazyLock::new(|| SocketProgram::load().unwrap());
    let reader = PROGRAM.reader(std::process::id().cast_signed()).unwrap();
    let mut records = Vec::new();
    reader.read(&mut records).unwrap();
    let own = |record: &&Record| record.descriptor() == end.as_raw_fd();
    let record = records.iter().find(own).unwrap();
    let before = *tracker.fingerprint();
    let seen = tracker.look_at(record, &mut state.clone(), &|_, _, _, _| false);
    // A kernel timer may have sent something since, and what has not shaken hands is not taken.
    let now = tcp::fingerprint(end.as_fd()).unwrap();
    let must_be_known = state.phase != TcpPhase::SynSent
        && state.phase != TcpPhase::Closed
        && !record.has_urgent_data()
        && record.is_settled()
        && now == before;
    assert!(
        seen == Seen::Unchanged || !must_be_known,
        "{seen:?} of {record:?}, captured {before:?}"
    );
}

/// Restores all in the replica's place, moves the network there, then lets them speak.
pub fn make_live(net: &Net, states: Vec<(TcpConnection, tcp::View)>) -> Vec<TcpStream> {
    let named = (0..states.len() as u64).map(ObjectId).collect();
    let restored = restore(net, states, named);
    let descriptors = restored.descriptors.into_values();
    descriptors.map(patient).collect()
}

/// The same with a connection that the service has closed.
pub fn make_orphan_live(net: &Net, state: TcpConnection, view: tcp::View) -> TcpStream {
    let mut restored = restore(net, vec![(state, view)], HashSet::new());
    assert_eq!(restored.shortcomings, [""; 0]);
    patient(restored.orphans.remove(0).1)
}

fn restore(
    net: &Net,
    states: Vec<(TcpConnection, tcp::View)>,
    named: HashSet<ObjectId>,
) -> Restored {
    let views = states.iter().map(|(_, view)| *view);
    let scene = Scene {
        named,
        views: (0..).map(ObjectId).zip(views).collect(),
        ..Scene::default()
    };
    let objects = states.into_iter().map(|(state, _)| state);
    let objects = objects.map(Object::TcpConnection);
    let objects: BTreeMap<ObjectId, Object> = (0..).map(ObjectId).zip(objects).collect();
    let mut restored = net.replica.run(move || {
        let mut restored = Restored::default();
        for phase in [Phase::Make, Phase::GoLive] {
            unbroken_objects::restore(phase, &objects, &scene, &mut restored).unwrap();
        }
        restored
    });
    net.cut();
    net.connect_replica();
    for inject in std::mem::take(&mut restored.injects) {
        net.client.run(move || packet::inject(&inject));
    }
    for (resend, bytes) in std::mem::take(&mut restored.resends) {
        net.replica.run(move || packet::resend(&resend, &bytes));
    }
    restored
}

fn patient(end: OwnedFd) -> TcpStream {
    let end = TcpStream::from(end);
    end.set_read_timeout(Some(PATIENCE)).unwrap();
    end
}

/// Waits until nothing is unacknowledged; from then on a fingerprint stays what it is.
pub fn wait_until_quiet(end: &TcpStream) {
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
pub fn wait_for_phase(end: &TcpStream, phase: TcpPhase) {
    for _ in 0..2_000 {
        if tcp::capture(end.as_fd()).unwrap().0.phase == phase {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("the socket never came to {phase:?}");
}

pub fn each_family(test: impl Fn(Net, Family)) {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        test(Net::new(), family);
    }
}
