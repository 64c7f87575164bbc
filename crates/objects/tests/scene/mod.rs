//! A live process beside its mirror, which is verified after every update.
#![allow(dead_code)]

use crate::guest::Guest;
use unbroken_image::{Fd, ObjectId, Pid};
use unbroken_objects::table::{Announced, Announcement, Changes, Mirror};

pub fn mirror(guests: &[&Guest]) -> (Mirror, Changes) {
    let mut mirror = Mirror::new(&[], ObjectId(1)).expect("new mirror");
    let mut changes = Changes::default();
    let sources = guests.iter().map(|guest| guest.source()).collect();
    mirror.survey(sources, &mut changes).expect("survey");
    (mirror, changes)
}

pub struct Scene {
    pub guest: Guest,
    pub mirror: Mirror,
    pub changes: Changes,
    pub announced: Vec<Announcement>,
}

impl Scene {
    pub fn new() -> Scene {
        let guest = Guest::start();
        let (mirror, changes) = mirror(&[&guest]);
        Scene {
            guest,
            mirror,
            changes,
            announced: Vec::new(),
        }
    }

    pub fn tell(&mut self, what: Announced) {
        let pid = Pid(self.guest.pid);
        self.announced.push(Announcement {
            pid,
            thread: 1,
            what,
        });
    }

    pub fn create(&mut self, number: i64, arguments: &[&dyn std::fmt::Display]) -> i32 {
        self.tell(Announced::Created { count: 1 });
        self.guest.must(number, arguments) as i32
    }

    pub fn close(&mut self, fd: i32) {
        self.tell(Announced::Closing { fd: Fd(fd) });
        self.guest.call(libc::SYS_close, &[&fd]);
    }

    pub fn epoll(
        &mut self,
        epoll: i32,
        operation: i32,
        target: i32,
        events: i32,
        data: u64,
    ) -> i64 {
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
    pub fn epoch(&mut self) -> &Changes {
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

    pub fn object(&self, fd: i32) -> ObjectId {
        self.mirror
            .slot(Pid(self.guest.pid), Fd(fd))
            .expect("the slot is used")
            .object
    }
}
