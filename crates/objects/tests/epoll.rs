//! epoll instances: captured from one process, made again in another by the planned calls.

mod guest;

use guest::Guest;
use std::collections::BTreeMap;
use unbroken_image::object::{Epoll, EpollEntry};
use unbroken_image::{Fd, Object, ObjectId, Pid};
use unbroken_objects::epoll::{Step, plan};
use unbroken_objects::table::{Changes, Mirror};
use unbroken_objects::tcp::Known;

const EPOLL_CTL_ADD: i32 = libc::EPOLL_CTL_ADD;

/// What a guest's epoll instances hold, with targets named by the lowest slot that has them.
fn survey(guest: &Guest) -> (Mirror, BTreeMap<Fd, Epoll>) {
    let mut mirror = Mirror::new(&[], ObjectId(1)).expect("new mirror");
    mirror
        .survey(vec![guest.source()], &mut Changes::default())
        .expect("survey");
    let table = mirror
        .tables()
        .remove(&Pid(guest.pid))
        .expect("one process");
    let lowest = |id| {
        table
            .iter()
            .find(|(_, slot)| slot.object == id)
            .map_or(Fd(-1), |(fd, _)| *fd)
    };
    let mut shapes = BTreeMap::new();
    for (fd, slot) in &table {
        let Some(Object::Epoll(state)) = mirror.state(slot.object) else {
            continue;
        };
        if lowest(slot.object) != *fd {
            continue;
        }
        let mut state = state.clone();
        for entry in &mut state.entries {
            entry.target = ObjectId(lowest(entry.target).0 as u64);
        }
        state
            .entries
            .sort_by_key(|entry: &EpollEntry| (entry.fd, entry.target));
        shapes.insert(*fd, state);
    }
    (mirror, shapes)
}

fn add(guest: &mut Guest, epoll: i32, fd: i32, events: i32, data: u64) {
    let event = format!("event:{}:{data}", events as u32);
    guest.must(libc::SYS_epoll_ctl, &[&epoll, &EPOLL_CTL_ADD, &fd, &event]);
}

/// How many entries report something now.
fn ready(guest: &mut Guest, epoll: i32) -> i64 {
    guest.must(libc::SYS_epoll_wait, &[&epoll, &"bytes:1200", &100, &0])
}

/// Makes the objects of `original` in a new guest, at the same slots, without any entry.
fn furnish(mirror: &mut Mirror, original: &Guest) -> Guest {
    const STAGING: i32 = 200;
    let mut copy = Guest::start();
    let table = mirror
        .tables()
        .remove(&Pid(original.pid))
        .expect("one process");
    let mut staged: BTreeMap<ObjectId, i32> = BTreeMap::new();
    for (_, slot) in table.range(Fd(3)..) {
        if staged.contains_key(&slot.object) {
            continue;
        }
        let made = match mirror
            .capture(slot.object, &Known::NOTHING)
            .expect("capture")
        {
            Some(Object::Epoll(_)) => copy.must(libc::SYS_epoll_create1, &[&0]),
            Some(Object::EventCounter(state)) => copy.must(libc::SYS_eventfd2, &[&state.count, &0]),
            Some(Object::SignalDescriptor(state)) => {
                // A mask of the lower signals: the rest of this buffer is 0.
                copy.must(
                    libc::SYS_signalfd4,
                    &[&-1, &format!("event:{}:0", state.mask), &8, &0],
                )
            }
            other => panic!("no guest of this test holds {other:?}"),
        };
        let place = STAGING + staged.len() as i32;
        copy.must(libc::SYS_dup2, &[&made, &place]);
        copy.must(libc::SYS_close, &[&made]);
        staged.insert(slot.object, place);
    }
    for (fd, slot) in table.range(Fd(3)..) {
        copy.must(libc::SYS_dup2, &[&staged[&slot.object], &fd]);
    }
    for place in staged.values() {
        copy.must(libc::SYS_close, &[place]);
    }
    copy
}

fn make(copy: &mut Guest, step: Step) {
    match step {
        Step::Duplicate {
            from,
            to,
            close_on_exec,
        } => {
            let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
            copy.must(libc::SYS_dup3, &[&from, &to, &flags]);
        }
        Step::Add {
            epoll,
            fd,
            events,
            data,
        } => add(copy, epoll.0, fd.0, events as i32, data),
        Step::Disarm {
            epoll,
            fd,
            events,
            data,
        } => {
            let count = copy.must(libc::SYS_epoll_wait, &[&epoll, &"bytes:12", &1, &0]);
            if count == 0 {
                let event = format!("event:{events}:{data}");
                copy.must(
                    libc::SYS_epoll_ctl,
                    &[&epoll, &libc::EPOLL_CTL_MOD, &fd, &event],
                );
            }
        }
        Step::Close { fd } => drop(copy.must(libc::SYS_close, &[&fd])),
    }
}

/// A second process with the same descriptors and entries, which must look the same.
fn restore(original: &Guest) -> Guest {
    let (mut mirror, shapes) = survey(original);
    let mut copy = furnish(&mut mirror, original);
    let tables = mirror.tables();
    let slots = tables.iter().map(|(pid, slots)| (*pid, slots)).collect();
    let named = tables.values().flatten().map(|(_, slot)| slot.object);
    let objects = named.filter_map(|id| Some((id, mirror.state(id)?.clone())));
    let objects = objects.collect();
    let before = copy_slots(&copy);
    for (_, step) in plan(&objects, &slots).expect("plan") {
        make(&mut copy, step);
    }
    assert_eq!(
        copy_slots(&copy),
        before,
        "the plan leaves the slots as they were"
    );
    assert_eq!(survey(&copy).1, shapes);
    copy
}

fn copy_slots(guest: &Guest) -> Vec<Fd> {
    let (mirror, _) = survey(guest);
    mirror
        .tables()
        .remove(&Pid(guest.pid))
        .expect("one process")
        .into_keys()
        .collect()
}

#[test]
fn entries_of_every_sort_come_back_and_report_the_same() {
    let mut original = Guest::start();
    let epoll = original.must(libc::SYS_epoll_create1, &[&0]) as i32;
    let outer = original.must(libc::SYS_epoll_create1, &[&0]) as i32;
    let quiet = original.must(libc::SYS_eventfd2, &[&0, &0]) as i32;
    let loud = original.must(libc::SYS_eventfd2, &[&1, &0]) as i32;
    let third = original.must(libc::SYS_eventfd2, &[&0, &0]) as i32;
    add(&mut original, epoll, quiet, libc::EPOLLIN, 11);
    add(
        &mut original,
        epoll,
        loud,
        libc::EPOLLIN | libc::EPOLLET,
        u64::MAX,
    );
    add(
        &mut original,
        epoll,
        third,
        libc::EPOLLIN | libc::EPOLLEXCLUSIVE,
        13,
    );
    add(&mut original, outer, epoll, libc::EPOLLIN, 14);
    let mut copy = restore(&original);
    assert_eq!(
        ready(&mut copy, outer),
        1,
        "nesting reports the inner instance"
    );
    assert_eq!(ready(&mut copy, epoll), 1);
    assert_eq!(ready(&mut copy, epoll), 0, "the edge is reported once");
    // The entries answer to the service's own numbers.
    copy.must(
        libc::SYS_epoll_ctl,
        &[&epoll, &libc::EPOLL_CTL_DEL, &quiet, &0],
    );
    copy.must(
        libc::SYS_epoll_ctl,
        &[&epoll, &libc::EPOLL_CTL_DEL, &third, &0],
    );
}

#[test]
fn a_fired_oneshot_entry_stays_silent_until_it_is_armed() {
    let mut original = Guest::start();
    let epoll = original.must(libc::SYS_epoll_create1, &[&0]) as i32;
    let loud = original.must(libc::SYS_eventfd2, &[&1, &0]) as i32;
    let armed = original.must(libc::SYS_eventfd2, &[&0, &0]) as i32;
    add(
        &mut original,
        epoll,
        loud,
        libc::EPOLLIN | libc::EPOLLONESHOT,
        1,
    );
    assert_eq!(ready(&mut original, epoll), 1);
    add(
        &mut original,
        epoll,
        armed,
        libc::EPOLLIN | libc::EPOLLONESHOT,
        2,
    );
    let mut copy = restore(&original);
    assert_eq!(ready(&mut copy, epoll), 0);
    let event = format!("event:{}:7", (libc::EPOLLIN | libc::EPOLLONESHOT) as u32);
    copy.must(
        libc::SYS_epoll_ctl,
        &[&epoll, &libc::EPOLL_CTL_MOD, &loud, &event],
    );
    assert_eq!(ready(&mut copy, epoll), 1);
}

#[test]
fn entries_under_numbers_that_name_something_else_come_back() {
    let mut original = Guest::start();
    let epoll = original.must(libc::SYS_epoll_create1, &[&0]) as i32;
    let first = original.must(libc::SYS_eventfd2, &[&1, &0]) as i32;
    add(&mut original, epoll, first, libc::EPOLLIN, 21);
    original.must(libc::SYS_dup2, &[&first, &50]);
    original.must(libc::SYS_close, &[&first]);
    // The number is free now.
    drop(restore(&original));
    // And now it names another eventfd, added under the same number.
    let second = original.must(libc::SYS_eventfd2, &[&1, &0]) as i32;
    assert_eq!(second, first);
    add(&mut original, epoll, second, libc::EPOLLIN, 22);
    let mut copy = restore(&original);
    assert_eq!(ready(&mut copy, epoll), 2);
    // The instance itself moved to where a target was.
    original.must(libc::SYS_dup2, &[&second, &51]);
    original.must(libc::SYS_dup2, &[&epoll, &second]);
    original.must(libc::SYS_close, &[&epoll]);
    let mut copy = restore(&original);
    assert_eq!(ready(&mut copy, second), 2);
}

#[test]
fn a_signalfd_in_an_instance_reports_the_signals_of_the_replica() {
    let mut original = Guest::start();
    let epoll = original.must(libc::SYS_epoll_create1, &[&0]) as i32;
    let mask: u64 = 1 << (libc::SIGUSR1 - 1);
    // The first 8 bytes of this buffer are the mask and the start of the data, which is 0.
    let set = format!("event:{mask}:0");
    let signals = original.must(libc::SYS_signalfd4, &[&-1, &set, &8, &0]) as i32;
    add(&mut original, epoll, signals, libc::EPOLLIN, 5);
    let mut copy = restore(&original);
    let how = libc::SIG_BLOCK;
    copy.must(libc::SYS_rt_sigprocmask, &[&how, &set, &0, &8]);
    assert_eq!(ready(&mut copy, epoll), 0);
    let pid = copy.pid;
    copy.must(libc::SYS_kill, &[&pid, &libc::SIGUSR1]);
    assert_eq!(ready(&mut copy, epoll), 1);
}
