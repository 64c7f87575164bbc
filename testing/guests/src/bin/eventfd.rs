//! Eventfds: count, semaphore mode, a full counter, and a thread that waits for one.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, refused, same};

struct Events {
    count: EventFd,
    semaphore: EventFd,
    full: EventFd,
    waited_for: Arc<EventFd>,
    heard: Receiver<u64>,
    expected: u64,
}

impl Guest for Events {
    fn set_up(_: &Place) -> Result<Self> {
        let nonblocking = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let waited_for = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let events = Self {
            count: EventFd::from_value_and_flags(3, nonblocking)?,
            semaphore: EventFd::from_flags(nonblocking | EfdFlags::EFD_SEMAPHORE)?,
            full: EventFd::from_flags(nonblocking)?,
            heard: listen(&waited_for),
            waited_for,
            expected: 4_000_000_003,
        };
        events.count.write(4_000_000_000)?;
        events.arm()?;
        Ok(events)
    }

    fn check(&mut self) -> Result<()> {
        same("count", self.count.read()?, self.expected)?;
        refused("a second read", self.count.read(), libc::EAGAIN)?;
        self.expected += 11;
        self.count.write(self.expected)?;
        for _ in 0..3 {
            same("semaphore", self.semaphore.read()?, 1)?;
        }
        refused("a fourth taking", self.semaphore.read(), libc::EAGAIN)?;
        let mut polled = [PollFd::new(
            self.full.as_fd(),
            PollFlags::POLLIN | PollFlags::POLLOUT,
        )];
        poll(&mut polled, PollTimeout::ZERO)?;
        same(
            "readiness when full",
            polled[0].revents(),
            Some(PollFlags::POLLIN),
        )?;
        refused(
            "one more on a full counter",
            self.full.write(1),
            libc::EAGAIN,
        )?;
        same("the full counter", self.full.read()?, u64::MAX - 1)?;
        self.waited_for.write(5)?;
        same(
            "what the thread heard",
            self.heard.recv_timeout(PATIENCE)?,
            5,
        )?;
        self.heard = listen(&self.waited_for);
        self.arm()
    }
}

impl Events {
    fn arm(&self) -> Result<()> {
        self.semaphore.write(3)?;
        self.full.write(u64::MAX - 1)?;
        Ok(())
    }
}

fn listen(event: &Arc<EventFd>) -> Receiver<u64> {
    let (tell, told) = channel();
    let event = Arc::clone(event);
    std::thread::spawn(move || tell.send(event.read().unwrap_or(u64::MAX)));
    told
}

fn main() -> ExitCode {
    run::<Events>()
}
