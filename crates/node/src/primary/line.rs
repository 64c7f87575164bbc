//! What the main thread and the tracer thread of one primary say to each other.
//!
//! The step-by-step of a capture is the [`Handshake`]; everything rarer is a message in one of two
//! queues. A message to the tracer is followed by its bell, one to main by the eventfd.

use crate::handshake::Handshake;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use unbroken_sys::shared::RingMemory;
use unbroken_tracee::{Bell, Death};

/// From main to the tracer.
pub enum Command {
    /// Fill the standby that reads this ring. An earlier link is let go.
    Fill(RingMemory),
    /// The standby is gone: let its ring go.
    Unlink,
    /// End the tracer thread; the service runs on or dies as it will.
    Quit,
}

/// From the tracer to main.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// So much of the service's memory has been sent that the rest fits a pause: the next capture
    /// completes the fill.
    ReadyToSeal,
    /// The service cannot be replicated as it is now; why.
    Unfit(String),
    /// What made it unfit is gone.
    Fit,
    /// The first process of the service begins to die, or has died.
    Dying(Death),
    /// No process of the service is left; how its first one died.
    Gone(Death),
    /// The pids as the host sees them.
    Pids(Vec<i32>),
    /// Something that should not happen; the standby is given up and filled anew.
    Broken(String),
    /// Figures of the epoch that was just published.
    Figures { dirty_pages: u64, bytes: u64, connections: u64, resident_bytes: u64 },
}

/// Shared by both threads.
pub struct Line {
    pub handshake: Handshake,
    commands: Mutex<VecDeque<Command>>,
    reports: Mutex<VecDeque<Report>>,
    main_bell: OwnedFd,
}

impl Line {
    pub fn new() -> io::Result<Arc<Line>> {
        Ok(Arc::new(Line {
            handshake: Handshake::default(),
            commands: Mutex::default(),
            reports: Mutex::default(),
            main_bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        }))
    }

    /// Main: leaves a command and rings.
    pub fn command(&self, command: Command, bell: &Bell) {
        lock(&self.commands).push_back(command);
        bell.ring();
    }

    /// Tracer: the next command.
    pub fn next_command(&self) -> Option<Command> {
        lock(&self.commands).pop_front()
    }

    /// Tracer: leaves a report and rings.
    pub fn report(&self, report: Report) {
        lock(&self.reports).push_back(report);
        self.wake_main();
    }

    /// Main: the next report.
    pub fn next_report(&self) -> Option<Report> {
        lock(&self.reports).pop_front()
    }

    /// Makes main's sleep end.
    pub fn wake_main(&self) {
        // It fails only when the counter is about to overflow: main is awake then.
        let _ = rustix::io::write(&self.main_bell, &1u64.to_ne_bytes());
    }

    /// Main: what to sleep on.
    pub fn main_bell(&self) -> BorrowedFd<'_> {
        self.main_bell.as_fd()
    }

    /// Main: takes the ringing back.
    pub fn answer(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.main_bell, &mut count);
    }
}

/// A queue is whole between any two of its operations, so a panic elsewhere does not spoil it.
fn lock<T>(queue: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
