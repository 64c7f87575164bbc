//! What the mirror knows of one object, and how it looks at it cheaply.

use super::Process;
use crate::pipe::{self, Scratch};
use crate::{
    Context, Error, Kind, device, directory, epoll, eventfd, file, memfd, proc_file, signalfd,
    timerfd,
};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::RegularFile;
use unbroken_image::{Fd, FileIdentity, Object, ObjectId, Pid};
use unbroken_sys::descriptor::{self, Status};
use unbroken_sys::{fdinfo, timer};

/// fdinfo of one slot, kept open, and its text at the last look. It holds nothing of the service.
#[derive(Debug)]
struct Watch {
    place: (Pid, Fd),
    fdinfo: OwnedFd,
    text: Vec<u8>,
    /// The text before, to compare; kept for its buffer.
    last: Vec<u8>,
}

impl Watch {
    /// Reads again; whether the text is another one.
    fn read(&mut self) -> Result<bool, Error> {
        std::mem::swap(&mut self.text, &mut self.last);
        fdinfo::read_again(self.fdinfo.as_fd(), &mut self.text)
            .during("read fdinfo of", "a watched descriptor")?;
        Ok(self.text != self.last)
    }
}

/// What a cheap look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    Same,
    /// The state is another one, and up to date.
    Refreshed,
    /// Something may have changed: only a capture tells.
    Unknown,
}

/// One open file description of the service.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: Kind,
    pub identity: FileIdentity,
    /// The service's standard output (1) or error (2).
    pub output: Option<u8>,
    /// Every slot that names it; never empty between updates.
    pub slots: Vec<(Pid, Fd)>,
    /// The last state that was read; sockets keep theirs elsewhere.
    pub state: Option<Object>,
    /// The epoll instances that have an entry for it, and under which number.
    pub watched_by: Vec<(ObjectId, Fd)>,
    watches: Vec<Watch>,
    /// An `O_PATH` descriptor for `fstat`, and the times that it showed.
    reference: Option<(OwnedFd, Status)>,
}

impl Entry {
    pub fn new(kind: Kind, status: &Status, output: Option<u8>) -> Entry {
        Entry {
            kind,
            identity: FileIdentity {
                device: status.device,
                inode: status.inode,
            },
            output,
            slots: Vec::new(),
            state: None,
            watched_by: Vec::new(),
            watches: Vec::new(),
            reference: None,
        }
    }

    /// Whether the object must be looked at in every epoch: its state changes by calls that are
    /// not announced, or by none.
    pub fn is_volatile(&self) -> bool {
        match self.kind {
            _ if self.output.is_some() => false,
            Kind::RegularFile
            | Kind::Directory
            | Kind::MemoryFile
            | Kind::EventCounter
            | Kind::Timer
            | Kind::Tcp
            | Kind::Udp
            | Kind::Unix => true,
            // A write end has no state of its own but flags.
            Kind::Pipe | Kind::Fifo => {
                !matches!(&self.state, Some(Object::PipeEnd(end)) if end.pipe.is_none())
            }
            Kind::Epoll => matches!(
                &self.state,
                Some(Object::Epoll(state))
                    if state.entries.iter().any(|entry| epoll::may_fire(entry.events))
            ),
            Kind::CharacterDevice | Kind::Signals | Kind::Refused(_) => false,
        }
    }

    /// Reads the object whole from `fd`, a duplicate; not for sockets and epoll instances.
    /// `announced`: a call changed it, so nothing of the last state may be relied on; `mapped`: it
    /// is a memfd whose pages travel with memory.
    pub fn capture(
        &mut self,
        fd: BorrowedFd<'_>,
        (announced, mapped): (bool, bool),
        sources: &BTreeMap<Pid, Process>,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        if let Some(stream) = self.output {
            let flags = descriptor::status_flags(fd).during("read the flags of", "the output")?;
            self.state = Some(Object::Output { stream, flags });
            return Ok(());
        }
        self.kind.require_support()?;
        let previous = match &self.state {
            Some(Object::TimerDescriptor(state)) if !announced => Some(state),
            _ => None,
        };
        let host_pid = |pid| sources.get(&pid).map(|process| process.source.host_pid);
        let state = match self.kind {
            Kind::RegularFile => {
                let mut state = file::capture(fd)?;
                if state.identity == file::UNCHECKED {
                    let opened = (state.path, state.flags);
                    state.path = proc_file::path_for_replica(fd, opened, host_pid)?;
                }
                Object::RegularFile(state)
            }
            Kind::Directory => {
                let mut state = directory::capture(fd)?;
                if state.identity == file::UNCHECKED {
                    let opened = (state.path, state.flags);
                    state.path = proc_file::path_for_replica(fd, opened, host_pid)?;
                }
                Object::Directory(state)
            }
            Kind::CharacterDevice => Object::CharacterDevice(device::capture(fd)?),
            Kind::MemoryFile => Object::MemoryFile(memfd::capture(fd, mapped)?),
            Kind::Pipe | Kind::Fifo => Object::PipeEnd(pipe::capture(fd, scratch)?),
            Kind::EventCounter => Object::EventCounter(eventfd::capture(fd)?),
            Kind::Timer => Object::TimerDescriptor(timerfd::capture(fd, previous)?),
            Kind::Signals => Object::SignalDescriptor(signalfd::capture(fd)?),
            Kind::Epoll | Kind::Tcp | Kind::Udp | Kind::Unix | Kind::Refused(_) => return Ok(()),
        };
        self.state = Some(state);
        self.watch(sources)?;
        self.add_process_locks()
    }

    /// Looks cheaply for what the last state has not, and brings the state up to date where the
    /// look itself tells all.
    pub fn look(
        &mut self,
        sources: &BTreeMap<Pid, Process>,
        scratch: &mut Scratch,
    ) -> Result<Look, Error> {
        match self.kind {
            _ if self.state.is_none() => Ok(Look::Unknown),
            Kind::RegularFile | Kind::Directory | Kind::EventCounter => self.look_at_text(),
            Kind::Pipe | Kind::Fifo => self.look_at_content(sources, scratch),
            Kind::MemoryFile => {
                let differs = self.read_watches()? || self.memory_file_differs()?;
                Ok(if differs { Look::Unknown } else { Look::Same })
            }
            Kind::Timer => Ok(if self.timer_differs()? {
                Look::Unknown
            } else {
                Look::Same
            }),
            _ => Ok(Look::Same),
        }
    }

    /// Opens what the cheap looks need: one fdinfo for each process that has a slot, because each
    /// shows the locks of its own.
    fn watch(&mut self, sources: &BTreeMap<Pid, Process>) -> Result<(), Error> {
        let by_text = matches!(
            self.kind,
            Kind::RegularFile
                | Kind::Directory
                | Kind::MemoryFile
                | Kind::EventCounter
                | Kind::Timer
        );
        if !by_text {
            return Ok(());
        }
        let slots = &self.slots;
        self.watches.retain(|watch| slots.contains(&watch.place));
        for place in slots {
            if self.watches.iter().any(|watch| watch.place.0 == place.0) {
                continue;
            }
            let Some(process) = sources.get(&place.0) else {
                continue;
            };
            let fdinfo = process.source.fdinfo(place.1)?;
            self.watches.push(Watch {
                place: *place,
                fdinfo,
                text: Vec::new(),
                last: Vec::new(),
            });
        }
        for watch in &mut self.watches {
            watch.read()?;
        }
        if matches!(self.kind, Kind::RegularFile | Kind::MemoryFile) {
            self.refer(sources)?;
        }
        Ok(())
    }

    fn refer(&mut self, sources: &BTreeMap<Pid, Process>) -> Result<(), Error> {
        let fd = match self.reference.take() {
            Some((fd, _)) => fd,
            None => {
                let Some((pid, fd)) = self.slots.first() else {
                    return Ok(());
                };
                let Some(process) = sources.get(pid) else {
                    return Ok(());
                };
                process.source.reference(*fd)?
            }
        };
        let status = descriptor::status(fd.as_fd()).during("look at", "a file")?;
        self.reference = Some((fd, status));
        Ok(())
    }

    /// Takes a slot away; what was opened through it tells of something else now, and the next
    /// look opens anew.
    pub fn remove_slot(&mut self, place: (Pid, Fd)) {
        self.slots.retain(|slot| *slot != place);
        if self.watches.iter().any(|watch| watch.place == place) {
            self.watches.clear();
        }
    }

    /// Adds a slot; a further process needs a watch of its own, for its locks.
    pub fn add_slot(&mut self, place: (Pid, Fd)) {
        if !self.slots.iter().any(|(pid, _)| *pid == place.0) {
            self.watches.clear();
        }
        self.slots.push(place);
    }

    /// Reads all watches again; whether any tells something else. Without a watch, as after a slot
    /// moved, nothing is known.
    fn read_watches(&mut self) -> Result<bool, Error> {
        let mut differs = self.watches.is_empty();
        for watch in &mut self.watches {
            differs |= watch.read()?;
        }
        Ok(differs)
    }

    fn look_at_text(&mut self) -> Result<Look, Error> {
        let differs = self.read_watches()?;
        let Some(watch) = self.watches.first() else {
            return Ok(Look::Unknown);
        };
        let length_bytes = match (&self.state, &self.reference) {
            (
                Some(Object::RegularFile(RegularFile {
                    length_bytes: Some(_),
                    ..
                })),
                Some((fd, _)),
            ) => {
                let status = descriptor::status(fd.as_fd()).during("look at", "a file")?;
                Some(status.length_bytes)
            }
            _ => None,
        };
        match &mut self.state {
            Some(Object::RegularFile(state)) => {
                if !differs && state.length_bytes == length_bytes {
                    return Ok(Look::Same);
                }
                let Some((position, flags)) = position_and_flags(&watch.text) else {
                    return Ok(Look::Unknown);
                };
                if flags != state.flags {
                    return Ok(Look::Unknown);
                }
                state.position = position;
                state.length_bytes = length_bytes;
                state.locks.clear();
                for watch in &self.watches {
                    file::add_locks(&watch.text, watch.place.0, state)?;
                }
                Ok(Look::Refreshed)
            }
            _ if !differs => Ok(Look::Same),
            Some(Object::Directory(state)) => match position_and_flags(&watch.text) {
                Some((position, flags)) if flags == state.flags => {
                    state.position = position;
                    Ok(Look::Refreshed)
                }
                _ => Ok(Look::Unknown),
            },
            Some(Object::EventCounter(state)) => match position_and_flags(&watch.text) {
                Some((_, flags)) if flags == state.flags => {
                    *state = eventfd::parse(&watch.text, flags)?;
                    Ok(Look::Refreshed)
                }
                _ => Ok(Look::Unknown),
            },
            _ => Ok(Look::Unknown),
        }
    }

    /// No call that writes to a memfd is announced, but the time of change tells of all.
    fn memory_file_differs(&self) -> Result<bool, Error> {
        let Some((reference, last)) = &self.reference else {
            return Ok(true);
        };
        let now = descriptor::status(reference.as_fd()).during("look at", "a memfd")?;
        Ok(now.length_bytes != last.length_bytes
            || now.changed_ns != last.changed_ns
            || is_recent(now.changed_ns))
    }

    fn timer_differs(&mut self) -> Result<bool, Error> {
        let Some(watch) = self.watches.first_mut() else {
            return Ok(true);
        };
        watch.read()?;
        let reading = timerfd::parse(&watch.text)?;
        let Some(Object::TimerDescriptor(known)) = &self.state else {
            return Ok(true);
        };
        let is_due = known.expiry_ns != 0 && {
            let clock = timerfd::counting_clock(known.clock, known.set_flags);
            timer::now_ns(clock).during("read the clock of", "a timerfd")? >= known.expiry_ns
        };
        Ok(is_due || reading.ticks != known.ticks)
    }

    fn look_at_content(
        &mut self,
        sources: &BTreeMap<Pid, Process>,
        scratch: &mut Scratch,
    ) -> Result<Look, Error> {
        let Some(Object::PipeEnd(end)) = &mut self.state else {
            return Ok(Look::Unknown);
        };
        let Some(known) = &mut end.pipe else {
            return Ok(Look::Same);
        };
        let Some(fd) = super::duplicate(sources, &self.slots)? else {
            return Ok(Look::Unknown);
        };
        let unread = descriptor::unread_bytes(fd.as_fd()).during("look into", "a pipe")?;
        if unread == 0 && known.content.is_empty() {
            return Ok(Look::Same);
        }
        let now = pipe::capture_content(fd.as_fd(), scratch)?;
        if now == *known {
            return Ok(Look::Same);
        }
        *known = now;
        Ok(Look::Refreshed)
    }

    /// Adds the locks that show only in each process's own fdinfo.
    fn add_process_locks(&mut self) -> Result<(), Error> {
        if let Some(Object::RegularFile(state)) = &mut self.state {
            for watch in &self.watches {
                file::add_locks(&watch.text, watch.place.0, state)?;
            }
        }
        Ok(())
    }
}

/// `pos:` and `flags:` of an fdinfo text, without the flag that belongs to the slot.
fn position_and_flags(text: &[u8]) -> Option<(u64, i32)> {
    let position = fdinfo::field(text, "pos")?.parse().ok()?;
    let flags = i32::from_str_radix(fdinfo::field(text, "flags")?, 8).ok()?;
    Some((position, flags & !libc::O_CLOEXEC))
}

/// Whether another change could still carry the same time: before multigrain timestamps (Linux
/// 6.13) two changes within one tick of the clock, at most 10 ms, look alike.
fn is_recent(changed_ns: i64) -> bool {
    const TICK_NS: i64 = 10_000_000;
    match timer::now_ns(libc::CLOCK_REALTIME).map(i64::try_from) {
        Ok(Ok(now_ns)) => now_ns - changed_ns < TICK_NS,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every text of /proc/PID/fdinfo that is read anywhere, by everyone who reads one.
    #[test]
    fn fuzz_fdinfo_of_objects() {
        let samples: [&[u8]; 4] = [
            b"pos:\t0\nflags:\t02\nlock:\t1: POSIX  ADVISORY  WRITE 4711 fe:00:131 0 EOF\n",
            b"tfd:        5 events:       19 data:                5  pos:0 ino:1797e sdev:f\n",
            b"clockid: 1\nticks: 0\nsettime flags: 01\nit_value: (0, 49406829)\nit_interval: (1, 0)\n",
            b"eventfd-count:                2\neventfd-id: 3\nsigmask:\t0000000000004000\n",
        ];
        unbroken_fuzz::bytes("fdinfo", &samples.map(<[u8]>::to_vec), |text| {
            let _ = position_and_flags(text);
            let mut entries = Vec::new();
            let _ = crate::epoll::parse(text, &mut entries);
            let _ = crate::timerfd::parse(text);
            let _ = crate::eventfd::parse(text, 0);
            let mut state = RegularFile {
                path: String::new(),
                identity: unbroken_image::FileIdentity {
                    device: 1,
                    inode: 1,
                },
                flags: 0,
                position: 0,
                length_bytes: None,
                locks: Vec::new(),
            };
            let _ = file::add_locks(text, Pid(1), &mut state);
        });
    }
}
