//! Announced calls under a signal each millisecond, whose handler asks for no restart: what never
//! waits must give what it gives undisturbed, and what waits must end.

use std::net::{SocketAddr, UdpSocket};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use unbroken_guests::announced::{Made, Scene, TRIES, Try, WAITS};
use unbroken_guests::raw;
use unbroken_guests::signals::{self, HANDLED};
use unbroken_guests::timer::PosixTimer;
use unbroken_guests::{Guest, Place, main as run, same};

const SIGNAL_EACH_NS: u64 = 1_000_000;
const CHECK_ROUNDS: u64 = 100;
/// So many rounds without waits for one with.
const WAITS_EACH: u64 = 16;

struct Interrupted {
    scene: Scene,
    expected: Vec<Made>,
    storm: PosixTimer,
    /// Output, for which an epoch is made, that nobody listens to.
    nowhere: (UdpSocket, SocketAddr),
}

impl Guest for Interrupted {
    fn set_up(place: &Place) -> Result<Self> {
        signals::handle(libc::SIGUSR1, 0, &[])?;
        let scene = Scene::new(place)?;
        let undisturbed = || TRIES.iter().map(|one| (one.make)(&scene));
        // What the first makes so, like a session of its own, stays so.
        undisturbed().for_each(drop);
        let expected: Vec<Made> = undisturbed().collect();
        for (one, made) in TRIES.iter().zip(&expected) {
            ensure!(
                *made >= 0 || !one.names.contains(' '),
                "{}: {made}",
                one.names
            );
        }
        let nowhere = UdpSocket::bind((place.own, 0))?;
        nowhere.set_nonblocking(true)?;
        Ok(Self {
            expected,
            storm: PosixTimer::signalling_this_thread(libc::SIGUSR1, 0)?,
            nowhere: (nowhere, SocketAddr::new(place.host.ip(), 9)),
            scene,
        })
    }

    fn check(&mut self) -> Result<()> {
        self.rounds(CHECK_ROUNDS)
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words.split_once(' ') {
            None if words == "hinder" => {
                // What no replica can have.
                let own = i64::from(std::process::id());
                let number = raw::call(libc::SYS_pidfd_open, [own as u64, 0, 0, 0])?;
                ensure!(number >= 0, "a descriptor of this process is {number}");
                Ok(())
            }
            Some(("rounds", count)) => self.rounds(count.parse()?),
            _ => bail!("this guest does not know {words:?}"),
        }
    }
}

impl Interrupted {
    fn rounds(&self, count: u64) -> Result<()> {
        let before = HANDLED.load(std::sync::atomic::Ordering::SeqCst);
        self.storm.set_in(SIGNAL_EACH_NS, SIGNAL_EACH_NS)?;
        let result = (0..count).try_for_each(|round| self.round(round));
        self.storm.set_in(0, 0)?;
        result?;
        let handled = HANDLED.load(std::sync::atomic::Ordering::SeqCst) - before;
        ensure!(handled > count / 100, "{handled} signals in {count} rounds");
        Ok(())
    }

    fn round(&self, round: u64) -> Result<()> {
        for (one, expected) in TRIES.iter().zip(&self.expected) {
            let made = (one.make)(&self.scene);
            same(one.names, made, *expected).with_context(|| format!("round {round}"))?;
        }
        if round.is_multiple_of(WAITS_EACH) {
            for Try { names, make } in WAITS {
                let ended = make(&self.scene);
                same(names, ended, -i64::from(libc::EINTR))
                    .with_context(|| format!("a wait in round {round}"))?;
            }
        }
        let (socket, nowhere) = &self.nowhere;
        // Full or refused: all the same.
        let _ = socket.send_to(&round.to_ne_bytes(), nowhere);
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Interrupted>()
}
