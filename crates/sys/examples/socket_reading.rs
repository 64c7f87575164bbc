//! What one pass over all sockets of a process costs, against the five calls on each of them.
//!
//! `cargo run --release -p unbroken-sys --example socket_reading`
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};
use unbroken_sys::bpf::SocketProgram;
use unbroken_sys::{pidfd, socket, tcp};

/// The median of how long `work` takes.
fn median_ns(mut work: impl FnMut()) -> u128 {
    let mut times: Vec<Duration> = (0..301)
        .map(|_| {
            let started = Instant::now();
            work();
            started.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2].as_nanos()
}

fn main() {
    let own = std::process::id().cast_signed();
    let started = Instant::now();
    let program = SocketProgram::load().unwrap();
    println!("loaded in {:?}", started.elapsed());
    let reader = program.reader(own).unwrap();
    let process = pidfd::open(own).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut records = Vec::new();
    println!(
        "{:>10} {:>12} {:>12}",
        "sockets", "one pass, us", "calls, us"
    );
    for count in [0, 2, 20, 200, 2_000] {
        while streams.len() < count {
            streams.push(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            streams.push(listener.accept().unwrap().0);
        }
        let pass = median_ns(|| reader.read(&mut records).unwrap());
        // One more is the listener.
        assert_eq!(records.len(), count + 1);
        let calls = median_ns(|| {
            for stream in &streams {
                let number = stream.as_raw_fd();
                let taken = pidfd::get_descriptor(process.as_fd(), number).unwrap();
                black_box(tcp::info(taken.as_fd()).unwrap());
                black_box(socket::unread_bytes(taken.as_fd()).unwrap());
                black_box(socket::unacknowledged_bytes(taken.as_fd()).unwrap());
            }
        });
        let us = |ns: u128| ns as f64 / 1000.0;
        println!("{count:>10} {:>12.1} {:>12.1}", us(pass), us(calls));
    }
}
