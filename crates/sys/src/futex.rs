//! Futexes on words in memory that several processes share.
//!
//! The blocks here rely on `&AtomicU32` being a valid, four-byte aligned address for the length of
//! the call; the kernel reads the word and writes nothing.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Why [`wait`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A wake, or a signal handler that ran: look at the word again.
    Woken,
    /// The word no longer held the expected value at the call.
    Changed,
    TimedOut,
}

/// Sleeps until someone wakes `word`, unless it does not hold `expected` any more. Works between
/// processes: `FUTEX_PRIVATE_FLAG` is not set. `timeout` is relative; `None` waits for ever.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> io::Result<Wait> {
    let timeout = timeout.map(|duration| libc::timespec {
        tv_sec: duration.as_secs().min(i64::MAX as u64) as libc::time_t,
        tv_nsec: i64::from(duration.subsec_nanos()),
    });
    let timeout_pointer = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the timespec outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            expected,
            timeout_pointer,
        )
    };
    if result == 0 {
        return Ok(Wait::Woken);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Ok(Wait::Changed),
        Some(libc::ETIMEDOUT) => Ok(Wait::TimedOut),
        Some(libc::EINTR) => Ok(Wait::Woken),
        _ => Err(error),
    }
}

/// Wakes up to `count` sleepers of `word`, in this process and others; returns how many.
pub fn wake(word: &AtomicU32, count: i32) -> io::Result<usize> {
    // SAFETY: the word outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    #[test]
    fn wait_tells_its_three_ends_apart() {
        let word = AtomicU32::new(1);
        assert_eq!(wait(&word, 0, None).unwrap(), Wait::Changed);
        let short = Some(Duration::from_millis(1));
        assert_eq!(wait(&word, 1, short).unwrap(), Wait::TimedOut);
    }

    #[test]
    fn a_wake_ends_a_wait() {
        let word = Arc::new(AtomicU32::new(0));
        let sleeper = std::thread::spawn({
            let word = Arc::clone(&word);
            move || {
                while word.load(Ordering::Acquire) == 0 {
                    wait(&word, 0, None).unwrap();
                }
            }
        });
        word.store(1, Ordering::Release);
        while !sleeper.is_finished() {
            wake(&word, 1).unwrap();
            std::thread::yield_now();
        }
        sleeper.join().unwrap();
    }
}
