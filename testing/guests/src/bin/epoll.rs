//! Epoll sets: level, edge, one shot that has fired, exclusive, nested, an entry whose descriptor
//! number is closed while a duplicate lives, and a thread that waits in one.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, same};

const LEVEL: u64 = 0xffff_0000_1234_5678;
const EDGE: u64 = 2;
const ONCE: u64 = 3;
const EXCLUSIVE: u64 = 4;
const NESTED: u64 = 5;
const ORPHAN: u64 = 6;
const HUNG_UP: u64 = 7;

struct Sets {
    outer: Epoll,
    inner: Arc<Epoll>,
    level: EventFd,
    edge: EventFd,
    once: EventFd,
    exclusive: EventFd,
    in_inner: Arc<EventFd>,
    /// The same description as the number that was added and closed.
    duplicate: OwnedFd,
    _hung_up: OwnedFd,
    heard: Receiver<u64>,
}

impl Guest for Sets {
    fn set_up(_: &Place) -> Result<Self> {
        let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let inner = Arc::new(Epoll::new(EpollCreateFlags::empty())?);
        let (level, edge, once, exclusive) = (event()?, event()?, event()?, event()?);
        let (added, in_inner) = (event()?, Arc::new(event()?));
        let add =
            |set: &Epoll, fd: &EventFd, flags, data| set.add(fd, EpollEvent::new(flags, data));
        let read = EpollFlags::EPOLLIN;
        add(&outer, &level, read, LEVEL)?;
        add(&outer, &edge, read | EpollFlags::EPOLLET, EDGE)?;
        add(&outer, &once, read | EpollFlags::EPOLLONESHOT, ONCE)?;
        add(
            &outer,
            &exclusive,
            read | EpollFlags::EPOLLEXCLUSIVE,
            EXCLUSIVE,
        )?;
        add(&inner, &in_inner, read, 1)?;
        outer.add(&inner.0, EpollEvent::new(read, NESTED))?;
        add(&outer, &added, read, ORPHAN)?;
        let duplicate = nix::unistd::dup(&added)?;
        drop(added);
        // Its other end is closed, which no one may hear of again once it has fired.
        let (hung_up, writer) = nix::unistd::pipe()?;
        outer.add(
            &hung_up,
            EpollEvent::new(read | EpollFlags::EPOLLONESHOT, HUNG_UP),
        )?;
        drop(writer);
        once.write(1)?;
        let heard = listen(&inner);
        let sets = Self {
            outer,
            inner,
            level,
            edge,
            once,
            exclusive,
            in_inner,
            duplicate,
            _hung_up: hung_up,
            heard,
        };
        let fired = sets.ready()?;
        same(
            "one shots",
            fired.keys().copied().collect::<Vec<_>>(),
            vec![ONCE, HUNG_UP],
        )?;
        Ok(sets)
    }

    fn check(&mut self) -> Result<()> {
        let nothing: Vec<u64> = Vec::new();
        same(
            "ready at first",
            self.ready()?.into_keys().collect(),
            nothing.clone(),
        )?;
        for fired in [&self.level, &self.edge, &self.exclusive] {
            fired.write(1)?;
        }
        rustix::io::write(&self.duplicate, &1u64.to_ne_bytes())?;
        let ready: Vec<u64> = self.ready()?.into_keys().collect();
        same(
            "ready after writes",
            ready,
            vec![EDGE, EXCLUSIVE, ORPHAN, LEVEL],
        )?;
        let ready: Vec<u64> = self.ready()?.into_keys().collect();
        same("still ready", ready, vec![EXCLUSIVE, ORPHAN, LEVEL])?;
        for read in [&self.level, &self.edge, &self.exclusive] {
            read.read()?;
        }
        rustix::io::read(&self.duplicate, &mut [0; 8])?;
        same(
            "ready after reads",
            self.ready()?.into_keys().collect(),
            nothing.clone(),
        )?;
        self.once().context("one shot")?;
        // The thread in the inner set hears of it.
        self.in_inner.write(1)?;
        same(
            "what the thread heard",
            self.heard.recv_timeout(PATIENCE)?,
            1,
        )?;
        same("nested", self.ready()?.into_keys().collect(), vec![NESTED])?;
        self.in_inner.read()?;
        same(
            "ready at last",
            self.ready()?.into_keys().collect(),
            nothing,
        )?;
        self.heard = listen(&self.inner);
        Ok(())
    }
}

impl Sets {
    /// What is ready now, by its data.
    fn ready(&self) -> Result<BTreeMap<u64, EpollFlags>> {
        let mut events = [EpollEvent::empty(); 16];
        let count = self.outer.wait(&mut events, EpollTimeout::ZERO)?;
        Ok(events[..count]
            .iter()
            .map(|event| (event.data(), event.events()))
            .collect())
    }

    /// Armed again it fires once more, and only once.
    fn once(&self) -> Result<()> {
        let read = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
        self.outer
            .modify(&self.once, &mut EpollEvent::new(read, ONCE))?;
        let ready = self.ready()?;
        same(
            "ready",
            ready.get(&ONCE).copied(),
            Some(EpollFlags::EPOLLIN),
        )?;
        ensure!(self.ready()?.is_empty(), "it fired twice");
        Ok(())
    }
}

/// A thread in `epoll_wait` without a timeout.
fn listen(set: &Arc<Epoll>) -> Receiver<u64> {
    let (tell, told) = channel();
    let set = Arc::clone(set);
    std::thread::spawn(move || {
        let mut events = [EpollEvent::empty()];
        loop {
            match set.wait(&mut events, EpollTimeout::NONE) {
                Ok(1) => return tell.send(events[0].data()),
                Err(nix::errno::Errno::EINTR) => {}
                other => panic!("waiting in the inner set gave {other:?}"),
            }
        }
    });
    told
}

fn main() -> ExitCode {
    run::<Sets>()
}
