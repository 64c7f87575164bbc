//! What is kept open to see cheaply whether an object has changed. None of it holds anything of the
//! service.

use crate::table::process::Holders;
use crate::{Context, Error};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use unbroken_image::{Fd, Pid};
use unbroken_sys::descriptor::{self, Status};
use unbroken_sys::fdinfo;

/// fdinfo of one slot and its text at the last look.
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

/// One fdinfo for each process that has a slot, because each shows the locks of its own.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    list: Vec<Watch>,
    /// An `O_PATH` descriptor, and what `fstat` showed at the last reading.
    reference: Option<(Arc<OwnedFd>, Status)>,
}

impl Watches {
    /// Opens what is missing, and reads all.
    pub fn open(&mut self, holders: &Holders<'_>) -> Result<(), Error> {
        let Holders { processes, slots } = *holders;
        self.list.retain(|watch| slots.contains(&watch.place));
        for place in slots {
            if self.list.iter().any(|watch| watch.place.0 == place.0) {
                continue;
            }
            let Some(process) = processes.get(&place.0) else {
                continue;
            };
            let fdinfo = process.source.fdinfo(place.1)?;
            self.list.push(Watch {
                place: *place,
                fdinfo,
                text: Vec::new(),
                last: Vec::new(),
            });
        }
        self.read().map(drop)
    }

    /// Refers to the file, and takes its times and length down, for [`Watches::status`].
    pub fn refer(&mut self, holders: &Holders<'_>) -> Result<(), Error> {
        let Holders { processes, slots } = *holders;
        let fd = match self.reference.take() {
            Some((fd, _)) => fd,
            None => {
                let Some((pid, fd)) = slots.first() else {
                    return Ok(());
                };
                let Some(process) = processes.get(pid) else {
                    return Ok(());
                };
                Arc::new(process.source.reference(*fd)?)
            }
        };
        let status = descriptor::status(fd.as_fd()).during("look at", "a file")?;
        self.reference = Some((fd, status));
        Ok(())
    }

    /// An `O_PATH` descriptor of the file, if it is one that is referred to.
    pub fn reference(&self) -> Option<&Arc<OwnedFd>> {
        self.reference.as_ref().map(|(fd, _)| fd)
    }

    /// What the file shows now, and what it showed before.
    pub fn status(&self) -> Result<Option<(Status, &Status)>, Error> {
        let Some((fd, before)) = &self.reference else {
            return Ok(None);
        };
        let now = descriptor::status(fd.as_fd()).during("look at", "a file")?;
        Ok(Some((now, before)))
    }

    /// Reads all again; whether any tells something else. Without one, as after a slot moved,
    /// nothing is known.
    pub fn read(&mut self) -> Result<bool, Error> {
        let mut differs = self.list.is_empty();
        for watch in &mut self.list {
            differs |= watch.read()?;
        }
        Ok(differs)
    }

    /// What any of them told.
    pub fn text(&self) -> Option<&[u8]> {
        self.list.first().map(|watch| watch.text.as_slice())
    }

    /// What each process's own told.
    pub fn texts(&self) -> impl Iterator<Item = (Pid, &[u8])> {
        self.list
            .iter()
            .map(|watch| (watch.place.0, watch.text.as_slice()))
    }

    /// A slot is gone: what was opened through it tells of something else now, and the next look
    /// opens anew.
    pub fn slot_left(&mut self, place: (Pid, Fd)) {
        if self.list.iter().any(|watch| watch.place == place) {
            self.list.clear();
        }
    }

    /// A further process has a slot, and needs a watch of its own.
    pub fn process_came(&mut self) {
        self.list.clear();
    }
}

/// `pos:` and `flags:` of an fdinfo text, without the flag that belongs to the slot.
pub(crate) fn position_and_flags(text: &[u8]) -> Option<(u64, i32)> {
    let position = fdinfo::field(text, "pos")?.parse().ok()?;
    let flags = i32::from_str_radix(fdinfo::field(text, "flags")?, 8).ok()?;
    Some((position, flags & !libc::O_CLOEXEC))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file;
    use unbroken_image::FileIdentity;
    use unbroken_image::object::RegularFile;

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
                identity: FileIdentity {
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
