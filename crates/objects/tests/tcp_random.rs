//! Many connections in random phases, with random queues, taken over together.

mod common;

use common::connection::*;
use common::{Family, Net, Random};
use std::net::Shutdown;
use std::os::fd::AsFd;
use unbroken_objects::{listener, tcp};

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
        .run(move || listener::restore_all(&[&listening]).unwrap());
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
