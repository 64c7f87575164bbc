//! The whole protocol in one thread with a false clock and a bad network: clients that speak a
//! small TCP, a service with its kernel, a primary, a journal and an input log in real shared
//! memory, a standby, and kills at any step. The parts under test are the real ones: role, pacing,
//! gate, flows, journal, input log, crafted packets.
//!
//! The service gives every request the next value of one counter. Clients check that no value
//! comes twice and none is lost, whatever died on the way; the world checks that nothing left
//! before its epoch was committed. `UNBROKEN_SEED=n` runs one seed and no other.

mod client;
mod node;
mod service;
mod world;

use node::Troubles;
use world::World;

/// Cheap, seeded chance (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.draw() % bound.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }
}

/// Says which seed was running when a check failed.
struct SeedOnPanic(u64);

impl Drop for SeedOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with UNBROKEN_SEED={}", self.0);
        }
    }
}

/// Runs one seed.
fn run(seed: u64, cause: impl FnOnce(&mut Troubles)) -> World {
    let _seed = SeedOnPanic(seed);
    let mut troubles = Troubles::none(Random(!seed));
    cause(&mut troubles);
    let mut world = World::new(seed, troubles);
    world.run();
    world
}

/// Runs one seed with nothing but kills.
fn run_plain(seed: u64) -> World {
    run(seed, |_| {})
}

/// Runs many; how many epochs were on their way at once, at most.
fn run_all(run: impl Fn(u64) -> World) -> usize {
    let only = std::env::var("UNBROKEN_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let count = std::env::var("UNBROKEN_SEEDS")
        .ok()
        .and_then(|count| count.parse().ok());
    let seeds = only.map_or(0..count.unwrap_or(150), |seed| seed..seed + 1);
    let (mut takeovers, mut most_under_way) = (0, 0);
    for world in seeds.map(run) {
        takeovers += world.takeovers;
        most_under_way = most_under_way.max(world.most_under_way);
    }
    eprintln!("{takeovers} takeovers, up to {most_under_way} epochs under way");
    assert!(takeovers > 0 || only.is_some());
    most_under_way
}

/// A client comes back from its port right after a fill's mark: the new standby hears of the next
/// connection before the epoch in which the one before it still stands, and took the one for the
/// other. The client's data went nowhere for ever.
#[test]
fn a_client_comes_back_while_a_standby_is_filled() {
    run_plain(109);
}

/// A client says nothing between a fill and two takeovers, then its FIN again: nobody knew numbers
/// of its connection, so the kernel answered with a reset.
#[test]
fn a_silent_client_says_its_last_word_again() {
    run_plain(111);
}

/// A FIN that was sent again comes after the SYN of the client's next
/// connection, which was then taken to have been accepted and closed.
#[test]
fn a_late_fin_comes_after_the_next_syn() {
    run_plain(1768);
    run_plain(8062);
}

#[test]
fn every_seed_keeps_every_promise() {
    assert_eq!(run_all(run_plain), 1);
}

/// As with a standby elsewhere: several epochs are on their way at once.
#[test]
fn every_seed_keeps_every_promise_when_commits_come_late() {
    let run = |seed| run(seed, |troubles| troubles.late_commits = true);
    assert!(run_all(run) > 1);
}

#[test]
fn every_seed_keeps_every_promise_when_captures_fail() {
    run_all(|seed| run(seed, |troubles| troubles.failing_captures = true));
}

#[test]
fn every_seed_keeps_every_promise_when_leave_comes_late() {
    run_all(|seed| run(seed, |troubles| troubles.late_leave = true));
}

#[test]
fn every_seed_keeps_every_promise_through_all_troubles() {
    let all = |troubles: &mut Troubles| {
        troubles.late_commits = true;
        troubles.failing_captures = true;
        troubles.late_leave = true;
    };
    run_all(|seed| run(seed, all));
}
