//! Random calls of a live process: the mirror that follows them must end where a survey is.

mod guest;
mod scene;

use guest::Guest;
use scene::{Scene, mirror};
use std::collections::{BTreeMap, BTreeSet};
use unbroken_image::object::Epoll;
use unbroken_image::{Fd, Object, ObjectId, Pid};
use unbroken_objects::Kind;
use unbroken_objects::table::{Announced, Mirror};
use unbroken_objects::tcp::Known;

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
            let tables = scene.mirror.tables();
            let named = tables.values().flatten().map(|(_, slot)| slot.object);
            let named: BTreeSet<ObjectId> = named.collect();
            let is_epoll = |id: &ObjectId| scene.mirror.kind(*id) == Some(Kind::Epoll);
            let epolls: Vec<ObjectId> = named.into_iter().filter(is_epoll).collect();
            if epolls.is_empty() {
                return;
            }
            let wanted = epolls[random.below(epolls.len() as u64) as usize];
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
    for id in fresh {
        if !is_outer(scene, id) {
            let captured = scene.mirror.capture(id, &Known::NOTHING);
            captured.expect("capture");
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
        if !is_outer(scene, id) {
            let state = scene.mirror.look(id, &Known::NOTHING).expect("look");
            if state.is_some() {
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
