//! What the main thread and the tracer thread of one primary leave for each other.
//!
//! The step-by-step of a capture is the [`Handshake`]; everything rarer is a message in one of two
//! queues. A message to the tracer is followed by its bell, one to main by the eventfd.

use crate::handshake::Handshake;
use crate::steps::Captured;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use unbroken_link::{Cause, JournalWriter};
use unbroken_tracee::{Bell, End};
use unbroken_wire::flows::{Activity, Connections};
use unbroken_wire::sent::SentBytes;

/// From main to the tracer.
pub enum Command {
    /// Fill the standby that reads this journal. An earlier link is let go.
    Fill(JournalWriter, FillNumber),
    /// The standby is gone: let its journal go.
    Unlink,
    /// This thread releases nothing more: let the standby take over, and end the process.
    HandOver(Cause),
    /// The service ends by itself: the standby is not to take over.
    Retire,
    /// The service dies and nobody can take over.
    Continue,
    /// End the tracer thread; the service runs on or dies as it will.
    Quit,
}

/// Tells the fills of one primary apart: what is said of one may be heard when another has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FillNumber(pub u64);

/// From the tracer to main.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TracerReport {
    /// So much of the service's memory has been sent that the rest fits a pause: the next capture
    /// completes the fill.
    ReadyToSeal(FillNumber),
    /// The service holds something that no replica can have; what.
    Unfit(String),
    /// It has more than one process now; why that matters.
    Forked(String),
    /// It is one process again.
    SingleAgain,
    /// The last process of the service begins to die, or has died.
    Dying(End),
    /// No process of the service is left; how its last one died.
    Gone(End),
    /// The pids as the host sees them.
    Pids(Vec<i32>),
    /// Something that should not happen; the standby is given up and filled anew.
    Broken(String),
}

/// Shared by both threads.
pub struct Mailbox {
    pub handshake: Handshake,
    commands: Mutex<VecDeque<Command>>,
    command_came: Condvar,
    connections: Mutex<Connections>,
    activity: Mutex<Activity>,
    captured: Mutex<VecDeque<Captured>>,
    sent: Arc<Mutex<SentBytes>>,
    reports: Mutex<VecDeque<TracerReport>>,
    main_bell: OwnedFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Arc<Mailbox>> {
        Ok(Arc::new(Mailbox {
            handshake: Handshake::default(),
            commands: Mutex::default(),
            command_came: Condvar::new(),
            connections: Mutex::default(),
            activity: Mutex::default(),
            captured: Mutex::default(),
            sent: Arc::default(),
            reports: Mutex::default(),
            main_bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        }))
    }

    /// Main: leaves a command and rings.
    pub fn command(&self, command: Command, bell: &Bell) {
        lock(&self.commands).push_back(command);
        self.command_came.notify_one();
        bell.ring();
    }

    /// Tracer: the next command.
    pub fn next_command(&self) -> Option<Command> {
        lock(&self.commands).pop_front()
    }

    /// Tracer: blocks until main has a command; deaf to the bell meanwhile.
    pub fn await_command(&self) -> Command {
        let mut commands = lock(&self.commands);
        loop {
            if let Some(command) = commands.pop_front() {
                return command;
            }
            commands = self
                .command_came
                .wait(commands)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tracer: leaves an epoch that was published, before the step `Published`.
    pub fn leave_captured(&self, captured: Captured) {
        lock(&self.captured).push_back(captured);
    }

    /// Main, after the step `Published`: takes the oldest.
    pub fn take_captured(&self) -> Option<Captured> {
        lock(&self.captured).pop_front()
    }

    /// Main, before the step `Drained`: what the wire knows of connections.
    pub fn leave_connections(&self, connections: Connections) {
        *lock(&self.connections) = connections;
    }

    /// Tracer, after the step `Drained`: takes it.
    pub fn take_connections(&self) -> Connections {
        std::mem::take(&mut lock(&self.connections))
    }

    /// Main, before the step `Drained`: where packets went since the last mark. Gives back an old
    /// one to be filled again.
    pub fn swap_activity(&self, activity: &mut Activity) {
        std::mem::swap(&mut *lock(&self.activity), activity);
    }

    /// Tracer: what the service has sent.
    pub fn sent(&self) -> MutexGuard<'_, SentBytes> {
        lock(&self.sent)
    }

    /// The same for main, which fills it as it carries packets.
    pub fn sent_bytes(&self) -> Arc<Mutex<SentBytes>> {
        Arc::clone(&self.sent)
    }

    /// Tracer: leaves a report and rings.
    pub fn report(&self, report: TracerReport) {
        lock(&self.reports).push_back(report);
        self.wake_main();
    }

    /// Main: the next report.
    pub fn next_report(&self) -> Option<TracerReport> {
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
fn lock<T>(queue: &Mutex<T>) -> MutexGuard<'_, T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
