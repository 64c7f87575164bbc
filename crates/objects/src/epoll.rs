//! epoll instances: their entries, read from fdinfo, and the calls that make them again.
//!
//! An entry is filed under (description, number): the number that the target had when it was
//! added. The replica's own later `epoll_ctl` calls name that number, so each entry must be added
//! under it, by the replica itself; [`plan`] says by which calls.

use crate::methods::{Capture, Methods, Pollable};
use crate::restored::{Phase, make_each};
use crate::{Context, Error};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::object::{BusyPoll, Epoll, EpollEntry};
use unbroken_image::{Descriptor, Fd, Object, ObjectId, Pid};
use unbroken_sys::{descriptor, epoll, fdinfo};

const SUBJECT: &str = "an epoll instance";

pub(crate) const METHODS: Methods = Methods {
    // Nesting may fail by depth.
    pollable: Pollable::Unknown,
    is_volatile: |object| match object {
        Object::Epoll(state) => state.entries.iter().any(|entry| may_fire(entry.events)),
        _ => false,
    },
    ..Methods::new(
        Capture::Mirror,
        &[(Phase::Make, |batch, _, restored| {
            make_each(batch, restored, |_, object| match object {
                Object::Epoll(state) => restore(state).map(Some),
                _ => Ok(None),
            })
        })],
    )
};

pub const EPOLLIN: u32 = libc::EPOLLIN as u32;
pub const EPOLLOUT: u32 = libc::EPOLLOUT as u32;
pub const EPOLLERR: u32 = libc::EPOLLERR as u32;
pub const EPOLLHUP: u32 = libc::EPOLLHUP as u32;
pub const EPOLLONESHOT: u32 = libc::EPOLLONESHOT as u32;
pub const EPOLLEXCLUSIVE: u32 = libc::EPOLLEXCLUSIVE as u32;
pub const EPOLLWAKEUP: u32 = libc::EPOLLWAKEUP as u32;

/// The bits that are no events: `EP_PRIVATE_BITS` of fs/eventpoll.c. A fired `EPOLLONESHOT` entry
/// has nothing else left.
const PRIVATE_BITS: u32 = EPOLLWAKEUP | EPOLLONESHOT | libc::EPOLLET as u32 | EPOLLEXCLUSIVE;

/// Whether an entry is an `EPOLLONESHOT` one that fired and was not armed again.
pub fn has_fired(events: u32) -> bool {
    events & EPOLLONESHOT != 0 && events & !PRIVATE_BITS == 0
}

/// Whether the entry may fire, and so change, without a call of the service that is announced.
pub fn may_fire(events: u32) -> bool {
    events & EPOLLONESHOT != 0 && !has_fired(events)
}

/// One line of an epoll instance's fdinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawEntry {
    /// The number under which the target was added.
    pub fd: Fd,
    pub events: u32,
    pub data: u64,
    /// The target's inode.
    pub inode: u64,
    /// Which of the entries with the same number this is, in the kernel's order.
    pub nth: u32,
}

/// Reads the entries out of an fdinfo text into `entries`
/// (`ep_show_fdinfo`: `tfd: 5 events: 19 data: 5 pos:0 ino:1797e sdev:f`).
pub fn parse(text: &[u8], entries: &mut Vec<RawEntry>) -> Result<(), Error> {
    entries.clear();
    for line in text.split(|byte| *byte == b'\n') {
        let Some(line) = line.strip_prefix(b"tfd:") else {
            continue;
        };
        let line = std::str::from_utf8(line).unwrap_or_default();
        let mut entry = parse_line(line).ok_or_else(|| Error::Answer {
            operation: "read the entries of",
            subject: SUBJECT.to_owned(),
            answer: line.to_owned(),
        })?;
        // The kernel keeps them ordered by (file, number), so equal numbers may lie anywhere.
        entry.nth = 0;
        entries.push(entry);
    }
    number_repetitions(entries);
    Ok(())
}

fn parse_line(line: &str) -> Option<RawEntry> {
    let mut words = line.split_ascii_whitespace();
    let fd = Fd(words.next()?.parse().ok()?);
    let mut value = |name: &str| -> Option<&str> {
        let word = words.next()?;
        match word.strip_prefix(name)? {
            "" => words.next(),
            rest => Some(rest),
        }
    };
    let events = u32::from_str_radix(value("events:")?, 16).ok()?;
    let data = u64::from_str_radix(value("data:")?, 16).ok()?;
    value("pos:")?;
    let inode = u64::from_str_radix(value("ino:")?, 16).ok()?;
    Some(RawEntry {
        fd,
        events,
        data,
        inode,
        nth: 0,
    })
}

fn number_repetitions(entries: &mut [RawEntry]) {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|index| (entries[*index].fd, *index));
    for pair in order.windows(2) {
        if entries[pair[0]].fd == entries[pair[1]].fd {
            entries[pair[1]].nth = entries[pair[0]].nth + 1;
        }
    }
}

/// Reads out a descriptor of ours that names an epoll instance; `resolve` finds the target of an
/// entry ([`crate::table::Mirror`] does).
pub fn capture(
    fd: BorrowedFd<'_>,
    mut resolve: impl FnMut(&RawEntry) -> Result<ObjectId, Error>,
) -> Result<Epoll, Error> {
    let flags = descriptor::status_flags(fd).during("read the flags of", SUBJECT)?;
    crate::description::refuse_ownership(fd, flags, SUBJECT)?;
    let mut text = Vec::new();
    fdinfo::own_fdinfo(fd, &mut text).during("read the entries of", SUBJECT)?;
    let mut raw = Vec::new();
    parse(&text, &mut raw)?;
    let mut entries = raw
        .iter()
        .map(|entry| {
            let target = resolve(entry)?;
            Ok(EpollEntry {
                fd: entry.fd,
                target,
                events: entry.events,
                data: entry.data,
            })
        })
        .collect::<Result<Vec<EpollEntry>, Error>>()?;
    entries.sort_unstable_by_key(EpollEntry::key);
    let busy_poll = epoll::busy_poll(fd)
        .during("read the busy polling of", SUBJECT)?
        .map(|raw| BusyPoll {
            duration_us: raw.microseconds,
            budget: raw.budget,
            prefer: raw.prefer != 0,
        })
        .unwrap_or_default();
    Ok(Epoll {
        flags,
        busy_poll,
        entries,
    })
}

/// Makes an empty instance. Its entries come by [`plan`], once every target exists.
pub fn restore(state: &Epoll) -> Result<OwnedFd, Error> {
    let fd = epoll::create().during("create", SUBJECT)?;
    descriptor::set_status_flags(fd.as_fd(), state.flags).during("set the flags of", SUBJECT)?;
    let busy = state.busy_poll;
    if busy != BusyPoll::default() {
        let raw = epoll::BusyPoll::new(busy.duration_us, busy.budget, u8::from(busy.prefer));
        epoll::set_busy_poll(fd.as_fd(), raw).during("set the busy polling of", SUBJECT)?;
    }
    Ok(fd)
}

/// One call that the process of the replica makes itself: an entry that a helper added would be
/// filed under the helper's number, and for a signalfd wait for the helper's signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `dup3(from, to, close_on_exec ? O_CLOEXEC : 0)`.
    Duplicate {
        from: Fd,
        to: Fd,
        close_on_exec: bool,
    },
    /// `epoll_ctl(epoll, EPOLL_CTL_ADD, fd, {events, data})`.
    Add {
        epoll: Fd,
        fd: Fd,
        events: u32,
        data: u64,
    },
    /// `epoll_wait(epoll, one event, timeout 0)`, the result thrown away; and if it was 0,
    /// `epoll_ctl(epoll, EPOLL_CTL_MOD, fd, {events, data})`. Disarms an `EPOLLONESHOT` entry by
    /// letting it fire; one that is not ready can only be narrowed to `EPOLLERR` and `EPOLLHUP`.
    Disarm {
        epoll: Fd,
        fd: Fd,
        events: u32,
        data: u64,
    },
    /// `close(fd)`.
    Close { fd: Fd },
}

/// The descriptors of one process.
pub type Slots = BTreeMap<Fd, Descriptor>;

/// The calls that give every epoll instance among `objects` its entries, in order, each with the
/// process that makes it. All descriptors of `tables` must be in place, and afterwards are again.
/// POSIX locks must be taken after it: closing a number releases them.
///
/// # Errors
/// [`Error::Refused`] for an entry whose target no process with the instance has open: only a
/// process that holds both could add it.
pub fn plan(
    objects: &BTreeMap<ObjectId, Object>,
    tables: &BTreeMap<Pid, &Slots>,
) -> Result<Vec<(Pid, Step)>, Error> {
    let mut steps = Vec::new();
    let mut epolls = objects
        .iter()
        .filter_map(|(id, object)| match object {
            Object::Epoll(state) => Some((id, state)),
            _ => None,
        })
        .peekable();
    if epolls.peek().is_none() {
        return Ok(steps);
    }
    let places = places(tables);
    for (id, state) in epolls {
        let instances = places.get(id).map(Vec::as_slice).unwrap_or_default();
        // Fired entries first: while they are the only ones, letting one fire takes no event from
        // another.
        let (fired, armed): (Vec<_>, Vec<_>) = state
            .entries
            .iter()
            .partition(|entry| has_fired(entry.events));
        for entry in fired.into_iter().chain(armed) {
            add_entry(instances, entry, &places, tables, &mut steps)?;
        }
    }
    Ok(steps)
}

type Places = BTreeMap<ObjectId, Vec<(Pid, Fd)>>;

fn places(tables: &BTreeMap<Pid, &Slots>) -> Places {
    let mut places = Places::new();
    for (pid, slots) in tables {
        for (fd, descriptor) in *slots {
            places
                .entry(descriptor.object)
                .or_default()
                .push((*pid, *fd));
        }
    }
    places
}

fn add_entry(
    instances: &[(Pid, Fd)],
    entry: &EpollEntry,
    places: &Places,
    tables: &BTreeMap<Pid, &Slots>,
    steps: &mut Vec<(Pid, Step)>,
) -> Result<(), Error> {
    let targets = places
        .get(&entry.target)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let both = instances.iter().flat_map(|(pid, epoll)| {
        let here = targets.iter().filter(move |(other, _)| other == pid);
        here.map(move |(_, fd)| (*pid, *epoll, *fd))
    });
    // The process in which the number still names the target needs no detour.
    let Some((pid, epoll, source)) = both.min_by_key(|(.., fd)| *fd != entry.fd) else {
        return Err(Error::refused(
            format!("epoll entry {} whose target has no descriptor", entry.fd),
            "only a process that has both the instance and the target open can add it",
        ));
    };
    let no_slots = Slots::new();
    let slots = tables.get(&pid).copied().unwrap_or(&no_slots);
    let occupant = slots.get(&entry.fd).copied();
    if source == entry.fd {
        add(pid, epoll, entry, steps);
        return Ok(());
    }
    let spare = Fd(slots
        .keys()
        .next_back()
        .map_or(0, |last| last.0 + 1)
        .max(entry.fd.0 + 1));
    if occupant.is_some() {
        steps.push((
            pid,
            Step::Duplicate {
                from: entry.fd,
                to: spare,
                close_on_exec: true,
            },
        ));
    }
    steps.push((
        pid,
        Step::Duplicate {
            from: source,
            to: entry.fd,
            close_on_exec: true,
        },
    ));
    // The instance itself may be what was moved aside.
    let reachable = if epoll == entry.fd { spare } else { epoll };
    add(pid, reachable, entry, steps);
    match occupant {
        Some(Descriptor { close_on_exec, .. }) => {
            steps.push((
                pid,
                Step::Duplicate {
                    from: spare,
                    to: entry.fd,
                    close_on_exec,
                },
            ));
            steps.push((pid, Step::Close { fd: spare }));
        }
        None => steps.push((pid, Step::Close { fd: entry.fd })),
    }
    Ok(())
}

fn add(pid: Pid, epoll: Fd, entry: &EpollEntry, steps: &mut Vec<(Pid, Step)>) {
    let EpollEntry {
        fd, events, data, ..
    } = *entry;
    if has_fired(events) {
        let wide = events | EPOLLIN | EPOLLOUT;
        steps.push((
            pid,
            Step::Add {
                epoll,
                fd,
                events: wide,
                data,
            },
        ));
        steps.push((
            pid,
            Step::Disarm {
                epoll,
                fd,
                events,
                data,
            },
        ));
    } else {
        steps.push((
            pid,
            Step::Add {
                epoll,
                fd,
                events,
                data,
            },
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_as_the_kernel_prints_them() {
        let text = b"pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t18\n\
            tfd:        3 events: 40000019 data:                3  pos:0 ino:1797e sdev:f\n\
            tfd:       12 events:       1d data: ffffffffffffffff  pos:-5 ino:12 sdev:10\n\
            tfd:        3 events: 40000000 data:                7  pos:0 ino:1 sdev:f\n";
        let mut entries = Vec::new();
        parse(text, &mut entries).expect("the text is the kernel's");
        let expected = [
            RawEntry {
                fd: Fd(3),
                events: 0x4000_0019,
                data: 3,
                inode: 0x1797e,
                nth: 0,
            },
            RawEntry {
                fd: Fd(12),
                events: 0x1d,
                data: u64::MAX,
                inode: 0x12,
                nth: 0,
            },
            RawEntry {
                fd: Fd(3),
                events: 0x4000_0000,
                data: 7,
                inode: 1,
                nth: 1,
            },
        ];
        assert_eq!(entries, expected);
        assert!(parse(b"tfd: x\n", &mut entries).is_err());
    }

    #[test]
    fn fired_is_told_from_armed() {
        assert!(has_fired(0x4000_0000));
        assert!(has_fired(0xc000_0000));
        assert!(!has_fired(0x4000_0019));
        assert!(may_fire(0x4000_0018));
        assert!(!may_fire(0x19));
        assert!(!may_fire(0x4000_0000));
    }

    fn slot(object: u64) -> Descriptor {
        Descriptor {
            object: ObjectId(object),
            close_on_exec: false,
        }
    }

    fn instance(entries: Vec<EpollEntry>) -> Epoll {
        Epoll {
            flags: 2,
            busy_poll: BusyPoll::default(),
            entries,
        }
    }

    fn entry(fd: i32, target: u64, events: u32) -> EpollEntry {
        EpollEntry {
            fd: Fd(fd),
            target: ObjectId(target),
            events,
            data: 9,
        }
    }

    #[test]
    fn an_entry_whose_number_names_another_object_is_added_by_a_detour() {
        let slots = Slots::from([(Fd(3), slot(1)), (Fd(4), slot(2)), (Fd(7), slot(3))]);
        let tables = BTreeMap::from([(Pid(1), &slots)]);
        let state = instance(vec![entry(4, 3, EPOLLIN)]);
        let steps = plan(&[(ObjectId(1), Object::Epoll(state))].into(), &tables)
            .expect("both are open in one process");
        let steps: Vec<Step> = steps.into_iter().map(|(_, step)| step).collect();
        let expected = [
            Step::Duplicate {
                from: Fd(4),
                to: Fd(8),
                close_on_exec: true,
            },
            Step::Duplicate {
                from: Fd(7),
                to: Fd(4),
                close_on_exec: true,
            },
            Step::Add {
                epoll: Fd(3),
                fd: Fd(4),
                events: EPOLLIN,
                data: 9,
            },
            Step::Duplicate {
                from: Fd(8),
                to: Fd(4),
                close_on_exec: false,
            },
            Step::Close { fd: Fd(8) },
        ];
        assert_eq!(steps, expected);
    }

    #[test]
    fn a_target_without_a_descriptor_is_refused() {
        let slots = Slots::from([(Fd(3), slot(1))]);
        let tables = BTreeMap::from([(Pid(1), &slots)]);
        let state = instance(vec![entry(4, 3, EPOLLIN)]);
        assert!(matches!(
            plan(&[(ObjectId(1), Object::Epoll(state))].into(), &tables),
            Err(Error::Refused { .. })
        ));
    }
}
