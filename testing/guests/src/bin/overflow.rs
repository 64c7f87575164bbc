//! Tens of thousands of announced calls between two answers, and among them changes of every kind:
//! memory given back, mapped again and moved, numbers that come to name something else, options,
//! entries of an epoll instance, actions, timers, limits. Whoever keeps a list of the calls has none.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{Mode, umask};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use unbroken_guests::area::{Area, Break, PAGE};
use unbroken_guests::timer::{Itimer, itimer, set_itimer};
use unbroken_guests::{Guest, Place, main as run, pattern, raw, same, same_bytes, signals};

/// Pages, each with a fate of its own.
const PAGES: usize = 64;
const GIVEN_BACK: usize = 8;
const RENEWED: usize = 16;
const CLOSED_OFF: usize = 24;
const HEAP_PAGES: usize = 16;
/// With those on both sides of the changes more than any list holds.
const CALLS: usize = 9000;
const FAR_US: u64 = 1 << 40;

struct Overflow {
    round: u64,
    directory: PathBuf,
    area: Area,
    moved: Area,
    heap: usize,
    /// Keeps its number and changes its description.
    number: RawFd,
    kept: File,
    near: OwnedFd,
    far: OwnedFd,
    epoll: Epoll,
    watched: EventFd,
    timer: TimerFd,
}

impl Guest for Overflow {
    fn set_up(place: &Place) -> Result<Self> {
        Break::leave_to_us();
        let heap = Break::now()?.next_multiple_of(PAGE);
        let (near, far) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let epoll = Epoll::new(EpollCreateFlags::empty())?;
        let watched = EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&watched, EpollEvent::new(EpollFlags::EPOLLOUT, 0))?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty())?;
        let mut overflow = Self {
            round: 0,
            directory: place.directory.clone(),
            area: Area::private(PAGES)?,
            moved: Area::private(PAGES)?,
            heap,
            number: 0,
            kept: File::create(place.directory.join("kept"))?,
            near,
            far,
            epoll,
            watched,
            timer,
        };
        overflow.number =
            nix::fcntl::fcntl(&overflow.kept, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(700))?;
        overflow.change()?;
        Ok(overflow)
    }

    fn check(&mut self) -> Result<()> {
        self.compare()?;
        self.change()
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words {
            "change" => self.change(),
            _ => bail!("this guest does not know {words:?}"),
        }
    }
}

impl Overflow {
    /// Makes everything another than it was, among more calls than anybody lists.
    fn change(&mut self) -> Result<()> {
        self.round += 1;
        let round = self.round;
        self.area
            .protect(0, PAGES, unbroken_guests::area::READ_WRITE)?;
        self.area.write(0, &pattern(round, PAGES * PAGE));
        self.moved.write(0, &pattern(round + 1, PAGES * PAGE));
        Break::set(self.heap + HEAP_PAGES * PAGE)?;
        Break::write(self.heap, &pattern(round, HEAP_PAGES * PAGE))?;
        many_calls()?;
        self.area.advise(0, GIVEN_BACK, libc::MADV_DONTNEED)?;
        self.area.renew(GIVEN_BACK, RENEWED - GIVEN_BACK)?;
        self.area
            .protect(RENEWED, CLOSED_OFF - RENEWED, libc::PROT_READ)?;
        self.moved.remap(PAGES, true)?;
        // Lower, and up again at once: what was above is gone.
        Break::set(self.heap + PAGE)?;
        Break::set(self.heap + HEAP_PAGES * PAGE)?;
        self.rename_number()?;
        raw::set_option(
            &self.near,
            libc::SOL_SOCKET,
            libc::SO_PRIORITY,
            (round % 5) as i32,
        )?;
        let mut event = EpollEvent::new(EpollFlags::EPOLLOUT, round);
        self.epoll.modify(&self.watched, &mut event)?;
        let action = [libc::SIG_IGN, libc::SIG_DFL][(round % 2) as usize];
        signals::dispose(libc::SIGUSR2, action)?;
        umask(Mode::from_bits_truncate(0o20 + (round % 7) as u32));
        let limit = 1000 + round;
        setrlimit(
            Resource::RLIMIT_CORE,
            limit,
            getrlimit(Resource::RLIMIT_CORE)?.1,
        )?;
        let timer = Itimer {
            left_us: FAR_US,
            interval_us: round,
        };
        set_itimer(libc::ITIMER_VIRTUAL, timer)?;
        self.arm(round)?;
        nix::unistd::chdir(&self.directory_of(round))?;
        many_calls()?;
        // Used again, in part: not all that is not there was never there.
        self.area.write(PAGE, &pattern(round + 2, PAGE));
        self.area
            .write(GIVEN_BACK * PAGE, &pattern(round + 3, PAGE));
        (&self.kept).write_all(&[round as u8])?;
        Ok(())
    }

    fn compare(&self) -> Result<()> {
        let round = self.round;
        let page = |number: usize| self.area.read(number * PAGE, PAGE);
        let all = pattern(round, PAGES * PAGE);
        for number in 0..PAGES {
            let expected = match number {
                1 => pattern(round + 2, PAGE),
                GIVEN_BACK => pattern(round + 3, PAGE),
                0..RENEWED => vec![0; PAGE],
                _ => all[number * PAGE..(number + 1) * PAGE].to_vec(),
            };
            same_bytes(&format!("page {number}"), &page(number), &expected)?;
        }
        for number in [CLOSED_OFF - 1, CLOSED_OFF] {
            let expected = ["rw-p", "r--p"][usize::from(number < CLOSED_OFF)];
            same("protection", &*self.area.permissions(number)?, expected)?;
        }
        let moved = self.moved.read(0, PAGES * PAGE);
        same_bytes("moved", &moved, &pattern(round + 1, PAGES * PAGE))?;
        let mut heap = pattern(round, PAGE);
        heap.resize(HEAP_PAGES * PAGE, 0);
        let found = Break::read(self.heap, HEAP_PAGES * PAGE)?;
        same_bytes("the heap", &found, &heap)?;
        self.compare_descriptors()?;
        same(
            "umask",
            umask(Mode::empty()).bits(),
            0o20 + (round % 7) as u32,
        )?;
        let (limit, _) = getrlimit(Resource::RLIMIT_CORE)?;
        same("limit", limit, 1000 + round)?;
        let timer = itimer(libc::ITIMER_VIRTUAL)?;
        same("interval", timer.interval_us, round)?;
        let (handler, ..) = signals::action(libc::SIGUSR2)?;
        same(
            "action",
            handler,
            [libc::SIG_IGN, libc::SIG_DFL][(round % 2) as usize],
        )?;
        let here = std::env::current_dir()?;
        same(
            "directory",
            here,
            std::fs::canonicalize(self.directory_of(round))?,
        )
    }

    fn compare_descriptors(&self) -> Result<()> {
        let round = self.round;
        let named = std::fs::read_link(format!("/proc/self/fd/{}", self.number))?;
        same("what the number names", named, self.file_of(round))?;
        let priority = raw::option(&self.near, libc::SOL_SOCKET, libc::SO_PRIORITY)?;
        same("an option", priority, (round % 5) as i32)?;
        let mut events = [EpollEvent::empty(); 4];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        let found: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
        same("events", found, vec![round])?;
        nix::unistd::write(&self.near, b"x")?;
        let mut byte = [0];
        same("read", nix::unistd::read(&self.far, &mut byte)?, 1)?;
        let mut content = vec![0; round as usize];
        let kept = File::open(self.directory.join("kept"))?;
        kept.read_exact_at(&mut content, 0)
            .context("the kept file")?;
        let expected: Vec<u8> = (1..=round).map(|round| round as u8).collect();
        same_bytes("the kept file", &content, &expected)?;
        let text = std::fs::read_to_string(format!(
            "/proc/self/fdinfo/{}",
            self.timer.as_fd().as_raw_fd()
        ))?;
        let interval = format!("it_interval: ({round}, 0)");
        same("the timer's interval", text.contains(&interval), true)
    }

    fn file_of(&self, round: u64) -> PathBuf {
        self.directory.join(format!("file-{}", round % 2))
    }

    fn directory_of(&self, round: u64) -> PathBuf {
        let directory = self.directory.join(format!("directory-{}", round % 2));
        // It is there from the second time on.
        let _ = std::fs::create_dir(&directory);
        directory
    }

    fn rename_number(&self) -> Result<()> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.file_of(self.round))?;
        let arguments = [file.as_raw_fd() as u64, self.number as u64, 0, 0];
        raw::call(libc::SYS_dup3, arguments)?;
        Ok(())
    }

    fn arm(&self, seconds: u64) -> Result<()> {
        let interval = TimeSpec::new(seconds as i64, 0);
        let far = Expiration::IntervalDelayed(TimeSpec::new(1_000_000, 0), interval);
        Ok(self.timer.set(far, TimerSetTimeFlags::empty())?)
    }
}

fn many_calls() -> Result<()> {
    for _ in 0..CALLS {
        let duplicate = raw::call(libc::SYS_dup, [0, 0, 0, 0])?;
        raw::call(libc::SYS_close, [duplicate as u64, 0, 0, 0])?;
    }
    Ok(())
}

fn main() -> ExitCode {
    run::<Overflow>()
}
