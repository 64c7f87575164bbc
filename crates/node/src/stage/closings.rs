//! What the service's closed connections still have to say, read at the last moment at which a
//! descriptor reaches them: when the close is announced and has not run.

use super::announcement::Change;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use unbroken_image::Fd;
use unbroken_image::object::TcpConnection;
use unbroken_objects::tcp;
use unbroken_sys::pidfd;
use unbroken_sys::tcp_diag::TcpDiag;

/// While nobody takes them, as when there is no standby, the list is gone through at this length,
/// and again when what was left of it has doubled. The kernel bounds what is left
/// (`net.ipv4.tcp_max_orphans`).
const TIDY_AT: usize = 512;
/// Where the kernel does not say which are at their end, no more than these are kept: clients of
/// others would see the connection break off at a takeover.
const UNTOLD_MAX: usize = 16 << 10;

/// Filled by the notifier, emptied by captures.
#[derive(Debug, Default)]
pub struct Closings {
    list: Mutex<List>,
    /// Held while a connection is read under repair mode, so that no capture of the same socket
    /// meets it half way.
    sockets: Mutex<()>,
}

#[derive(Debug, Default)]
struct List {
    connections: Vec<TcpConnection>,
    /// Of the service's network namespace; the second is for whoever captures.
    diag: Option<TcpDiag>,
    spare_diag: Option<TcpDiag>,
    /// How many were left when the list was gone through last.
    left: usize,
    lost: u64,
}

impl Closings {
    /// Keeps what the call that `change` announces leaves unsaid. `thread` makes the call.
    pub fn note(&self, thread: u32, change: &Change) {
        let fd = match *change {
            Change::Closing(fd) | Change::Slot(fd) => fd,
            _ => return,
        };
        // Failures: the slot is free, or the caller is gone. Nothing is closed then.
        let Ok(descriptor) = duplicate(thread, fd) else {
            return;
        };
        let reading = self.hold_sockets();
        let read = tcp::capture_orphan(descriptor.as_fd());
        drop(reading);
        match read {
            Ok(Some(connection)) => self.add(connection, descriptor.as_fd()),
            Ok(None) => {}
            Err(error) => crate::log!("a connection that is being closed: {error}"),
        }
    }

    /// Adds a connection to those that are to be brought to their end; `socket` is any of the
    /// service's.
    pub fn add(&self, connection: TcpConnection, socket: BorrowedFd<'_>) {
        let mut list = lock(&self.list);
        if list.diag.is_none() {
            // Without it connections count as unfinished, which a takeover finds out.
            list.diag = TcpDiag::of_namespace(socket).ok();
            list.spare_diag = TcpDiag::of_namespace(socket).ok();
        }
        list.connections.push(connection);
        if list.connections.len() >= TIDY_AT.max(2 * list.left) {
            list.tidy();
        }
    }

    /// Captures hold this while they read sockets.
    pub fn hold_sockets(&self) -> MutexGuard<'_, ()> {
        lock(&self.sockets)
    }

    /// Moves what was noted since the last time behind `into`, and once a way to ask what became
    /// of them into `diag`.
    pub fn take(&self, into: &mut Vec<TcpConnection>, diag: &mut Option<TcpDiag>) {
        let mut list = lock(&self.list);
        into.append(&mut list.connections);
        list.left = 0;
        if diag.is_none() {
            *diag = list.spare_diag.take();
        }
    }
}

impl List {
    /// Lets go of those that are at their end.
    fn tidy(&mut self) {
        match &self.diag {
            Some(diag) => self
                .connections
                .retain(|connection| is_unfinished(diag, connection).unwrap_or(true)),
            None => self.forget_oldest(),
        }
        self.left = self.connections.len();
    }

    fn forget_oldest(&mut self) {
        let surplus = self.connections.len().saturating_sub(UNTOLD_MAX);
        if surplus > 0 {
            self.connections.drain(..surplus);
            self.lost += surplus as u64;
            crate::log!(
                "{} connections that were closed with data on the way would break off at a \
                 takeover: the kernel does not say when they are at their end",
                self.lost
            );
        }
    }
}

/// Whether the kernel still has to bring something to the client of a closed connection.
pub fn is_unfinished(diag: &TcpDiag, connection: &TcpConnection) -> io::Result<bool> {
    let state = diag.state(connection.local, connection.remote)?;
    Ok(state.is_some_and(tcp::has_unfinished_orphan))
}

fn duplicate(thread: u32, fd: Fd) -> io::Result<OwnedFd> {
    let tid = thread.cast_signed();
    let process = match pidfd::open_thread(tid) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => pidfd::open(leader_of(tid)?)?,
        other => other?,
    };
    pidfd::get_descriptor(process.as_fd(), fd.0)
}

/// Before Linux 6.9 only leaders have descriptors.
fn leader_of(tid: i32) -> io::Result<i32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Nothing that is locked here is ever half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
