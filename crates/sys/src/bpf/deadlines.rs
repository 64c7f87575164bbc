//! When the calls in which threads wait end by themselves, told by the kernel.
//!
//! A call that waits for a time has a timer on the stack of its own thread (kernel/time/hrtimer.c,
//! `schedule_hrtimeout_range_clock`; futex, nanosleep and epoll have the same; a socket's call has
//! one that counts ticks, kernel/time/sleep_timeout.c), and once a stop has ended the call nothing
//! says any more when it would have rung. So two programs write it down, at the tracepoints of
//! timers that are started and cancelled:
//!
//! ```text
//! hrtimer_start:  a timer on the running thread's stack, in the pid namespace that we look at:
//!                 entry of the thread = the timer, when it rings, by which clock, not broken off
//! hrtimer_cancel: the same timer, while a tracer's interrupt waits for the thread:
//!                 entry.broken_off = now
//! ```
//!
//! Timers of anything else cost a helper, two loads and a comparison. Those that count ticks have
//! tracepoints of their own (`timer_start`, `timer_cancel`), which every packet of TCP passes, so
//! they are watched only when asked for.
//!
//! A thread that an interrupt waits for does not come back to its program before it has stopped, so
//! what it broke off belongs to the call that it stops in. That need not be the call's own timeout:
//! whoever asks knows which calls sleep for other reasons, too.

use super::btf::Btf;
use super::call::{self, Map};
use super::instruction::{
    Instruction, R0, R1, R2, R3, R4, STACK, add, add_value, and_value, call, exit, load,
    multiply_by, put, set, set_map, set_value, set_wide, skip, skip_if_at_least, skip_if_differs,
    skip_if_not_zero, skip_if_zero, store, store_at, subtract,
};
use super::{assembled, explained, refused};
use crate::clock;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// Not one of those whose deadlines are told.
const UNKNOWN_CLOCK: i32 = libc::CLOCK_REALTIME;

/// Helpers (include/uapi/linux/bpf.h).
const MAP_LOOKUP: i32 = 1;
const MAP_UPDATE: i32 = 2;
const KTIME_GET_NS: i32 = 5;
const JIFFIES64: i32 = 118;
const PROBE_READ_KERNEL: i32 = 113;
const GET_NS_CURRENT_PID_TGID: i32 = 120;
const GET_CURRENT_TASK_BTF: i32 = 158;

/// include/linux/sched/jobctl.h, JOBCTL_TRAP_STOP: an interrupt of the tracer waits (ptrace(2)).
const TRAP_STOP: i32 = 1 << 19;

/// THREAD_SIZE of x86-64. Where a kernel has larger stacks (KASAN), some waits are not seen.
const STACK_BYTES: i32 = 4 * 4096;

/// More threads than this that wait for a time, and some are not remembered.
const THREADS_MAX: u32 = 16_384;

/// A thread's last timer: words of its entry, and how many they are.
mod word {
    /// With the lowest bit set when it counts ticks: the stacks of two calls may have timers of
    /// both kinds at one address.
    pub const ADDRESS: usize = 0;
    pub const DEADLINE_NS: usize = 1;
    pub const CLOCK: usize = 2;
    /// By CLOCK_MONOTONIC; 0 when it was not.
    pub const BROKEN_OFF_NS: usize = 3;
    pub const COUNT: usize = 4;
}

/// Where things lie on the programs' stack: the words, and before them the key, which is the first
/// member of `struct bpf_pidns_info`.
const WORD_BYTES: i16 = 8;
const TIMER_AT: i16 = -(word::COUNT as i16) * WORD_BYTES;
const KEY_AT: i16 = TIMER_AT - 8;
const IDENTITY_BYTES: i32 = 8;

/// Where a word lies on the stack.
const fn at(word: usize) -> i16 {
    TIMER_AT + offset_of(word)
}

const fn offset_of(word: usize) -> i16 {
    word as i16 * WORD_BYTES
}

/// The register that keeps the timer's address.
const TIMER: u8 = 6;
/// And the one that keeps the time.
const NOW: u8 = 7;

/// The instructions that leave out the next so many unless a condition of theirs holds.
type Condition<'a> = &'a dyn Fn(usize) -> Vec<Instruction>;

/// Sees the timed waits of all threads in one pid namespace, until it is dropped.
#[derive(Debug)]
pub struct DeadlineProgram {
    timers: Arc<Map<{ word::COUNT }>>,
    build: Build,
    _programs: [OwnedFd; 2],
}

/// Sees waits on sockets, too, for the [`DeadlineProgram`] that it was made by. Until it is dropped.
#[derive(Debug)]
pub struct SocketDeadlines {
    _programs: [OwnedFd; 2],
}

/// Makes a [`SocketDeadlines`], on any thread.
#[derive(Debug)]
pub struct SocketDeadlinesLoader {
    build: Build,
    /// The instructions name its descriptor.
    _timers: Arc<Map<{ word::COUNT }>>,
}

impl SocketDeadlinesLoader {
    /// Takes some milliseconds.
    ///
    /// # Errors
    /// Says which step was refused, and what would help.
    pub fn load(self) -> io::Result<SocketDeadlines> {
        let programs = || {
            Ok([
                call::run_at(c"timer_start", &self.build.started(Counts::Ticks))?,
                call::run_at(c"timer_cancel", &self.build.cancelled(Counts::Ticks))?,
            ])
        };
        let programs = programs().map_err(|error| refused(&error, LOAD))?;
        Ok(SocketDeadlines {
            _programs: programs,
        })
    }
}

impl DeadlineProgram {
    /// Waits that begin from now on are seen, of every thread in the pid namespace of process `pid`
    /// (a number of ours). Takes some milliseconds.
    ///
    /// # Errors
    /// Says which step was refused, and what would help.
    pub fn load(pid: i32) -> io::Result<DeadlineProgram> {
        let path = format!("/proc/{pid}/ns/pid");
        let namespace = fs::metadata(&path).map_err(|error| {
            let fix = "mount /proc, and start the service again if it has ended";
            explained(&error, &format!("look at {path}"), fix)
        })?;
        let places = assembled("a timer", Places::find)?;
        let load = || {
            let timers = Arc::new(Map::create(THREADS_MAX)?);
            let build = Build {
                places,
                namespace: (namespace.dev(), namespace.ino()),
                map: timers.descriptor(),
                tick_ns: clock::tick_ns(),
            };
            let programs = [
                call::run_at(c"hrtimer_start", &build.started(Counts::Nanoseconds))?,
                call::run_at(c"hrtimer_cancel", &build.cancelled(Counts::Nanoseconds))?,
            ];
            Ok(DeadlineProgram {
                timers,
                build,
                _programs: programs,
            })
        };
        load().map_err(|error| refused(&error, LOAD))
    }

    /// For waits on sockets.
    pub fn for_sockets(&self) -> SocketDeadlinesLoader {
        SocketDeadlinesLoader {
            build: self.build,
            _timers: self.timers.clone(),
        }
    }

    /// When the wait of thread `tid` (a number of its own pid namespace), which an interrupt of its
    /// tracer has broken off at `since_ns` or later, would have ended; both by CLOCK_MONOTONIC.
    /// `None` when there was none, when it was not seen, or when it goes by another clock.
    pub fn broken_off(&self, tid: i32, since_ns: u64) -> io::Result<Option<u64>> {
        let timer = self.timers.get(tid.cast_unsigned())?;
        let timer = timer.filter(|timer| {
            timer[word::DEADLINE_NS] != 0
                && timer[word::CLOCK] == libc::CLOCK_MONOTONIC as u64
                && timer[word::BROKEN_OFF_NS] >= since_ns
        });
        Ok(timer.map(|timer| timer[word::DEADLINE_NS]))
    }
}

const LOAD: &str = "load BPF programs that see when waits end";

/// What a timer counts in.
#[derive(Clone, Copy)]
enum Counts {
    Nanoseconds,
    Ticks,
}

impl Counts {
    fn tag(self) -> i32 {
        match self {
            Counts::Nanoseconds => 0,
            Counts::Ticks => 1,
        }
    }
}

/// Where this kernel keeps what the programs read.
#[derive(Clone, Copy, Debug)]
struct Places {
    /// `task_struct`
    stack: i16,
    jobctl: i16,
    /// `hrtimer`
    expires: i16,
    base: i16,
    /// `hrtimer_clock_base`
    clock: i16,
    /// `timer_list`
    expires_ticks: i16,
}

impl Places {
    fn find(types: &Btf<'_>) -> io::Result<Places> {
        let place = |structure: &str, member: &str, bytes: u32| {
            let place = types.place(types.structure(structure)?, member)?;
            let offset = i16::try_from(place.offset_bytes).ok();
            offset.filter(|_| place.size_bytes == bytes).ok_or_else(|| {
                let text = format!("this kernel keeps {structure}.{member} in {place:?}");
                io::Error::new(io::ErrorKind::Unsupported, text)
            })
        };
        Ok(Places {
            stack: place("task_struct", "stack", 8)?,
            jobctl: place("task_struct", "jobctl", 8)?,
            // Not `node.expires`: what the kernel may be late (the slack) is in that.
            expires: place("hrtimer", "_softexpires", 8)?,
            base: place("hrtimer", "base", 8)?,
            clock: place("hrtimer_clock_base", "clockid", 4)?,
            expires_ticks: place("timer_list", "expires", 8)?,
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Build {
    places: Places,
    /// Device and inode.
    namespace: (u64, u64),
    map: u32,
    tick_ns: i32,
}

impl Build {
    /// The words of a timer of nanoseconds. What cannot be read is zeros.
    fn read_timer(&self) -> Vec<Instruction> {
        let Places {
            expires,
            base,
            clock,
            ..
        } = self.places;
        let clock_at = at(word::CLOCK);
        [
            &read(at(word::DEADLINE_NS), 8, TIMER, expires)[..],
            &read(clock_at, 8, TIMER, base),
            &[load(8, R3, STACK, clock_at), put(clock_at, 0)],
            &read(clock_at, 4, R3, clock),
        ]
        .concat()
    }

    /// The words of a timer of ticks. Some of the present tick is over, so it rings between so many
    /// ticks and one more from now (kernel/time/timer.c, `calc_index`); the later is taken. Times
    /// beyond years are not told.
    fn read_tick_timer(&self) -> Vec<Instruction> {
        let deadline_at = at(word::DEADLINE_NS);
        let counting = [
            load(8, NOW, STACK, deadline_at),
            subtract(NOW, R0),
            add_value(NOW, 1),
            put(at(word::CLOCK), UNKNOWN_CLOCK),
            skip_if_at_least(NOW, i32::MAX, 1),
            put(at(word::CLOCK), libc::CLOCK_MONOTONIC),
            multiply_by(NOW, self.tick_ns),
            call(KTIME_GET_NS),
            add(NOW, R0),
            store(8, deadline_at, NOW),
        ];
        let reading = read(deadline_at, 8, TIMER, self.places.expires_ticks);
        [&reading[..], &[call(JIFFIES64)], &counting].concat()
    }

    fn started(&self, counts: Counts) -> Vec<Instruction> {
        let reading = [
            &match counts {
                Counts::Nanoseconds => self.read_timer(),
                Counts::Ticks => self.read_tick_timer(),
            }[..],
            &[
                add_value(TIMER, counts.tag()),
                store(8, at(word::ADDRESS), TIMER),
                put(at(word::BROKEN_OFF_NS), 0),
            ],
        ]
        .concat();
        let mut known: Vec<_> = (0..word::COUNT)
            .flat_map(|word| {
                [
                    load(8, R1, STACK, at(word)),
                    store_at(8, R0, offset_of(word), R1),
                ]
            })
            .collect();
        let unknown = [
            &set_map(R1, self.map)[..],
            &[
                set(R2, STACK),
                add_value(R2, KEY_AT.into()),
                set(R3, STACK),
                add_value(R3, TIMER_AT.into()),
                set_value(R4, 0),
                call(MAP_UPDATE),
            ],
        ]
        .concat();
        known.push(skip(unknown.len()));
        let found = [skip_if_zero(R0, known.len())];
        let rest = [&reading[..], &self.find(), &found, &known, &unknown].concat();
        self.own_timer(&|_| Vec::new(), &rest)
    }

    fn cancelled(&self, counts: Counts) -> Vec<Instruction> {
        let noting = [
            add_value(TIMER, counts.tag()),
            load(8, R1, R0, offset_of(word::ADDRESS)),
            skip_if_differs(R1, TIMER, 1),
            store_at(8, R0, offset_of(word::BROKEN_OFF_NS), NOW),
        ];
        let rest = [
            &[call(KTIME_GET_NS), set(NOW, R0)][..],
            &self.find(),
            &[skip_if_zero(R0, noting.len())],
            &noting,
        ]
        .concat();
        let is_interrupted = |count| {
            vec![
                load(8, R1, R0, self.places.jobctl),
                and_value(R1, TRAP_STOP),
                skip_if_zero(R1, count),
            ]
        };
        self.own_timer(&is_interrupted, &rest)
    }

    /// Does `rest` when the timer at hand is on the stack of the running thread, for which the
    /// condition holds (`R0` is its `task_struct`), and that is in the namespace. `KEY_AT` is the
    /// thread's number then.
    fn own_timer(&self, only_if: Condition<'_>, rest: &[Instruction]) -> Vec<Instruction> {
        let (device, inode) = self.namespace;
        let naming = [
            &set_wide(R1, device)[..],
            &set_wide(R2, inode),
            &[
                set(R3, STACK),
                add_value(R3, KEY_AT.into()),
                set_value(R4, IDENTITY_BYTES),
                call(GET_NS_CURRENT_PID_TGID),
                skip_if_not_zero(R0, rest.len()),
            ],
        ]
        .concat();
        let condition = only_if(naming.len() + rest.len());
        let beginning = [
            load(8, TIMER, R1, 0),
            call(GET_CURRENT_TASK_BTF),
            load(8, R1, R0, self.places.stack),
            set(R2, TIMER),
            subtract(R2, R1),
            skip_if_at_least(R2, STACK_BYTES, condition.len() + naming.len() + rest.len()),
        ];
        let ending = [set_value(R0, 0), exit()];
        [&beginning[..], &condition, &naming, rest, &ending].concat()
    }

    /// Points R0 to the thread's entry, or makes it zero.
    fn find(&self) -> Vec<Instruction> {
        let asking = [
            set(R2, STACK),
            add_value(R2, KEY_AT.into()),
            call(MAP_LOOKUP),
        ];
        [&set_map(R1, self.map)[..], &asking].concat()
    }
}

/// Copies `bytes` from `address + offset` in the kernel to the stack at `at`.
fn read(at: i16, bytes: i32, address: u8, offset: i16) -> [Instruction; 6] {
    [
        set(R3, address),
        add_value(R3, offset.into()),
        set(R1, STACK),
        add_value(R1, at.into()),
        set_value(R2, bytes),
        call(PROBE_READ_KERNEL),
    ]
}
