//! What a program gets from whoever executes it besides arguments, environment and descriptors:
//! limits, the signals that are ignored, and the signal mask (execve(2)).
//!
//! The blocks rely on: plain numbers, pointers to live locals of the type that the call fills, and
//! for the hook before exec on calls that are async-signal-safe (signal-safety(7)).
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// The highest signal number (signal(7)).
const SIGNALS: i32 = 64;

static IGNORED_AT_FIRST: AtomicU64 = AtomicU64::new(0);

/// Runs before the runtime of Rust, which ignores SIGPIPE whatever it found, and before any thread is
/// made, for which the C library takes signals 32 and 33.
extern "C" fn note_ignored() {
    let ignored = (1..=SIGNALS).filter(|&signal| is_ignored(signal));
    let ignored = ignored.fold(0, |set, signal| set | bit(signal));
    IGNORED_AT_FIRST.store(ignored, Ordering::Relaxed);
}

#[used]
// SAFETY: the section holds pointers to functions of C that take nothing they need; this one asks
// the kernel and stores a word.
#[unsafe(link_section = ".init_array")]
static NOTE_IGNORED: extern "C" fn() = note_ignored;

/// `struct kernel_sigaction` of x86-64: the C library keeps signals 32 and 33 from its own calls, yet
/// its posix_spawn leaves them ignored in whatever it starts.
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

impl KernelAction {
    fn of(handler: usize) -> KernelAction {
        KernelAction {
            handler,
            flags: 0,
            restorer: 0,
            mask: 0,
        }
    }
}

fn is_ignored(signal: i32) -> bool {
    let mut action = KernelAction::of(libc::SIG_DFL);
    let none = ptr::null::<KernelAction>();
    let mask_bytes = mem::size_of::<u64>();
    // SAFETY: `action` is what the kernel fills, and lives through the call; no new action is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            none,
            &raw mut action,
            mask_bytes,
        )
    };
    result == 0 && action.handler == libc::SIG_IGN
}

/// `handler` is SIG_DFL or SIG_IGN.
fn set_action(signal: i32, handler: usize) {
    let action = KernelAction::of(handler);
    let none = ptr::null_mut::<KernelAction>();
    let mask_bytes = mem::size_of::<u64>();
    // It fails for SIGKILL and SIGSTOP, which nobody can ignore.
    // SAFETY: neither action runs code of this process; `action` lives through the call.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            &raw const action,
            none,
            mask_bytes,
        )
    };
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The signals, as a mask, that this process ignored when it was executed.
pub fn ignored_signals() -> u64 {
    IGNORED_AT_FIRST.load(Ordering::Relaxed)
}

/// The signals, as a mask, that the calling thread blocks.
pub fn blocked_signals() -> io::Result<u64> {
    // SAFETY: all zero is a valid set, and `set` lives through the call, which fills it.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: as above; no new mask is given.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), &raw mut set) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    // SAFETY: `set` is initialised.
    let is_member = |signal: &i32| unsafe { libc::sigismember(&raw const set, *signal) == 1 };
    let members = (1..=SIGNALS).filter(is_member);
    Ok(members.fold(0, |blocked, signal| blocked | bit(signal)))
}

/// Has no signal ignored (but SIGPIPE, as any program of Rust) and none blocked by the calling
/// thread: a caller that ignored SIGCHLD would leave us without the ends of our children.
pub fn heed_all_signals() -> io::Result<()> {
    // 32 and 33 are the C library's, which sets them when it needs them.
    let heeded = (1..=SIGNALS).filter(|signal| ![libc::SIGPIPE, 32, 33].contains(signal));
    for signal in heeded.filter(|&signal| is_ignored(signal)) {
        set_action(signal, libc::SIG_DFL);
    }
    crate::clone::unblock_signals()
}

/// Has `command` begin with these limits (resource, soft, hard), these signals ignored and all
/// others at their default, and this mask. For the calling process's own exec or for a child.
pub fn give(command: &mut Command, limits: Vec<(u32, u64, u64)>, ignored: u64, blocked: u64) {
    let hook = move || {
        for &(resource, soft, hard) in &limits {
            crate::process::set_limit(0, resource, (soft, hard))?;
        }
        give_signals(ignored, blocked)
    };
    // SAFETY: the hook allocates nothing, locks nothing, and calls prlimit, rt_sigaction,
    // sigaddset and pthread_sigmask alone. It runs behind the library's own reset of mask and SIGPIPE.
    unsafe { command.pre_exec(hook) };
}

fn give_signals(ignored: u64, blocked: u64) -> io::Result<()> {
    // SAFETY: all zero is a valid set.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    for signal in 1..=SIGNALS {
        let action = match ignored & bit(signal) {
            0 => libc::SIG_DFL,
            _ => libc::SIG_IGN,
        };
        set_action(signal, action);
        if blocked & bit(signal) != 0 {
            // SAFETY: `set` is initialised; the signal is in range.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
    }
    // SAFETY: `set` lives through the call; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
