//! Everything together: who acts next, what is lost, who dies.

use crate::Random;
use crate::client::Client;
use crate::node::{Archive, Primary, Standby, Troubles};
use std::collections::HashSet;
use unbroken_core::give_up::Fault;
use unbroken_core::role::Event;
use unbroken_wire::Tuple;
use unbroken_wire::packet::Packet;

/// Kills stop after this many steps, so that every run ends.
const STORMY_STEPS: usize = 3_000;
const STEPS_MAX: usize = 400_000;

pub struct World {
    random: Random,
    now_ns: u64,
    clients: Vec<Client>,
    primary: Primary,
    standby: Option<Standby>,
    archive: Archive,
    to_service: Vec<Vec<u8>>,
    to_clients: Vec<Vec<u8>>,
    stormy: bool,
    pub takeovers: usize,
    pub most_under_way: usize,
}

impl World {
    pub fn new(seed: u64, troubles: Troubles) -> Self {
        let mut random = Random(seed);
        let clients = (0..1 + random.below(6))
            .map(|index| {
                let remote = format!("10.0.0.2:{}", 1000 + index).parse().unwrap();
                let tuple = Tuple::new("10.0.0.1:80".parse().unwrap(), remote);
                Client::new(tuple, 1 + random.below(6), random.draw() as u32)
            })
            .collect();
        Self {
            random,
            now_ns: 1,
            clients,
            primary: Primary::first(troubles),
            standby: None,
            archive: Archive::new(),
            to_service: Vec::new(),
            to_clients: Vec::new(),
            stormy: true,
            takeovers: 0,
            most_under_way: 0,
        }
    }

    pub fn run(&mut self) {
        for step in 0..STEPS_MAX {
            self.stormy = step < STORMY_STEPS;
            self.step();
            if self.clients.iter().all(Client::is_done) {
                self.check_the_end();
                return;
            }
        }
        panic!("the clients never came to an end");
    }

    fn step(&mut self) {
        self.now_ns += self.random.below(20_000) as u64;
        match self.random.below(12) {
            0 | 1 => self.client_acts(),
            2 => self.deliver_to_service(),
            3 => self.deliver_to_client(),
            4 => self.primary.service.act(&mut self.random),
            5 => self.primary.read_output(self.now_ns),
            6 => self.step_epoch(),
            7 => self.send_one(),
            8 => self.standby_acts(),
            9 if self.standby.is_none() && !self.primary.asks_in_vain(self.now_ns) => {
                self.standby = Some(self.primary.fill(self.now_ns));
            }
            10 if self.stormy && self.random.one_in(12) => self.somebody_dies(),
            11 if self.random.one_in(20) => self.time_passes(),
            _ => {}
        }
    }

    fn step_epoch(&mut self) {
        let went_well = self.primary.step_epoch(&mut self.archive, self.now_ns);
        let under_way = self.primary.epochs_under_way();
        self.most_under_way = self.most_under_way.max(under_way);
        if !went_well {
            self.standby = None;
            self.primary.standby_died(self.now_ns);
        }
    }

    fn client_acts(&mut self) {
        let index = self.random.below(self.clients.len());
        let mut out = Vec::new();
        self.clients[index].act(&mut self.random, self.now_ns, &mut out);
        self.to_service
            .extend(out.iter().map(|packet| packet.frame().to_vec()));
    }

    fn deliver_to_service(&mut self) {
        if let Some(frame) = pick(&mut self.to_service, &mut self.random, self.stormy) {
            self.primary.input(&frame, self.now_ns);
        }
    }

    fn deliver_to_client(&mut self) {
        let Some(frame) = pick(&mut self.to_clients, &mut self.random, self.stormy) else {
            return;
        };
        let Packet::Tcp(segment) = Packet::parse(&frame) else {
            panic!("not a segment")
        };
        let index = usize::from(segment.destination.port()) - 1000;
        let mut out = Vec::new();
        self.clients[index].hear(&frame, self.now_ns, &mut out);
        self.to_service
            .extend(out.iter().map(|packet| packet.frame().to_vec()));
    }

    fn send_one(&mut self) {
        if let Some(frame) = self.primary.send(&self.archive, self.now_ns) {
            self.to_clients.push(frame);
        }
    }

    fn standby_acts(&mut self) {
        if let Some(standby) = &mut self.standby {
            if self.random.one_in(2) {
                standby.step_input(self.now_ns);
            } else {
                standby.step_epoch(&self.archive, self.now_ns);
            }
        }
    }

    /// One of the two that can die without loss.
    fn somebody_dies(&mut self) {
        let Some(standby) = self.standby.take() else {
            return;
        };
        if !standby.has_an_epoch() || self.random.one_in(3) {
            self.primary.standby_died(self.now_ns);
            return;
        }
        let mut event = Event::PrimaryDied {
            service_alive: false,
        };
        if self.primary.is_protected() && self.random.one_in(3) {
            self.primary.service_dies(Fault::External, self.now_ns);
            event = Event::TakeoverOrdered(Some(Fault::External));
        }
        self.primary = standby.take_over(event, &self.archive, self.now_ns);
        self.takeovers += 1;
    }

    /// Long enough for somebody's timer.
    fn time_passes(&mut self) {
        let next = self.clients.iter().filter_map(Client::retry_at_ns).min();
        self.now_ns = self.now_ns.max(next.unwrap_or(0));
        self.primary.service.retry(&mut self.random);
    }

    /// Every request was counted once, and its answer reached its client once.
    fn check_the_end(&self) {
        let requested: usize = self.clients.iter().map(|client| client.requested).sum();
        let mut seen = HashSet::new();
        for client in &self.clients {
            assert_eq!(client.answers.len(), client.requested);
            assert!(client.answers.is_sorted());
            for value in &client.answers {
                assert!(seen.insert(*value), "answer {value} came twice");
            }
        }
        assert_eq!(self.primary.service.state.counter, requested as u64);
    }
}

/// A frame from the network: mostly the oldest; while it storms some are lost, doubled, or
/// overtaken.
fn pick(frames: &mut Vec<Vec<u8>>, random: &mut Random, stormy: bool) -> Option<Vec<u8>> {
    if frames.is_empty() {
        return None;
    }
    let overtakes = stormy && random.one_in(8);
    let index = if overtakes {
        random.below(frames.len())
    } else {
        0
    };
    if stormy && random.one_in(30) {
        return Some(frames[index].clone());
    }
    let frame = frames.remove(index);
    let lost = stormy && random.one_in(20);
    (!lost).then_some(frame)
}
