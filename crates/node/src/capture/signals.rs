//! What signals will do to a process.

use unbroken_image::{SignalAction, SignalInfo};
use unbroken_tracee::survey;

/// Signals by what they will do, signal 1 in bit 0.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Awaited {
    /// Run a handler of the process's own.
    pub handled: u64,
    /// End it.
    pub fatal: u64,
}

impl Awaited {
    pub fn by(actions: &[SignalAction]) -> Awaited {
        let by_default = |(number, action): &(i32, &SignalAction)| {
            action.handler == libc::SIG_DFL as u64 && ends_a_process(*number)
        };
        let fatal = (1..).zip(actions).filter(by_default);
        Awaited {
            handled: survey::handled_signals(actions),
            fatal: fatal.fold(0, |set, (number, _)| set | 1 << (number - 1)),
        }
    }
}

/// The signals of a queue as a set.
pub(super) fn set_of<'queue>(queue: impl IntoIterator<Item = &'queue SignalInfo>) -> u64 {
    let bits = queue.into_iter().map(|info| match info.signal() {
        number @ 1..=64 => 1 << (number - 1),
        _ => 0,
    });
    bits.fold(0, |set, bit| set | bit)
}

/// Whether the default action of a signal is an end (signal(7)).
fn ends_a_process(signal: i32) -> bool {
    !matches!(
        signal,
        libc::SIGCHLD
            | libc::SIGCONT
            | libc::SIGURG
            | libc::SIGWINCH
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    )
}
