//! The standby: applies epochs to a warm replica, and becomes the primary when the other one is
//! gone.
//!
//! Two threads, as in the primary. The tracer thread holds the replica: it reads the journal,
//! applies, and brings the replica to life; from then on it is a primary's tracer. The main thread
//! watches the primary and, after a takeover, carries the wire.

mod follow;

use crate::board::Board;
use crate::bundle::{Bundle, Purpose, Start};
use crate::channel;
use crate::clock::now_ns;
use crate::config::Config;
use crate::control::Control;
use crate::directory::{Claim, RunDirectory};
use crate::log;
use crate::primary::line::Line;
use crate::primary::{Common, Notice, Primary, ServiceEnds};
use crate::record::Cause;
use crate::stage::launch::Init;
use follow::Follower;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use unbroken_core::role::{Action, Role};
use unbroken_sys::shared::RingMemory;
use unbroken_tracee::Bell;

/// What the other node, the primary, left in our hands for the day it dies.
pub struct Predecessor {
    pub primary: OwnedFd,
    /// The connection to its stage init; the service lives while anybody holds one.
    pub init: Init,
    /// pidfd of that init.
    pub stage: OwnedFd,
    pub tun: OwnedFd,
    pub notify: OwnedFd,
    pub outputs: [Option<OwnedFd>; 2],
    pub service_pid: i32,
}

/// How the following of a primary ended.
pub enum Outcome {
    /// The replica lives: this node is the primary now.
    Live { ends: ServiceEnds, role: Role, actions: Vec<Action>, bell: Bell, took_ns: u64 },
    /// The replica is of no use any more.
    Void,
}

/// Shared with the tracer thread.
pub struct Watch {
    /// The primary died.
    pub primary_died: AtomicBool,
}

/// Runs a standby until it has become a primary and that has ended, or it is of no use.
pub fn run(mut bundle: Bundle) -> io::Result<()> {
    let Start::Standby { term, service_pid, give_up, .. } = bundle.start.clone() else {
        return Err(io::Error::other("not started as a standby"));
    };
    let common = common_of(&mut bundle)?;
    log::open(common.directory.path(), "standby")?;
    let predecessor = predecessor_of(&mut bundle, service_pid)?;
    let journal = RingMemory::from_fd(bundle.take(Purpose::Epochs)?)?;
    let inputs = RingMemory::from_fd(bundle.take(Purpose::Inputs)?)?;
    let primary = predecessor.primary.try_clone()?;
    let channel = bundle.channel;
    let tell = channel.try_clone()?;
    let watch = Arc::new(Watch { primary_died: AtomicBool::new(false) });
    let line = Line::new()?;
    let (sender, outcome) = mpsc::channel();
    let follower = Follower {
        config: common.config.clone(),
        directory: common.directory.clone(),
        host_tun: common.host_tun.try_clone()?,
        role: Role::standby(term, give_up.into()),
        journal: journal.clone(),
        inputs,
        predecessor,
        tell,
        watch: watch.clone(),
        line: line.clone(),
    };
    let tracer = std::thread::Builder::new()
        .name("tracer".to_owned())
        .spawn(move || follower.run(&sender))?;
    await_end_of(&primary, &outcome, &watch, &journal)?;
    match outcome.recv() {
        Ok(Outcome::Live { ends, role, actions, bell, took_ns }) => {
            common.board.record_takeover(took_ns / 1000);
            Primary::new(common, ends, role, line, bell)?.run(actions)?;
        }
        Ok(Outcome::Void) | Err(_) => log!("the replica is void"),
    }
    // The primary's last act was to end the tracer; a panic there has been logged.
    let _ = tracer.join();
    Ok(())
}

/// Blocks until the primary has died or the tracer thread has an outcome of its own.
fn await_end_of(
    primary: &OwnedFd,
    outcome: &mpsc::Receiver<Outcome>,
    watch: &Watch,
    journal: &RingMemory,
) -> io::Result<()> {
    let _ = outcome;
    let mut watched = [PollFd::new(primary, PollFlags::IN)];
    loop {
        match poll(&mut watched, None) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => break,
            Err(error) => return Err(error.into()),
        }
    }
    watch.primary_died.store(true, Ordering::SeqCst);
    journal.wake_consumer()?;
    Ok(())
}
