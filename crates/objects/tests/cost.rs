//! What capture and restore of a connection cost on this machine. Prints, asserts nothing:
//! `cargo test --release -p unbroken-objects --test cost -- --ignored --nocapture`

mod common;

use common::{Family, Net};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;
use unbroken_image::{Fd, ObjectId, Pid};
use unbroken_objects::table::{Changes, Mirror, Source};
use unbroken_objects::tcp::Known;
use unbroken_objects::{socket_options, tcp};
use unbroken_sys::bpf::{Record, SocketProgram};

const ROUNDS: u32 = 10_000;

fn print_cost(what: &str, rounds: u32, mut work: impl FnMut()) {
    let mut costs: Vec<_> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .collect();
    costs.sort_unstable();
    println!(
        "{what}: median {:?}, best {:?}",
        costs[costs.len() / 2],
        costs[0]
    );
}

/// As a primary looks at a connection on which nothing has moved: by a record of a pass over all
/// sockets, and by calls.
fn print_cost_of_looks(service: &TcpStream) {
    let own_pid = std::process::id().cast_signed();
    let (mut mirror, mut changes) = (Mirror::new(&[], ObjectId(1)).unwrap(), Changes::default());
    let source = Source::open(Pid(own_pid), own_pid).unwrap();
    mirror.survey(vec![source], &mut changes).unwrap();
    let slot = mirror.slot(Pid(own_pid), Fd(service.as_raw_fd())).unwrap();
    mirror.capture(slot.object, &Known::NOTHING).unwrap();
    let reader = SocketProgram::load().unwrap().reader(own_pid).unwrap();
    let mut records = Vec::new();
    reader.read(&mut records).unwrap();
    let own = |record: &&Record| record.descriptor() == service.as_raw_fd();
    let record = records.iter().find(own).unwrap();
    let by_record = Known::new(Some(record), &|_, _, _, _| false);
    for (what, known) in [
        ("look by a record", by_record),
        ("look by calls", Known::NOTHING),
    ] {
        print_cost(what, ROUNDS, || {
            mirror.look(slot.object, &known).unwrap();
        });
    }
}

#[test]
#[ignore = "prints figures"]
fn costs() {
    let net = Net::new();
    let listener = net
        .service
        .run(|| TcpListener::bind(Family::V4.listen_on()).unwrap());
    let address = listener.local_addr().unwrap();
    let mut client = net.client.run(move || TcpStream::connect(address).unwrap());
    let (mut service, _) = listener.accept().unwrap();
    let (mut state, mut tracker) = tcp::capture(service.as_fd()).unwrap();
    print_cost("fingerprint", ROUNDS, || {
        std::hint::black_box(tcp::fingerprint(service.as_fd()).unwrap());
    });
    print_cost("first capture, quiet", ROUNDS, || {
        drop(tcp::capture(service.as_fd()).unwrap())
    });
    print_cost("  of it options", ROUNDS, || {
        drop(socket_options::capture(service.as_fd(), libc::AF_INET, libc::SOCK_STREAM).unwrap());
    });
    print_cost("capture again, quiet", ROUNDS, || {
        tracker
            .capture_into(service.as_fd(), &mut state, false)
            .unwrap();
    });
    print_cost_of_looks(&service);
    client.write_all(&[1; 1000]).unwrap();
    service.peek(&mut [0]).unwrap();
    print_cost("capture again, 1 kB unread", ROUNDS, || {
        tracker
            .capture_into(service.as_fd(), &mut state, false)
            .unwrap();
    });
    net.cut();
    service.write_all(&[1; 1000]).unwrap();
    print_cost(
        "capture again, 1 kB unread, 1 kB unacknowledged",
        ROUNDS,
        || {
            tracker
                .capture_into(service.as_fd(), &mut state, false)
                .unwrap();
        },
    );
    drop((service, client));
    net.replica.run(move || {
        let states: Vec<_> = (0..1_000u16)
            .map(|index| {
                let mut state = state.clone();
                state.remote.set_port(20_000 + index);
                state
            })
            .collect();
        let mut rest = states.iter();
        let mut prepared = Vec::with_capacity(states.len());
        print_cost("prepare", 1_000, || {
            let state = rest.next().unwrap();
            prepared.push((state, tcp::prepare(state, tcp::View::default()).unwrap()));
        });
        let mut live = Vec::with_capacity(states.len());
        print_cost("go live", 1_000, || {
            let (state, prepared) = prepared.pop().unwrap();
            live.push(prepared.go_live(state).unwrap())
        });
    });
}
