//! Waiting for what the calling thread traces, and a bell that interrupts the wait.
//!
//! The blocks rely on: the assembly below keeps the System V calling convention and touches only
//! registers that a callee may use; the signal handler reads and writes nothing but the saved
//! instruction pointer of the thread that it interrupted.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::io;
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// How a thread or process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// `_exit(2)` with this code.
    Exited(i32),
    /// This signal.
    Killed(i32),
}

impl Death {
    /// From a wait status of an ended process, or the message of `PTRACE_EVENT_EXIT`.
    pub fn from_status(status: i32) -> Death {
        match status & 0x7f {
            0 => Death::Exited((status >> 8) & 0xff),
            signal => Death::Killed(signal),
        }
    }
}

/// What `waitpid` says about one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Ended(Death),
    /// A signal-delivery stop: the signal is in no queue and must be passed on.
    Signal(i32),
    /// A stop at entry or exit of a system call (`PTRACE_O_TRACESYSGOOD`).
    SystemCall,
    /// A stop with `PTRACE_EVENT_*`; for `PTRACE_EVENT_STOP`, `signal` is `SIGTRAP` or the stop
    /// signal of a group stop.
    Event {
        event: i32,
        signal: i32,
    },
}

/// One report of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub tid: i32,
    pub change: Change,
}

impl Report {
    fn from_status(tid: i32, status: i32) -> Report {
        let signal = (status >> 8) & 0xff;
        let change = if status & 0xff != 0x7f {
            Change::Ended(Death::from_status(status))
        } else if status >> 16 != 0 {
            Change::Event {
                event: status >> 16,
                signal,
            }
        } else if signal == libc::SIGTRAP | 0x80 {
            Change::SystemCall
        } else {
            Change::Signal(signal)
        };
        Report { tid, change }
    }
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    Report(Report),
    /// The bell was rung since it was last answered. It is silent again.
    Rung,
    /// Nothing is traced any more.
    Nobody,
}

/// Only what this very thread traces: the node's other threads have children of their own.
const OPTIONS: i32 = libc::__WALL | libc::__WNOTHREAD;

/// Waits until `tid`, or with -1 any thread that the caller traces, has something to report;
/// `None` when there is none to wait for.
pub fn wait(tid: i32) -> io::Result<Option<Report>> {
    wait_with(tid, 0)
}

/// As [`wait`], but returns at once, with `None` also when there is nothing yet.
pub fn poll(tid: i32) -> io::Result<Option<Report>> {
    wait_with(tid, libc::WNOHANG)
}

fn wait_with(tid: i32, more_options: i32) -> io::Result<Option<Report>> {
    loop {
        let mut status = 0;
        // SAFETY: `status` lives through the call.
        let found = unsafe { libc::waitpid(tid, &raw mut status, OPTIONS | more_options) };
        match found {
            0 => return Ok(None),
            1.. => return Ok(Some(Report::from_status(found, status))),
            _ => {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::ECHILD) => return Ok(None),
                    Some(libc::EINTR) => {}
                    _ => return Err(error),
                }
            }
        }
    }
}

// wait4 with a flag that is looked at before it. `unbroken_wait_interrupted` is where the signal
// handler sends a thread that it finds between the look and the end of the system call
// instruction: a ring in that window would otherwise be slept over. The kernel, too, brings an
// interrupted wait4 there: under SA_RESTART it winds rip back to the instruction before it builds
// the handler's frame (arch/x86/kernel/signal.c, handle_signal).
global_asm!(
    ".pushsection .text.unbroken_wait, \"ax\", @progbits",
    ".globl unbroken_wait",
    ".hidden unbroken_wait",
    ".type unbroken_wait, @function",
    "unbroken_wait:",
    "    cmp dword ptr [rcx], 0",
    "    jne unbroken_wait_interrupted",
    "    xor r10d, r10d",
    "    mov eax, {wait4}",
    "    syscall",
    ".globl unbroken_wait_end",
    ".hidden unbroken_wait_end",
    "unbroken_wait_end:",
    "    ret",
    ".globl unbroken_wait_interrupted",
    ".hidden unbroken_wait_interrupted",
    "unbroken_wait_interrupted:",
    "    mov rax, -{eintr}",
    "    ret",
    ".size unbroken_wait, . - unbroken_wait",
    ".popsection",
    wait4 = const libc::SYS_wait4,
    eintr = const libc::EINTR,
);

unsafe extern "C" {
    fn unbroken_wait(tid: i64, status: *mut i32, options: i64, flag: *const u32) -> i64;
    static unbroken_wait_end: u8;
    static unbroken_wait_interrupted: u8;
}

/// The signal that a ring sends; nothing else of ours uses it.
fn bell_signal() -> i32 {
    libc::SIGRTMIN() + 7
}

extern "C" fn on_bell(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let begin = unbroken_wait as *const () as usize;
    let end = &raw const unbroken_wait_end as usize;
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid ucontext_t that nothing else uses
    // while the handler runs.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let instruction = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    if (begin..end).contains(&(*instruction as usize)) {
        *instruction = &raw const unbroken_wait_interrupted as i64;
    }
}

/// Lets other threads interrupt the wait of the thread that made it. A ring is never lost: the
/// next [`Bell::wait`] returns it, also when it came before that wait began.
#[derive(Clone, Debug)]
pub struct Bell {
    rung: Arc<AtomicU32>,
    owner: i32,
}

impl Bell {
    /// A bell for the calling thread, which alone may wait on it.
    pub fn for_this_thread() -> io::Result<Bell> {
        static INSTALL: Once = Once::new();
        let mut installed = Ok(());
        INSTALL.call_once(|| installed = install_handler());
        installed?;
        // SAFETY: no arguments.
        let owner = unsafe { libc::gettid() };
        Ok(Bell {
            rung: Arc::new(AtomicU32::new(0)),
            owner,
        })
    }

    /// Interrupts the owner's wait. One system call, none when an earlier ring is unanswered.
    pub fn ring(&self) {
        if self.rung.swap(1, Ordering::SeqCst) == 0 {
            // SAFETY: plain numbers. It fails only when the owner has ended: nobody waits then.
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), self.owner, bell_signal());
            }
        }
    }

    /// As [`Bell::wait`], but `None` when there is nothing yet.
    pub fn poll(&self) -> io::Result<Option<Wake>> {
        if self.rung.swap(0, Ordering::SeqCst) != 0 {
            return Ok(Some(Wake::Rung));
        }
        Ok(poll(-1)?.map(Wake::Report))
    }

    /// Waits for a report of any thread that the caller traces, or for a ring. A ring that came
    /// with a report is returned by the next call.
    pub fn wait(&self) -> io::Result<Wake> {
        loop {
            if self.rung.swap(0, Ordering::SeqCst) != 0 {
                return Ok(Wake::Rung);
            }
            let mut status = 0;
            // SAFETY: `status` and the flag live through the call, and the routine only reads the
            // flag.
            let found = unsafe {
                unbroken_wait(-1, &raw mut status, i64::from(OPTIONS), self.rung.as_ptr())
            };
            if found > 0 {
                return Ok(Wake::Report(Report::from_status(found as i32, status)));
            }
            match -found as i32 {
                libc::ECHILD => return Ok(Wake::Nobody),
                libc::EINTR => {}
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

fn install_handler() -> io::Result<()> {
    // SAFETY: zero is a valid sigaction; the handler is of the form that SA_SIGINFO wants.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bell as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaction(bell_signal(), &raw const action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_told_apart() {
        let change = |status| Report::from_status(1, status).change;
        assert_eq!(change(3 << 8), Change::Ended(Death::Exited(3)));
        assert_eq!(change(9), Change::Ended(Death::Killed(9)));
        assert_eq!(change(11 | 0x80), Change::Ended(Death::Killed(11)));
        assert_eq!(change(0x7f | 10 << 8), Change::Signal(10));
        assert_eq!(change(0x7f | (5 | 0x80) << 8), Change::SystemCall);
        assert_eq!(
            change(0x7f | 5 << 8 | 128 << 16),
            Change::Event {
                event: 128,
                signal: 5
            }
        );
    }

    /// Each ring is answered before the next is made, so one that is slept over hangs the test.
    #[test]
    fn no_ring_is_lost() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let bell = Bell::for_this_thread().unwrap();
        let answered = Arc::new(AtomicU32::new(0));
        let ringer = std::thread::spawn({
            let (bell, answered) = (bell.clone(), answered.clone());
            move || {
                for ring in 1..=100_000 {
                    bell.ring();
                    while answered.load(Ordering::SeqCst) != ring {
                        std::hint::spin_loop();
                    }
                    // A varying distance to the answer, so that rings meet every instruction of
                    // the wait.
                    for _ in 0..ring % 977 {
                        std::hint::spin_loop();
                    }
                }
            }
        });
        for _ in 0..100_000 {
            assert_eq!(bell.wait().unwrap(), Wake::Rung);
            answered.fetch_add(1, Ordering::SeqCst);
        }
        ringer.join().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
