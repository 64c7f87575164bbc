//! The mirror against a live process: updates by announcements must end where a survey does.

mod guest;

use guest::Guest;
use std::collections::BTreeMap;
use unbroken_image::object::Epoll;
use unbroken_image::{Fd, Object, ObjectId, Pid};
use unbroken_objects::Kind;
use unbroken_objects::table::{Announced, Announcement, Changes, Mirror};

fn mirror(guests: &[&Guest]) -> (Mirror, Changes) {
    let mut mirror = Mirror::new(&[], ObjectId(1)).expect("new mirror");
    let mut changes = Changes::default();
    let sources = guests.iter().map(|guest| guest.source()).collect();
    mirror.survey(sources, &mut changes).expect("survey");
    (mirror, changes)
}

struct Scene {
    guest: Guest,
    mirror: Mirror,
    changes: Changes,
    announced: Vec<Announcement>,
}

impl Scene {
    fn new() -> Scene {
        let guest = Guest::start();
        let (mirror, changes) = mirror(&[&guest]);
        Scene {
            guest,
            mirror,
            changes,
            announced: Vec::new(),
        }
    }

    fn tell(&mut self, what: Announced) {
        let pid = Pid(self.guest.pid);
        self.announced.push(Announcement {
            pid,
            thread: 1,
            what,
        });
    }

    fn create(&mut self, number: i64, arguments: &[&dyn std::fmt::Display]) -> i32 {
        self.tell(Announced::Created { count: 1 });
        self.guest.must(number, arguments) as i32
    }

    fn close(&mut self, fd: i32) {
        self.tell(Announced::Closing { fd: Fd(fd) });
        self.guest.call(libc::SYS_close, &[&fd]);
    }

    fn epoll(&mut self, epoll: i32, operation: i32, target: i32, events: i32, data: u64) -> i64 {
        let event = Some((events as u32, data));
        let (instance, fd) = (Fd(epoll), Fd(target));
        self.tell(Announced::Epoll {
            epoll: instance,
            operation,
            target: fd,
            event,
        });
        let event = format!("event:{}:{data}", events as u32);
        self.guest
            .call(libc::SYS_epoll_ctl, &[&epoll, &operation, &target, &event])
    }

    /// One epoch: update, and the mirror must agree with the kernel.
    fn epoch(&mut self) -> &Changes {
        self.changes.clear();
        self.mirror
            .update(&self.announced, &mut self.changes)
            .expect("update");
        let differences = self.mirror.verify().expect("verify");
        assert!(
            differences.is_empty(),
            "{differences:#?}\nafter {:?}",
            self.announced
        );
        self.announced.clear();
        &self.changes
    }

    fn object(&self, fd: i32) -> ObjectId {
        self.mirror
            .slot(Pid(self.guest.pid), Fd(fd))
            .expect("the slot is used")
            .object
    }
}

#[test]
fn duplicates_share_an_object_and_opened_twice_does_not() {
    let mut scene = Scene::new();
    let first = scene.create(libc::SYS_open, &[&"path:/etc/passwd", &0, &0]);
    let second = scene.create(libc::SYS_open, &[&"path:/etc/passwd", &0, &0]);
    scene.tell(Announced::CreatedFrom { minimum: Fd(0) });
    let copy = scene.guest.must(libc::SYS_dup, &[&first]) as i32;
    scene.epoch();
    assert_eq!(scene.object(first), scene.object(copy));
    assert_ne!(scene.object(first), scene.object(second));
}

#[test]
fn a_number_closed_and_used_again_is_a_new_object() {
    let mut scene = Scene::new();
    let fd = scene.create(libc::SYS_eventfd2, &[&0, &0]);
    scene.epoch();
    let before = scene.object(fd);
    scene.close(fd);
    let again = scene.create(libc::SYS_eventfd2, &[&0, &0]);
    assert_eq!(fd, again);
    let gone = scene.epoch().gone.clone();
    assert_eq!(gone, [before]);
    assert_ne!(scene.object(fd), before);
}

#[test]
fn a_socket_keeps_its_object_when_it_moves() {
    let mut scene = Scene::new();
    let fd = scene.create(libc::SYS_socket, &[&libc::AF_INET, &libc::SOCK_STREAM, &0]);
    scene.epoch();
    let before = scene.object(fd);
    scene.tell(Announced::Slot { fd: Fd(50) });
    scene.guest.must(libc::SYS_dup2, &[&fd, &50]);
    scene.close(fd);
    assert!(scene.epoch().gone.is_empty());
    assert_eq!(scene.object(50), before);
}

#[test]
fn flags_are_followed() {
    let mut scene = Scene::new();
    let fd = scene.create(libc::SYS_eventfd2, &[&0, &0]);
    scene.epoch();
    scene.tell(Announced::Object { fd: Fd(fd) });
    scene
        .guest
        .must(libc::SYS_fcntl, &[&fd, &libc::F_SETFD, &libc::FD_CLOEXEC]);
    let changes = scene.epoch();
    assert_eq!(changes.slots.len(), 1);
    assert!(
        changes.slots[0]
            .1
            .descriptor
            .is_some_and(|slot| slot.close_on_exec)
    );
    assert_eq!(changes.touched.len(), 1);
}

#[test]
fn descriptors_that_came_in_a_message_are_found_by_their_number() {
    let mut scene = Scene::new();
    scene.tell(Announced::Created { count: 2 });
    scene.guest.must(
        libc::SYS_socketpair,
        &[&libc::AF_UNIX, &libc::SOCK_STREAM, &0, &"pair"],
    );
    scene.epoch();
    // Nobody announces this one, as if recvmsg had brought it.
    scene.guest.must(libc::SYS_eventfd2, &[&0, &0]);
    assert_eq!(scene.epoch().appeared.len(), 1);
}

#[test]
fn epoll_follows_calls_closes_and_moves() {
    let mut scene = Scene::new();
    let epoll = scene.create(libc::SYS_epoll_create1, &[&0]);
    let first = scene.create(libc::SYS_eventfd2, &[&0, &0]);
    assert_eq!(
        scene.epoll(epoll, libc::EPOLL_CTL_ADD, first, libc::EPOLLIN, 1),
        0
    );
    scene.epoch();
    // The same number again while it is there, and one that is not.
    scene.epoll(epoll, libc::EPOLL_CTL_ADD, first, libc::EPOLLOUT, 2);
    scene.epoll(epoll, libc::EPOLL_CTL_MOD, 200, libc::EPOLLOUT, 2);
    scene.epoch();
    // Short-lived: created, added and closed within one epoch.
    for _ in 0..3 {
        let socket = scene.create(libc::SYS_socket, &[&libc::AF_INET, &libc::SOCK_STREAM, &0]);
        scene.epoll(epoll, libc::EPOLL_CTL_ADD, socket, libc::EPOLLIN, 3);
        scene.close(socket);
    }
    scene.epoch();
    // The target moves away; the entry stays under the old number.
    scene.tell(Announced::Slot { fd: Fd(60) });
    scene.guest.must(libc::SYS_dup2, &[&first, &60]);
    scene.close(first);
    scene.epoch();
    let id = scene.object(epoll);
    let Some(Object::Epoll(state)) = scene.mirror.state(id) else {
        panic!("an epoll instance")
    };
    assert_eq!(state.entries.len(), 1);
    assert_eq!(
        (state.entries[0].fd, state.entries[0].target),
        (Fd(first), scene.object(60))
    );
    // Another object under that number: two entries of one number.
    let second = scene.create(libc::SYS_eventfd2, &[&0, &0]);
    assert_eq!(second, first);
    scene.epoll(epoll, libc::EPOLL_CTL_ADD, second, libc::EPOLLIN, 4);
    scene.epoch();
    scene.close(60);
    scene.epoch();
    let Some(Object::Epoll(state)) = scene.mirror.state(id) else {
        panic!("an epoll instance")
    };
    assert_eq!(state.entries.len(), 1);
    assert_eq!(state.entries[0].data, 4);
}

#[test]
fn a_one_shot_that_fires_in_the_epoch_of_its_call_is_seen() {
    let mut scene = Scene::new();
    let epoll = scene.create(libc::SYS_epoll_create1, &[&0]);
    let event = scene.create(libc::SYS_eventfd2, &[&0, &0]);
    // Something is there to read, so that it fires at the first wait.
    let ready = scene.create(libc::SYS_eventfd2, &[&1, &0]);
    scene.epoch();
    let events = libc::EPOLLIN | libc::EPOLLONESHOT;
    for operation in [libc::EPOLL_CTL_ADD, libc::EPOLL_CTL_MOD] {
        scene.epoll(epoll, operation, ready, events, 7);
        let fired = scene
            .guest
            .must(libc::SYS_epoll_wait, &[&epoll, &"bytes:64", &4, &0]);
        assert_eq!(fired, 1);
        // The scene compares with the kernel.
        scene.epoch();
    }
    scene.epoll(epoll, libc::EPOLL_CTL_ADD, event, events, 8);
    scene.epoch();
}

#[test]
fn a_fired_oneshot_entry_is_found_without_an_announcement() {
    let mut scene = Scene::new();
    let epoll = scene.create(libc::SYS_epoll_create1, &[&0]);
    let ready = scene.create(libc::SYS_eventfd2, &[&1, &0]);
    let events = libc::EPOLLIN | libc::EPOLLONESHOT;
    scene.epoll(epoll, libc::EPOLL_CTL_ADD, ready, events, 1);
    scene.epoch();
    let id = scene.object(epoll);
    assert!(scene.mirror.volatile().any(|(volatile, _)| volatile == id));
    assert!(scene.mirror.look(id).expect("look").is_none());
    let count = scene
        .guest
        .must(libc::SYS_epoll_wait, &[&epoll, &"bytes:120", &10, &0]);
    assert_eq!(count, 1);
    let Some(Object::Epoll(state)) = scene.mirror.look(id).expect("look") else {
        panic!("the entry fired")
    };
    assert_eq!(state.entries[0].events, libc::EPOLLONESHOT as u32);
    assert!(!scene.mirror.volatile().any(|(volatile, _)| volatile == id));
}

#[test]
fn a_fork_shares_every_object() {
    let mut scene = Scene::new();
    let epoll = scene.create(libc::SYS_epoll_create1, &[&0]);
    let target = scene.create(libc::SYS_eventfd2, &[&0, &0]);
    scene.epoll(epoll, libc::EPOLL_CTL_ADD, target, libc::EPOLLIN, 1);
    scene.epoch();
    let mut child = scene.guest.fork();
    scene.mirror.attach(child.source()).expect("attach");
    let pid = Pid(child.pid);
    scene.announced.push(Announcement {
        pid,
        thread: 2,
        what: Announced::Everything,
    });
    scene.epoch();
    for fd in [epoll, target] {
        let shared = scene.mirror.slot(pid, Fd(fd)).expect("inherited").object;
        assert_eq!(shared, scene.object(fd));
    }
    // Closed in one process the target lives on in the other, and so does its entry.
    scene.close(target);
    scene.epoch();
    let Some(Object::Epoll(state)) = scene.mirror.state(scene.object(epoll)) else {
        panic!("an epoll instance")
    };
    assert_eq!(state.entries.len(), 1);
    child.must(libc::SYS_close, &[&target]);
    let what = Announced::Closing { fd: Fd(target) };
    scene.announced.push(Announcement {
        pid,
        thread: 2,
        what,
    });
    scene.epoch();
    assert_eq!(scene.changes.gone.len(), 1);
    let Some(Object::Epoll(state)) = scene.mirror.state(scene.object(epoll)) else {
        panic!("an epoll instance")
    };
    assert!(state.entries.is_empty());
    scene.changes.clear();
    scene.mirror.detach(pid, &mut scene.changes);
    assert_eq!(scene.mirror.tables().len(), 1);
}

#[test]
fn an_outside_process_at_the_other_end_of_a_pipe_is_refused() {
    let mut scene = Scene::new();
    // The guest's standard input comes from this test.
    let error = scene
        .mirror
        .capture(scene.object(0))
        .expect_err("the other end is ours");
    assert!(error.to_string().contains("outside the service"), "{error}");
    scene.tell(Announced::Created { count: 2 });
    scene.guest.must(libc::SYS_pipe2, &[&"pair", &0]);
    scene.epoch();
    for id in scene.changes.appeared.clone() {
        assert!(scene.mirror.capture(id).expect("capture").is_some());
    }
    // With the write end closed, the read end has nobody outside either.
    let read = scene.changes.slots[0].1.fd.0;
    scene.close(read + 1);
    scene.epoch();
    scene.mirror.capture(scene.object(read)).expect("capture");
}

#[test]
fn standard_output_is_known_by_its_inode() {
    let guest = Guest::start();
    let link = std::fs::read_link(format!("/proc/{}/fd/1", guest.pid)).expect("read the link");
    let text = link.to_str().expect("UTF-8");
    let inode = text
        .trim_start_matches("pipe:[")
        .trim_end_matches(']')
        .parse()
        .expect("an inode");
    let mut mirror = Mirror::new(&[(inode, 1)], ObjectId(1)).expect("new mirror");
    mirror
        .survey(vec![guest.source()], &mut Changes::default())
        .expect("survey");
    let id = mirror.slot(Pid(guest.pid), Fd(1)).expect("open").object;
    let state = mirror.capture(id).expect("capture");
    assert!(
        matches!(state, Some(Object::Output { stream: 1, .. })),
        "{state:?}"
    );
}

/// A small generator of its own (xorshift), so that a seed names a run for good.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// One random call, told and made. Numbers up to 40: many calls fail, as announced ones may.
fn random_step(scene: &mut Scene, random: &mut Random) {
    let any = |random: &mut Random| 3 + random.below(38) as i32;
    match random.below(20) {
        0 => drop(scene.create(libc::SYS_open, &[&"path:/etc/passwd", &0, &0])),
        1 => drop(scene.create(libc::SYS_eventfd2, &[&random.below(3), &libc::O_CLOEXEC])),
        2 => drop(scene.create(libc::SYS_epoll_create1, &[&0])),
        3 => drop(scene.create(libc::SYS_timerfd_create, &[&1, &0])),
        4 => drop(scene.create(libc::SYS_socket, &[&libc::AF_INET, &libc::SOCK_STREAM, &0])),
        5 => {
            scene.tell(Announced::Created { count: 2 });
            scene
                .guest
                .must(libc::SYS_pipe2, &[&"pair", &libc::O_NONBLOCK]);
        }
        6 => {
            scene.tell(Announced::CreatedFrom { minimum: Fd(0) });
            scene.guest.call(libc::SYS_dup, &[&any(random)]);
        }
        7 => {
            let minimum = any(random);
            scene.tell(Announced::CreatedFrom {
                minimum: Fd(minimum),
            });
            scene
                .guest
                .call(libc::SYS_fcntl, &[&any(random), &libc::F_DUPFD, &minimum]);
        }
        8 | 9 => {
            let (from, to) = (any(random), any(random));
            scene.tell(Announced::Slot { fd: Fd(to) });
            scene.guest.call(libc::SYS_dup2, &[&from, &to]);
        }
        10..=12 => scene.close(any(random)),
        13 if random.below(4) == 0 => {
            let (first, close_on_exec) = (any(random), random.below(2) == 0);
            let last = first + random.below(6) as i32;
            let (low, high) = (Fd(first), Fd(last));
            scene.tell(Announced::CloseRange {
                first: low,
                last: high,
                close_on_exec,
            });
            let flags = if close_on_exec {
                libc::CLOSE_RANGE_CLOEXEC
            } else {
                0
            };
            scene
                .guest
                .must(libc::SYS_close_range, &[&first, &last, &flags]);
        }
        14 => {
            let fd = any(random);
            scene.tell(Announced::Object { fd: Fd(fd) });
            scene
                .guest
                .call(libc::SYS_fcntl, &[&fd, &libc::F_SETFD, &random.below(2)]);
        }
        15 => {
            // Far off: none expires between two looks that are compared.
            let deadline_ns = (1 << 44) + random.below(1 << 40);
            let (fd, timer) = (any(random), format!("timer:{deadline_ns}:0"));
            scene.tell(Announced::Object { fd: Fd(fd) });
            scene
                .guest
                .call(libc::SYS_timerfd_settime, &[&fd, &0, &timer, &0]);
        }
        16 | 17 => {
            // Not announced: what is volatile changes by calls that nobody tells of.
            let fd = any(random);
            let slot = scene.mirror.slot(Pid(scene.guest.pid), Fd(fd));
            let kind = slot.and_then(|slot| scene.mirror.kind(slot.object));
            let guest = &mut scene.guest;
            match kind {
                Some(Kind::RegularFile) => {
                    guest.call(libc::SYS_lseek, &[&fd, &random.below(100), &0]);
                }
                Some(Kind::EventCounter) => {
                    guest.call(libc::SYS_write, &[&fd, &"event:1:0", &8]);
                }
                // One of the two fails, by which end it is.
                Some(Kind::Pipe) => {
                    guest.call(libc::SYS_write, &[&fd, &"path:content", &random.below(8)]);
                    guest.call(libc::SYS_read, &[&fd, &"bytes:4", &random.below(4)]);
                }
                _ => {}
            }
        }
        _ => {
            let epolls: Vec<ObjectId> = scene
                .mirror
                .objects()
                .filter_map(|(id, kind)| (kind == Kind::Epoll).then_some(id))
                .collect();
            if epolls.is_empty() {
                return;
            }
            let wanted = epolls[random.below(epolls.len() as u64) as usize];
            let tables = scene.mirror.tables();
            let epoll = tables
                .values()
                .flatten()
                .find(|(_, slot)| slot.object == wanted);
            let operation = [
                libc::EPOLL_CTL_ADD,
                libc::EPOLL_CTL_MOD,
                libc::EPOLL_CTL_DEL,
            ];
            let operation = operation[random.below(3) as usize % 3];
            let events = [libc::EPOLLIN, libc::EPOLLOUT, libc::EPOLLIN | libc::EPOLLET];
            if let Some((fd, _)) = epoll {
                let events = events[random.below(3) as usize];
                scene.epoll(fd.0, operation, any(random), events, random.below(1000));
            }
        }
    }
}

type Place = (Pid, Fd);

/// The states of all slots, with objects named by the first slot that has them: what two mirrors
/// that number objects differently must agree on. Deadlines are left out, they are reckoned.
fn shape(mirror: &mut Mirror) -> BTreeMap<Place, (Option<Object>, Place, bool)> {
    let tables = mirror.tables();
    let places = || {
        tables
            .iter()
            .flat_map(|(pid, slots)| slots.iter().map(|(fd, slot)| ((*pid, *fd), *slot)))
    };
    let first = |id: ObjectId| {
        places()
            .find(|(_, slot)| slot.object == id)
            .map(|(place, _)| place)
    };
    places()
        .map(|(place, slot)| {
            let mut state = mirror.state(slot.object).cloned();
            match &mut state {
                Some(Object::Epoll(epoll)) => {
                    for entry in &mut epoll.entries {
                        let name = first(entry.target).expect("a target has a slot");
                        entry.target = ObjectId(name.1.0 as u64);
                    }
                    epoll.entries.sort_by_key(|entry| (entry.fd, entry.target));
                }
                Some(Object::TimerDescriptor(timer)) => {
                    timer.expiry_ns = u64::from(timer.expiry_ns != 0);
                }
                _ => {}
            }
            (
                place,
                (
                    state,
                    first(slot.object).expect("it has one"),
                    slot.close_on_exec,
                ),
            )
        })
        .collect()
}

/// The epoll instances as whoever was told of every change has them.
type Told = BTreeMap<ObjectId, Epoll>;

fn tell_whole(scene: &Scene, id: ObjectId, told: &mut Told) {
    if let Some(Object::Epoll(epoll)) = scene.mirror.state(id) {
        told.insert(id, epoll.clone());
    }
}

/// Captures as the node does: what appeared or was touched whole, what is volatile by a look.
fn capture_changed(scene: &mut Scene, told: &mut Told) {
    let fresh: Vec<ObjectId> = scene
        .changes
        .appeared
        .iter()
        .chain(&scene.changes.touched)
        .copied()
        .collect();
    let sockets = |mirror: &Mirror, id| mirror.kind(id).is_none_or(Kind::is_socket);
    for id in fresh {
        if !sockets(&scene.mirror, id) && !is_outer(scene, id) {
            scene.mirror.capture(id).expect("capture");
            tell_whole(scene, id, told);
        }
    }
    for change in &scene.changes.interests {
        told.get_mut(&change.instance)
            .expect("it appeared once")
            .apply(change);
    }
    let volatile: Vec<ObjectId> = scene.mirror.volatile().map(|(id, _)| id).collect();
    for id in volatile {
        if !sockets(&scene.mirror, id) && !is_outer(scene, id) {
            let changed = scene.mirror.look(id).expect("look").is_some();
            if changed {
                tell_whole(scene, id, told);
            }
        }
    }
    for id in &scene.changes.gone {
        told.remove(id);
    }
    for (id, epoll) in told {
        assert_eq!(
            scene.mirror.state(*id),
            Some(&Object::Epoll(epoll.clone())),
            "what was told of {id}"
        );
    }
}

/// The pipes to the test itself, which are refused.
fn is_outer(scene: &Scene, id: ObjectId) -> bool {
    (0..2).any(|fd| scene.object(fd) == id)
}

#[test]
fn random_calls_leave_the_mirror_where_a_survey_is() {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(0x5eed_0001);
    println!("SEED={seed}");
    let mut random = Random(seed);
    let mut scene = Scene::new();
    let mut told = Told::new();
    capture_changed(&mut scene, &mut told);
    let mut steps = 0;
    while steps < 1000 {
        let batch = 1 + random.below(12);
        for _ in 0..batch {
            random_step(&mut scene, &mut random);
        }
        steps += batch;
        scene.epoch();
        capture_changed(&mut scene, &mut told);
        if random.below(10) == 0 {
            let (fresh, changes) = mirror(&[&scene.guest]);
            let mut other = Scene {
                guest: Guest::start(),
                mirror: fresh,
                changes,
                announced: Vec::new(),
            };
            std::mem::swap(&mut other.guest, &mut scene.guest);
            capture_changed(&mut other, &mut Told::new());
            std::mem::swap(&mut other.guest, &mut scene.guest);
            assert_eq!(shape(&mut scene.mirror), shape(&mut other.mirror));
        }
    }
}
