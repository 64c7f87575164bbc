//! What one pass over many sockets says, against what calls on each of them say.
#![allow(clippy::unwrap_used, unsafe_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};
use unbroken_sys::bpf::{Record, SocketProgram, SocketReader};
use unbroken_sys::namespace::Namespaces;
use unbroken_sys::tcp::state;
use unbroken_sys::{affinity, namespace, process, socket, sockopt, tcp};

fn pair_at(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    (one, other)
}

fn pair() -> (TcpStream, TcpStream) {
    pair_at("127.0.0.1:0")
}

/// Writes until neither side's buffers take more.
fn fill(stream: &TcpStream) {
    stream.set_nonblocking(true).unwrap();
    let mut stream = stream;
    while stream.write(&[7; 65536]).is_ok() {}
}

fn send_urgent(stream: &TcpStream, bytes: &[u8]) {
    assert_eq!(
        socket::send(stream.as_fd(), bytes, libc::MSG_OOB).unwrap(),
        bytes.len()
    );
}

fn read(reader: &SocketReader) -> Vec<Record> {
    let mut records = Vec::new();
    reader.read(&mut records).unwrap();
    records
}

/// A reader of this thread's sockets; all threads of a process have the same.
fn open() -> SocketReader {
    let tid = std::process::id().cast_signed();
    SocketProgram::load().unwrap().reader(tid).unwrap()
}

fn record_of(reader: &SocketReader, socket: BorrowedFd<'_>) -> Option<Record> {
    let found = |record: &Record| record.descriptor() == socket.as_raw_fd();
    read(reader).into_iter().find(found)
}

/// What the calls say, in the order in which a record is compared with it.
fn by_calls(socket: BorrowedFd<'_>) -> (u8, [u64; 4], [u32; 5], u32) {
    let info = tcp::info(socket).unwrap();
    (
        info.state,
        [
            info.bytes_acked,
            info.bytes_received,
            info.bytes_sent,
            info.bytes_retransmitted,
        ],
        [
            info.not_sent_bytes,
            info.send_window,
            info.receive_window,
            socket::unread_bytes(socket).unwrap(),
            socket::unacknowledged_bytes(socket).unwrap(),
        ],
        info.unacked,
    )
}

fn by_record(record: &Record) -> (u8, [u64; 4], [u32; 5], u32) {
    (
        record.state(),
        [
            record.bytes_acked,
            record.bytes_received,
            record.bytes_sent,
            record.bytes_retransmitted,
        ],
        [
            record.not_sent_bytes(),
            record.send_window,
            record.receive_window,
            record.unread_bytes(),
            record.unacknowledged_bytes(),
        ],
        record.packets_out,
    )
}

/// The record of a socket that stands still, equal to what the calls say.
fn expect_equal(reader: &SocketReader, socket: BorrowedFd<'_>, what: &str) -> Record {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let before = by_calls(socket);
        let record = record_of(reader, socket).unwrap();
        let after = by_calls(socket);
        if before == after {
            assert!(record.is_settled(), "{what}: {record:?}");
            assert_eq!(by_record(&record), before, "{what}: {record:?}");
            return record;
        }
        assert!(Instant::now() < deadline, "{what} never stands still");
    }
}

#[test]
fn records_say_what_the_calls_say() {
    let reader = open();
    let expect = |stream: &TcpStream, expected: u8, what: &str| {
        // An acknowledgement may be late.
        let deadline = Instant::now() + Duration::from_secs(5);
        while tcp::info(stream.as_fd()).unwrap().state != expected && Instant::now() < deadline {}
        let record = expect_equal(&reader, stream.as_fd(), what);
        assert_eq!(record.state(), expected, "{what}");
        record
    };

    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (mut one, mut other) = pair_at(address);
        expect(&one, state::ESTABLISHED, "fresh");
        one.write_all(&[1; 3000]).unwrap();
        let record = expect(&other, state::ESTABLISHED, "unread data");
        assert_eq!(record.unread_bytes(), 3000);
        other.read_exact(&mut [0; 1000]).unwrap();
        let record = expect(&other, state::ESTABLISHED, "data half read");
        assert_eq!(record.unread_bytes(), 2000);

        fill(&one);
        let record = expect(&one, state::ESTABLISHED, "a peer that does not read");
        assert!(record.unacknowledged_bytes() > 0 && record.not_sent_bytes() > 0);
        one.shutdown(Shutdown::Write).unwrap();
        expect(&one, state::FIN_WAIT1, "a FIN behind unsent data");
        fill(&other);
        other.shutdown(Shutdown::Write).unwrap();
        expect(&other, state::FIN_WAIT1, "both sides full");

        let (one, mut other) = pair_at(address);
        other.write_all(&[2; 3000]).unwrap();
        one.shutdown(Shutdown::Write).unwrap();
        expect(&one, state::FIN_WAIT2, "unread data in FIN_WAIT2");
        let record = expect(&other, state::CLOSE_WAIT, "a FIN that was not read");
        assert_eq!(record.unread_bytes(), 0, "a FIN is not data");
        assert_eq!(other.read(&mut [0; 10]).unwrap(), 0);
        expect(&other, state::CLOSE_WAIT, "a FIN that was read");
        fill(&other);
        expect(&other, state::CLOSE_WAIT, "unsent data in CLOSE_WAIT");
        other.shutdown(Shutdown::Write).unwrap();
        expect(&other, state::LAST_ACK, "unsent data in LAST_ACK");
    }
}

#[test]
fn urgent_data_is_counted_as_the_calls_count_it() {
    let reader = open();
    let (mut one, mut other) = pair();
    one.write_all(b"before").unwrap();
    send_urgent(&one, b"!");
    one.write_all(b"after").unwrap();
    let socket = other.as_fd().try_clone_to_owned().unwrap();
    let expect = |unread: u32, what: &str| {
        let record = expect_equal(&reader, socket.as_fd(), what);
        assert_eq!(record.unread_bytes(), unread, "{what}");
        record
    };
    assert!(expect(6, "up to the urgent byte").has_urgent_data());
    sockopt::set_i32(socket.as_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE, 1).unwrap();
    expect(12, "an urgent byte inline");
    sockopt::set_i32(socket.as_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE, 0).unwrap();
    other.read_exact(&mut [0; 6]).unwrap();
    expect(0, "at the urgent byte");
    other.read_exact(&mut [0; 2]).unwrap();
    expect(3, "behind the urgent byte");
}

#[test]
fn a_connection_that_is_not_answered_yet() {
    let reader = open();
    // Nobody answers when the backlog is full.
    let listener = socket::open(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
    socket::bind(listener.as_fd(), &"127.0.0.1:0".parse().unwrap()).unwrap();
    socket::listen(listener.as_fd(), 0).unwrap();
    let address = socket::local_address(listener.as_fd()).unwrap();
    let mut waiting = Vec::new();
    let started = Instant::now();
    let pending = loop {
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
        let connecting = socket::open(libc::AF_INET, kind, 0).unwrap();
        let _ = socket::connect(connecting.as_fd(), &address);
        if tcp::info(connecting.as_fd()).unwrap().state == state::SYN_SENT {
            break connecting;
        }
        waiting.push(connecting);
        assert!(started.elapsed() < Duration::from_secs(5));
    };
    let record = expect_equal(&reader, pending.as_fd(), "SYN_SENT");
    assert_eq!(record.state(), state::SYN_SENT);
}

#[test]
fn closed_descriptors_and_other_files_leave_no_record() {
    let reader = open();
    let (one, other) = pair();
    let number = one.as_raw_fd();
    let duplicate = one.try_clone().unwrap();
    assert!(record_of(&reader, one.as_fd()).is_some());
    assert!(record_of(&reader, duplicate.as_fd()).is_some());
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(record_of(&reader, datagrams.as_fd()).is_none());
    drop(one);
    let records = read(&reader);
    assert!(records.iter().all(|record| record.descriptor() != number));
    assert!(record_of(&reader, duplicate.as_fd()).is_some());
    drop(other);
}

#[test]
fn sockets_of_another_network_namespace_are_read_too() {
    let reader = open();
    let made = std::thread::spawn(|| {
        namespace::unshare(Namespaces::NETWORK).unwrap();
        socket::open(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap()
    });
    let elsewhere = made.join().unwrap();
    let record = expect_equal(&reader, elsewhere.as_fd(), "in another namespace");
    assert_eq!(record.state(), state::CLOSE);
}

/// As far as it goes; the usual limit is 1,024.
fn raise_descriptor_limit() -> u64 {
    let (_, most) = process::limit(0, libc::RLIMIT_NOFILE).unwrap();
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: `limit` lives through the call.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    assert_eq!(result, 0);
    most
}

#[test]
fn ten_thousand_sockets_come_in_one_pass_under_a_real_time_policy() {
    let count = 10_000.min(raise_descriptor_limit() - 100);
    let reader = open();
    let open_socket = |_| socket::open(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
    let sockets: Vec<_> = (0..count).map(open_socket).collect();
    affinity::set_urgent(true).unwrap();
    let records = read(&reader);
    affinity::set_urgent(false).unwrap();
    let mut numbers: Vec<i32> = records.iter().map(Record::descriptor).collect();
    assert!(numbers.is_sorted());
    numbers.dedup();
    assert_eq!(numbers.len(), records.len());
    for socket in &sockets {
        assert!(numbers.binary_search(&socket.as_raw_fd()).is_ok());
    }
}

#[test]
fn a_process_that_is_gone_has_no_sockets() {
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let program = SocketProgram::load().unwrap();
    let reader = program.reader(child.id().cast_signed()).unwrap();
    assert!(read(&reader).is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(read(&reader).is_empty());
}
