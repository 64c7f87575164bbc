//! The mirror against a live process: updates by announcements must end where a survey does.

mod guest;
mod scene;

use guest::Guest;
use scene::Scene;
use unbroken_image::{Fd, Object, ObjectId, Pid};
use unbroken_objects::table::{Announced, Announcement, Changes, Mirror};
use unbroken_objects::tcp::Known;

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
    assert!(
        scene
            .mirror
            .look(id, &Known::NOTHING)
            .expect("look")
            .is_none()
    );
    let count = scene
        .guest
        .must(libc::SYS_epoll_wait, &[&epoll, &"bytes:120", &10, &0]);
    assert_eq!(count, 1);
    let Some(Object::Epoll(state)) = scene.mirror.look(id, &Known::NOTHING).expect("look") else {
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
        .capture(scene.object(0), &Known::NOTHING)
        .expect_err("the other end is ours");
    assert!(error.to_string().contains("outside the service"), "{error}");
    scene.tell(Announced::Created { count: 2 });
    scene.guest.must(libc::SYS_pipe2, &[&"pair", &0]);
    scene.epoch();
    for id in scene.changes.appeared.clone() {
        assert!(
            scene
                .mirror
                .capture(id, &Known::NOTHING)
                .expect("capture")
                .is_some()
        );
    }
    // With the write end closed, the read end has nobody outside either.
    let read = scene.changes.slots[0].1.fd.0;
    scene.close(read + 1);
    scene.epoch();
    scene
        .mirror
        .capture(scene.object(read), &Known::NOTHING)
        .expect("capture");
}

#[test]
fn an_outside_process_at_the_other_end_of_a_unix_connection_is_refused() {
    let mut scene = Scene::new();
    scene.tell(Announced::Created { count: 2 });
    let arguments: [&dyn std::fmt::Display; 4] = [&libc::AF_UNIX, &libc::SOCK_STREAM, &0, &"pair"];
    scene.guest.must(libc::SYS_socketpair, &arguments);
    scene.epoch();
    let slots = scene.changes.slots.iter();
    let [one, other] = slots.map(|(_, slot)| slot.fd.0).collect::<Vec<_>>()[..] else {
        panic!("a pair has two ends");
    };
    for fd in [one, other] {
        let captured = scene.mirror.capture(scene.object(fd), &Known::NOTHING);
        assert!(captured.expect("both ends are inside").is_some());
    }
    let outside = scene
        .guest
        .source()
        .duplicate(Fd(other))
        .expect("duplicate");
    scene.close(other);
    scene.epoch();
    let captured = scene.mirror.capture(scene.object(one), &Known::NOTHING);
    let error = captured.expect_err("the other end is ours");
    assert!(error.to_string().contains("outside the service"), "{error}");
    drop(outside);
    let captured = scene.mirror.capture(scene.object(one), &Known::NOTHING);
    assert!(captured.expect("nobody has the other end").is_some());
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
    let state = mirror.capture(id, &Known::NOTHING).expect("capture");
    assert!(
        matches!(state, Some(Object::Output { stream: 1, .. })),
        "{state:?}"
    );
}
