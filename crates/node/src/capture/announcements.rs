//! From what the notifier heard to what each part of a capture looks at.

use crate::stage::announcement::{Announcement as Heard, Change, EpollChange};
use unbroken_image::{AddressRange, PAGE_SIZE, Pid};
use unbroken_objects::table::{Announced, Announcement};

/// What is to be looked at among the objects of all processes. The buffer is used again.
#[derive(Default)]
pub(super) struct PendingObjectChanges {
    pub descriptors: Vec<Announcement>,
    /// Memory was mapped or let go of.
    pub map: bool,
    /// Threads that were there at the last capture are not any more.
    pub threads_ended: bool,
    /// The standby knows nothing yet: look at everything.
    pub everything: bool,
}

impl PendingObjectChanges {
    pub fn clear(&mut self) {
        self.descriptors.clear();
        self.map = false;
        self.threads_ended = false;
        self.everything = false;
    }
}

/// What is to be looked at in one process. The buffers are used again.
#[derive(Default)]
pub(super) struct PendingChanges {
    pub map: bool,
    /// So may advice and locks, which only a survey of the map shows.
    pub advice: bool,
    /// Content in these ranges is void.
    pub voided: Vec<AddressRange>,
    /// The lowest end of the heap that a call asked for.
    pub lowest_break: Option<u64>,
    pub files_opened: bool,
    /// Of the state of the process, each by the survey of that part.
    pub signal_actions: bool,
    pub timers: bool,
    pub settings: bool,
    /// A file of /proc was opened for writing.
    pub proc_file: bool,
    /// Threads whose attributes may have changed, by their host numbers.
    pub threads: Vec<u32>,
    /// So may those of any thread.
    pub all_threads: bool,
    /// The standby knows nothing yet: look at everything.
    pub everything: bool,
}

impl PendingChanges {
    pub fn clear(&mut self) {
        self.map = false;
        self.advice = false;
        self.voided.clear();
        self.lowest_break = None;
        self.files_opened = false;
        self.signal_actions = false;
        self.timers = false;
        self.settings = false;
        self.proc_file = false;
        self.threads.clear();
        self.all_threads = false;
        self.everything = false;
    }

    /// Takes in an announcement of process `pid`; what it says of descriptors is the objects'.
    pub fn take(&mut self, pid: Pid, announcement: &Heard, objects: &mut PendingObjectChanges) {
        let what = match announcement.change {
            Change::MemoryMap(_) => {
                self.map = true;
                return;
            }
            Change::MemoryAdvice => {
                self.map = true;
                self.advice = true;
                return;
            }
            Change::MemoryVoid(range) => {
                self.map = true;
                self.voided.push(range);
                return;
            }
            Change::Break(end) => {
                self.map = true;
                let end = end.next_multiple_of(PAGE_SIZE);
                self.lowest_break = Some(self.lowest_break.map_or(end, |lowest| lowest.min(end)));
                return;
            }
            Change::SignalActions => {
                self.signal_actions = true;
                return;
            }
            Change::Timers => {
                self.timers = true;
                return;
            }
            Change::Credentials | Change::ProcessState => {
                self.settings = true;
                return;
            }
            Change::ThreadAttributes => {
                self.threads.push(announcement.thread);
                return;
            }
            Change::ProcFile => {
                self.proc_file = true;
                return;
            }
            Change::AnyThreadAttributes => {
                self.all_threads = true;
                return;
            }
            Change::Opened => {
                self.files_opened = true;
                Announced::Created { count: 1 }
            }
            Change::Created(count) => Announced::Created { count },
            Change::CreatedFrom(minimum) => Announced::CreatedFrom { minimum },
            Change::Slot(fd) => Announced::Slot { fd },
            Change::Closing(fd) => Announced::Closing { fd },
            Change::CloseRange {
                first,
                last,
                close_on_exec,
            } => Announced::CloseRange {
                first,
                last,
                close_on_exec,
            },
            Change::Object(fd) => Announced::Object { fd },
            Change::Descriptors => {
                self.files_opened = true;
                Announced::Everything
            }
            Change::Epoll(EpollChange {
                epoll,
                operation,
                target,
                event,
            }) => Announced::Epoll {
                epoll,
                operation,
                target,
                event,
            },
        };
        objects.descriptors.push(Announcement {
            pid,
            thread: announcement.thread,
            what,
        });
    }
}
