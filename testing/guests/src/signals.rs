//! Queued signals with values, handlers that remember, alternate stacks.
//!
//! # Safety
//! The handler touches atomics alone, which is async-signal-safe. Structures that the kernel
//! fills are locals that are plain data, for which all bits zero is a value.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::mem::zeroed;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};

use crate::raw::outcome;

/// Calls of the handler since the start.
pub static HANDLED: AtomicU64 = AtomicU64::new(0);
/// What the last one was called with: `si_value`, and an address on the stack that it ran on.
pub static LAST_VALUE: AtomicI64 = AtomicI64::new(0);
pub static LAST_STACK: AtomicUsize = AtomicUsize::new(0);
pub static LAST_SIGNAL: AtomicI64 = AtomicI64::new(0);

extern "C" fn remember(signal: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    let here = 0u8;
    // SAFETY: the kernel gives a valid `info` to a handler with SA_SIGINFO.
    let value = unsafe { (*info).si_value().sival_ptr };
    LAST_VALUE.store(value as i64, Ordering::SeqCst);
    LAST_STACK.store((&raw const here) as usize, Ordering::SeqCst);
    LAST_SIGNAL.store(i64::from(signal), Ordering::SeqCst);
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

static STAY_ENDS: AtomicBool = AtomicBool::new(false);
static STAY_LOOKS: AtomicU64 = AtomicU64::new(0);
static STAY_FLAGS: AtomicI64 = AtomicI64::new(0);

/// The stay in a handler of [`stay_in_handler`].
#[derive(Debug, Clone, Copy)]
pub struct Stay;

impl Stay {
    /// Lets the handler return.
    pub fn end() {
        STAY_ENDS.store(true, Ordering::SeqCst);
    }

    /// How often the handler has looked at its alternate stack.
    pub fn looks() -> u64 {
        STAY_LOOKS.load(Ordering::SeqCst)
    }

    /// The flags that it found last.
    pub fn flags() -> i32 {
        STAY_FLAGS.load(Ordering::SeqCst) as i32
    }
}

extern "C" fn stay(_: i32) {
    let here = 0u8;
    LAST_STACK.store((&raw const here) as usize, Ordering::SeqCst);
    while !STAY_ENDS.swap(false, Ordering::SeqCst) {
        let flags = alternate_stack().map_or(-1, |(_, flags, _)| flags);
        STAY_FLAGS.store(i64::from(flags), Ordering::SeqCst);
        STAY_LOOKS.fetch_add(1, Ordering::SeqCst);
        let pause = libc::timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        // SAFETY: async-signal-safe; the structure is a local.
        unsafe { libc::nanosleep(&pause, std::ptr::null_mut()) };
    }
}

/// Installs a handler that stays until it is let go, looking at its alternate stack.
pub fn stay_in_handler(signal: i32, flags: i32) -> io::Result<()> {
    // SAFETY: plain data; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = stay as *const () as usize;
        action.sa_flags = flags;
        outcome(libc::sigaction(signal, &action, std::ptr::null_mut())).map(drop)
    }
}

/// Installs the remembering handler; `masked` are blocked while it runs.
pub fn handle(signal: i32, flags: i32, masked: &[i32]) -> io::Result<()> {
    // SAFETY: plain data; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = remember as *const () as usize;
        action.sa_flags = flags | libc::SA_SIGINFO;
        for signal in masked {
            libc::sigaddset(&mut action.sa_mask, *signal);
        }
        outcome(libc::sigaction(signal, &action, std::ptr::null_mut())).map(drop)
    }
}

/// `SIG_IGN` or `SIG_DFL`.
pub fn dispose(signal: i32, how: usize) -> io::Result<()> {
    // SAFETY: plain data, no handler.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = how;
        outcome(libc::sigaction(signal, &action, std::ptr::null_mut())).map(drop)
    }
}

/// What the kernel has for a signal: handler, flags as set, signals masked.
pub fn action(signal: i32) -> io::Result<(usize, i32, Vec<i32>)> {
    // SAFETY: the kernel fills a local.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        outcome(libc::sigaction(signal, std::ptr::null(), &mut action))?;
        Ok((
            action.sa_sigaction,
            action.sa_flags,
            members(&action.sa_mask),
        ))
    }
}

fn members(set: &libc::sigset_t) -> Vec<i32> {
    // SAFETY: `set` is a valid set.
    (1..=64)
        .filter(|signal| unsafe { libc::sigismember(set, *signal) } == 1)
        .collect()
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: a set is plain data.
    unsafe {
        let mut set = zeroed();
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}

/// Changes the calling thread's mask: `SIG_BLOCK`, `SIG_UNBLOCK`, `SIG_SETMASK`.
pub fn mask(how: i32, signals: &[i32]) -> io::Result<()> {
    // SAFETY: the set is a local.
    match unsafe { libc::pthread_sigmask(how, &set_of(signals), std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The calling thread's mask.
pub fn masked() -> Vec<i32> {
    let mut set = set_of(&[]);
    // SAFETY: the set is a local.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set) };
    members(&set)
}

/// Signals that are pending for the calling thread or its process.
pub fn pending() -> Vec<i32> {
    let mut set = set_of(&[]);
    // SAFETY: the set is a local.
    unsafe { libc::sigpending(&mut set) };
    members(&set)
}

/// Queues a signal with a value to the own process.
pub fn queue_to_process(signal: i32, value: usize) -> io::Result<()> {
    let value = libc::sigval {
        sival_ptr: value as *mut c_void,
    };
    // SAFETY: integers only; `sival_ptr` is never followed.
    outcome(unsafe { libc::sigqueue(libc::getpid(), signal, value) }).map(drop)
}

/// Queues a signal with a value to the calling thread alone.
pub fn queue_to_thread(signal: i32, value: usize) -> io::Result<()> {
    // SAFETY: as glibc's pthread_sigqueue fills it: `si_pid`, `si_uid` and `si_value` follow the
    // three leading integers and padding (asm-generic/siginfo.h).
    unsafe {
        let mut info: libc::siginfo_t = zeroed();
        (info.si_signo, info.si_code) = (signal, libc::SI_QUEUE);
        let words = (&raw mut info).cast::<u64>();
        *words.add(2) = libc::getpid() as u64 | u64::from(libc::getuid()) << 32;
        *words.add(3) = value as u64;
        let (pid, tid) = (libc::getpid(), libc::gettid());
        outcome(libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            pid,
            tid,
            signal,
            &info,
        ))
        .map(drop)
    }
}

/// A signal as it was taken out of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    pub signal: i32,
    pub code: i32,
    pub value: usize,
    pub pid: i32,
}

/// Takes a pending one of `signals` out, without waiting; `None` when there is none.
pub fn take(signals: &[i32]) -> io::Result<Option<Taken>> {
    let nothing = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills a local; queued signals have `si_value` and `si_pid`.
    unsafe {
        let mut info: libc::siginfo_t = zeroed();
        match outcome(libc::sigtimedwait(&set_of(signals), &mut info, &nothing)) {
            Ok(signal) => Ok(Some(Taken {
                signal: signal as i32,
                code: info.si_code,
                value: info.si_value().sival_ptr as usize,
                pid: info.si_pid(),
            })),
            Err(cause) if cause.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
            Err(cause) => Err(cause),
        }
    }
}

/// The alternate stack of the calling thread: address, flags, length.
pub fn alternate_stack() -> io::Result<(usize, i32, usize)> {
    // SAFETY: the kernel fills a local.
    unsafe {
        let mut stack: libc::stack_t = zeroed();
        outcome(libc::sigaltstack(std::ptr::null(), &mut stack))?;
        Ok((stack.ss_sp as usize, stack.ss_flags, stack.ss_size))
    }
}

/// linux/signal.h
pub const SS_AUTODISARM: i32 = i32::MIN;

/// Makes the calling thread handle signals with SA_ONSTACK there.
pub fn set_alternate_stack(area: &crate::area::Area, flags: i32) -> io::Result<()> {
    let stack = libc::stack_t {
        ss_sp: area.address() as *mut c_void,
        ss_flags: flags,
        ss_size: area.pages() * crate::area::PAGE,
    };
    // SAFETY: the caller keeps the area for as long as the thread lives.
    outcome(unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) }).map(drop)
}

/// Sends a signal to the calling thread, which handles it before this returns.
pub fn raise(signal: i32) -> io::Result<()> {
    // SAFETY: an integer.
    outcome(unsafe { libc::raise(signal) }).map(drop)
}

/// A signalfd for any signals: `nix` names no real-time ones.
pub fn descriptor(signals: &[i32], flags: i32) -> io::Result<nix::sys::signalfd::SignalFd> {
    // SAFETY: a set is plain data, and what has every bit of a set is one.
    let set = unsafe { nix::sys::signal::SigSet::from_sigset_t_unchecked(set_of(signals)) };
    let flags = nix::sys::signalfd::SfdFlags::from_bits_retain(flags);
    Ok(nix::sys::signalfd::SignalFd::with_flags(&set, flags)?)
}
