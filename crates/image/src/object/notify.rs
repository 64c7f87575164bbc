use crate::{Fd, ObjectId};
use serde::{Deserialize, Serialize};

/// One interest of an epoll instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollEntry {
    /// The number under which the target was added.
    pub fd: Fd,
    /// The description that was added; the number may name another one by now.
    pub target: ObjectId,
    /// `EPOLL*` bits as fdinfo shows them; a fired `EPOLLONESHOT` entry has only its private bits.
    pub events: u32,
    pub data: u64,
}

impl EpollEntry {
    /// What entries are ordered by.
    pub fn key(&self) -> (Fd, ObjectId) {
        (self.fd, self.target)
    }
}

/// `EPIOCSPARAMS`: how long an epoll instance polls its network devices before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusyPoll {
    pub duration_us: u32,
    /// Packets in one round.
    pub budget: u16,
    pub prefer: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    pub flags: i32,
    pub busy_poll: BusyPoll,
    /// Ordered by [`EpollEntry::key`].
    pub entries: Vec<EpollEntry>,
}

/// An entry of an epoll instance and what it asks for now; `None` when it is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterestChange {
    pub instance: ObjectId,
    pub fd: Fd,
    pub target: ObjectId,
    /// Events and data, as in [`EpollEntry`].
    pub event: Option<(u32, u64)>,
}

impl Epoll {
    /// Takes in what became of one entry.
    pub fn apply(&mut self, change: &InterestChange) {
        let InterestChange {
            fd, target, event, ..
        } = *change;
        let place = self
            .entries
            .binary_search_by_key(&(fd, target), EpollEntry::key);
        let entry = event.map(|(events, data)| EpollEntry {
            fd,
            target,
            events,
            data,
        });
        match (place, entry) {
            (Ok(place), Some(entry)) => self.entries[place] = entry,
            (Err(place), Some(entry)) => self.entries.insert(place, entry),
            (Ok(place), None) => drop(self.entries.remove(place)),
            (Err(_), None) => {}
        }
    }
}

/// `eventfd(2)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventCounter {
    pub flags: i32,
    pub count: u64,
    pub semaphore: bool,
}

/// `timerfd_create(2)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerDescriptor {
    pub flags: i32,
    pub clock: i32,
    /// `TFD_TIMER_*` of the last `timerfd_settime`; on a clock that nobody sets always with
    /// `TFD_TIMER_ABSTIME`, which makes no difference there.
    pub set_flags: u32,
    /// Unread expirations.
    pub ticks: u64,
    /// Absolute; 0 is disarmed. On the timer's own clock, but `CLOCK_MONOTONIC` for a
    /// `CLOCK_REALTIME` timer set without `TFD_TIMER_ABSTIME`, as the kernel counts that one.
    pub expiry_ns: u64,
    pub interval_ns: u64,
}

/// `signalfd(2)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalDescriptor {
    pub flags: i32,
    pub mask: u64,
}
