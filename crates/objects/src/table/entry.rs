//! What the mirror knows of one object, and how it looks at it cheaply.

use super::Process;
use crate::pipe::{self, Scratch};
use crate::{
    Context, Error, Kind, device, directory, epoll, eventfd, file, memfd, signalfd, timerfd,
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
    /// `announced`: a call changed it, so nothing of the last state may be relied on.
    pub fn capture(
        &mut self,
        fd: BorrowedFd<'_>,
        announced: bool,
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
        let state = match self.kind {
            Kind::RegularFile => Object::RegularFile(file::capture(fd)?),
            Kind::Directory => Object::Directory(directory::capture(fd)?),
            Kind::CharacterDevice => Object::CharacterDevice(device::capture(fd)?),
            Kind::MemoryFile => Object::MemoryFile(memfd::capture(fd, false)?),
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

    /// Whether a cheap look shows anything that the last state has not. `true` may be wrong,
    /// `false` is not.
    pub fn differs(
        &mut self,
        sources: &BTreeMap<Pid, Process>,
        scratch: &mut Scratch,
    ) -> Result<bool, Error> {
        match &self.state {
            None => Ok(true),
            Some(Object::RegularFile(_) | Object::Directory(_) | Object::MemoryFile(_)) => {
                Ok(self.text_differs()? || self.status_differs()?)
            }
            Some(Object::EventCounter(_)) => self.text_differs(),
            Some(Object::TimerDescriptor(_)) => self.timer_differs(),
            Some(Object::PipeEnd(_)) => self.content_differs(sources, scratch),
            Some(_) => Ok(false),
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

    fn text_differs(&mut self) -> Result<bool, Error> {
        // A process that joined or a slot that moved needs new watches.
        if self.watches.is_empty() {
            return Ok(true);
        }
        for watch in &mut self.watches {
            if watch.read()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Length for a file that can be written; for a memfd the time of change as well, because no
    /// call that writes to it is announced.
    fn status_differs(&self) -> Result<bool, Error> {
        let Some((reference, last)) = &self.reference else {
            return Ok(false);
        };
        let now = descriptor::status(reference.as_fd()).during("look at", "a file")?;
        Ok(match &self.state {
            Some(Object::RegularFile(RegularFile {
                length_bytes: Some(known),
                ..
            })) => now.length_bytes != *known,
            Some(Object::MemoryFile(_)) => {
                now.length_bytes != last.length_bytes
                    || now.changed_ns != last.changed_ns
                    || is_recent(now.changed_ns)
            }
            _ => false,
        })
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

    fn content_differs(
        &self,
        sources: &BTreeMap<Pid, Process>,
        scratch: &mut Scratch,
    ) -> Result<bool, Error> {
        let Some(Object::PipeEnd(known)) = &self.state else {
            return Ok(true);
        };
        let Some(pipe) = &known.pipe else {
            return Ok(false);
        };
        let Some(fd) = super::duplicate(sources, &self.slots)? else {
            return Ok(true);
        };
        let unread = descriptor::unread_bytes(fd.as_fd()).during("look into", "a pipe")?;
        let known_bytes: usize = pipe.content.iter().map(Vec::len).sum();
        if unread == 0 || unread != known_bytes {
            return Ok(unread != known_bytes);
        }
        Ok(pipe::capture_content(fd.as_fd(), scratch)? != *pipe)
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

/// Whether another change could still carry the same time: before multigrain timestamps (Linux
/// 6.13) two changes within one tick of the clock, at most 10 ms, look alike.
fn is_recent(changed_ns: i64) -> bool {
    const TICK_NS: i64 = 10_000_000;
    match timer::now_ns(libc::CLOCK_REALTIME).map(i64::try_from) {
        Ok(Ok(now_ns)) => now_ns - changed_ns < TICK_NS,
        _ => true,
    }
}
