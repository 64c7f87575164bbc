//! The notifier: hears every announced call of the service, notes what it is about to change, and
//! lets it go on.
//!
//! A capture holds calls while it stops all threads and takes the queue, so it misses nothing that
//! was let go, and finds nothing there that was not. A thread that the stop meets before it was let
//! go makes its call again afterwards, and announces it again: so does one that was blocked in
//! `accept(2)`, whose connection may come epochs later. What it announced before the stop counts
//! for nothing: the notifier may have taken that, and the next capture come before the second time.
//!
//! When a notifier dies, calls wait for the next holder of the listener. One that the dead
//! notifier had taken and not answered waits until its thread is interrupted, which the next
//! holder does anyway when it seizes the service: the thread then makes its call anew.

use super::announcement::{self, Announcement};
use super::closings::Closings;
use super::error::Error;
use super::fold;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use unbroken_sys::seccomp;

/// The queue between the notifier and the capture.
#[derive(Clone, Debug)]
pub struct Announcements(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    closings: Closings,
    /// Held from the announcement of a call until its thread is let go.
    calls: Mutex<()>,
}

#[derive(Debug)]
struct Queue {
    recording: bool,
    list: Vec<Announcement>,
    kept_max: usize,
}

impl Announcements {
    /// Between two captures up to `kept_max` announcements are kept one by one. Of more it is told
    /// what they come to: to look at the whole table of descriptors costs less than to follow them.
    pub fn new(kept_max: usize) -> Announcements {
        let queue = Queue {
            recording: false,
            list: Vec::new(),
            kept_max: kept_max.max(fold::LEAST),
        };
        Announcements(Arc::new(Shared {
            queue: Mutex::new(queue),
            closings: Closings::default(),
            calls: Mutex::default(),
        }))
    }

    /// Begins or ends recording. While it is off, as when there is no standby, announcements are
    /// dropped: a fill begins with a full survey. Whatever was queued is dropped too.
    pub fn set_recording(&self, recording: bool) {
        let mut queue = self.lock();
        queue.recording = recording;
        queue.list.clear();
        let room = if recording { queue.kept_max } else { 0 };
        queue.list.reserve(room);
    }

    /// Moves the queue into `list`, which is emptied first and whose capacity serves the queue
    /// next.
    pub fn take(&self, list: &mut Vec<Announcement>) {
        list.clear();
        std::mem::swap(&mut self.lock().list, list);
    }

    fn append(&self, announcement: Announcement) {
        let mut queue = self.lock();
        if !queue.recording {
            return;
        }
        let Queue { list, kept_max, .. } = &mut *queue;
        if list.len() >= *kept_max {
            fold::fold(list, *kept_max);
        }
        list.push(announcement);
    }

    /// While this is held no call stands announced and not let go: a stop then finds each either
    /// made, or neither announced nor made.
    pub fn hold_calls(&self) -> MutexGuard<'_, ()> {
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What connections that were closed have left to say, whether recording is on or not.
    pub fn closings(&self) -> &Closings {
        &self.0.closings
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every change of the queue is complete in itself, so a panic elsewhere harms nothing.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers announced calls on the calling thread until nobody is left under the filter.
///
/// The caller pins the thread to the service's core first and sets `same_core` then. Before Linux
/// 6.11 the end of the service is not reported here and this call does not return.
pub fn serve(
    listener: BorrowedFd<'_>,
    announcements: &Announcements,
    same_core: bool,
) -> Result<(), Error> {
    if same_core {
        // Only faster, and unknown before Linux 6.6: no reason to stop.
        let _ = seccomp::wake_on_same_core(listener);
    }
    let failed = |source| Error::during("answer announced calls of the service")(source);
    loop {
        let notification = match seccomp::receive(listener) {
            Ok(notification) => notification,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                if seccomp::in_use(listener).map_err(failed)? {
                    continue;
                }
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        };
        let thread = notification.tid;
        let read =
            |address, buffer: &mut [u8]| seccomp::read_caller(thread, address, buffer).is_ok();
        let call = i64::from(notification.call);
        let _call = announcements.hold_calls();
        let changes = announcement::changes(call, notification.arguments, read);
        for change in changes.iter().flatten() {
            announcements.closings().note(thread, change);
        }
        match seccomp::let_continue(listener, notification.id) {
            Ok(()) => {
                for change in changes.into_iter().flatten() {
                    announcements.append(Announcement { thread, change });
                }
            }
            // The caller died or was interrupted; in the latter case it asks again.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::announcement::Change;
    use super::*;
    use unbroken_image::{AddressRange, Fd};

    #[test]
    fn the_queue_is_bounded_and_nothing_is_lost() {
        const KEPT_MAX: usize = 64;
        let announcement = Announcement {
            thread: 1,
            change: Change::Closing(Fd(3)),
        };
        let announcements = Announcements::new(KEPT_MAX);
        let mut list = Vec::new();
        announcements.append(announcement);
        announcements.take(&mut list);
        assert!(list.is_empty(), "recording is off");
        announcements.set_recording(true);
        announcements.append(announcement);
        announcements.take(&mut list);
        assert_eq!(list, [announcement]);
        let void = Change::MemoryVoid(AddressRange {
            start: 0x1000,
            end: 0x2000,
        });
        announcements.append(Announcement {
            thread: 1,
            change: void,
        });
        for _ in 0..3 * KEPT_MAX {
            announcements.append(announcement);
        }
        announcements.take(&mut list);
        assert!(list.len() <= KEPT_MAX);
        let said = |change| list.iter().any(|one| one.change == change);
        assert!(said(void) && said(Change::Descriptors));
    }
}
