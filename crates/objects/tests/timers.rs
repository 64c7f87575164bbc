//! timerfds: captured, restored, and expiring when and as often as the original would.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_objects::{Kind, classify, timerfd};
use unbroken_sys::descriptor;
use unbroken_sys::timer::{self as clock, Setting};

fn read_some(fd: BorrowedFd<'_>, most: usize) -> Vec<u8> {
    let mut buffer = vec![0; most];
    let count = descriptor::read(fd, &mut buffer).expect("read");
    buffer.truncate(count);
    buffer
}

fn read_error(fd: BorrowedFd<'_>) -> Option<i32> {
    descriptor::read(fd, &mut [0; 8])
        .err()
        .and_then(|error| error.raw_os_error())
}

const SECOND: u64 = 1_000_000_000;

fn armed(clock_id: i32, flags: i32, value_ns: u64, interval_ns: u64) -> OwnedFd {
    let timer = clock::create(clock_id, libc::TFD_NONBLOCK).expect("timerfd_create");
    clock::set(
        timer.as_fd(),
        flags,
        Setting {
            value_ns,
            interval_ns,
        },
    )
    .expect("timerfd_settime");
    timer
}

#[test]
fn an_armed_timer_keeps_its_deadline_on_every_clock() {
    for clock_id in [
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME,
    ] {
        for flags in [0, libc::TFD_TIMER_ABSTIME] {
            let base = if flags == 0 {
                0
            } else {
                clock::now_ns(clock_id).expect("clock")
            };
            let original = armed(clock_id, flags, base + 500 * SECOND, 3 * SECOND);
            assert_eq!(classify(original.as_fd()).expect("classify"), Kind::Timer);
            let state = timerfd::capture(original.as_fd(), None).expect("capture");
            assert_eq!((state.ticks, state.interval_ns), (0, 3 * SECOND));
            // On a clock that nobody sets a rest is a deadline.
            let as_set = clock_id == libc::CLOCK_REALTIME;
            let expected = if as_set {
                flags
            } else {
                libc::TFD_TIMER_ABSTIME
            };
            assert_eq!(state.set_flags, expected as u32);
            let again = timerfd::capture(original.as_fd(), Some(&state)).expect("capture");
            assert_eq!(again, state, "a known deadline does not wander");
            let copy = timerfd::restore(&state).expect("restore");
            let copied = timerfd::capture(copy.as_fd(), None).expect("capture the copy");
            assert!(
                copied.expiry_ns.abs_diff(state.expiry_ns) < SECOND,
                "{copied:?} {state:?}"
            );
            assert_eq!(copied.set_flags, state.set_flags);
        }
    }
}

/// Waits, by the kernel's own word, until the timer expired.
fn wait_until_due(timer: &OwnedFd) {
    while descriptor::poll_now(timer.as_fd(), libc::POLLIN).expect("poll") == 0 {
        std::thread::yield_now();
    }
}

#[test]
fn unread_expirations_are_read_from_the_copy() {
    let once = armed(libc::CLOCK_MONOTONIC, 0, 1, 0);
    wait_until_due(&once);
    let state = timerfd::capture(once.as_fd(), None).expect("capture");
    assert_eq!((state.ticks, state.expiry_ns), (1, 0));
    let copy = timerfd::restore(&state).expect("restore");
    assert_eq!(read_some(copy.as_fd(), 8), 1u64.to_ne_bytes());
    assert_eq!(read_error(copy.as_fd()), Some(libc::EAGAIN));

    // First expiry now, the next ones far away: however slow this machine, there is one tick.
    let periodic = armed(libc::CLOCK_MONOTONIC, 0, 1, 1000 * SECOND);
    wait_until_due(&periodic);
    let state = timerfd::capture(periodic.as_fd(), None).expect("capture");
    assert_eq!(state.ticks, 1);
    assert_ne!(state.expiry_ns, 0, "the next deadline is known");
    let copy = timerfd::restore(&state).expect("restore");
    assert_eq!(read_some(copy.as_fd(), 8), 1u64.to_ne_bytes());
    let copied = timerfd::capture(copy.as_fd(), None).expect("capture the copy");
    assert!(copied.expiry_ns.abs_diff(state.expiry_ns) < SECOND);
    assert_eq!(
        read_some(periodic.as_fd(), 8),
        1u64.to_ne_bytes(),
        "the original has it still"
    );
}

#[test]
fn what_became_due_meanwhile_expires_in_the_copy() {
    let original = armed(libc::CLOCK_MONOTONIC, 0, 1000 * SECOND, 0);
    let mut state = timerfd::capture(original.as_fd(), None).expect("capture");
    state.expiry_ns = clock::now_ns(libc::CLOCK_MONOTONIC).expect("clock") - SECOND;
    let copy = timerfd::restore(&state).expect("restore");
    wait_until_due(&copy);
    assert_eq!(read_some(copy.as_fd(), 8), 1u64.to_ne_bytes());

    state.interval_ns = 1000 * SECOND;
    let copy = timerfd::restore(&state).expect("restore");
    assert_eq!(read_some(copy.as_fd(), 8), 1u64.to_ne_bytes());
}

/// Whatever falls between the reads of a capture, and however often it is captured and restored: its
/// count and its deadline belong together.
#[test]
fn no_expiration_of_a_fast_timer_is_lost_or_counted_twice() {
    for interval_ns in [100_000, 1_000_000] {
        let start_ns = clock::now_ns(libc::CLOCK_MONOTONIC).expect("clock") + interval_ns;
        let flags = libc::TFD_TIMER_ABSTIME;
        let mut timer = armed(libc::CLOCK_MONOTONIC, flags, start_ns, interval_ns);
        let mut read = 0;
        let mut known = None;
        for round in 0..300u64 {
            let state = timerfd::capture(timer.as_fd(), known.as_ref()).expect("capture");
            let counted = read + state.ticks;
            let due = (state.expiry_ns + interval_ns / 2 - start_ns) / interval_ns;
            assert_eq!(counted, due, "round {round}: {state:?} from {start_ns}");
            known = Some(state);
            match round % 3 {
                // A replica's first capture knows nothing of the ones before.
                0 => {
                    timer = timerfd::restore(known.as_ref().expect("state")).expect("restore");
                    known = None;
                }
                1 => {
                    wait_until_due(&timer);
                    let bytes = read_some(timer.as_fd(), 8);
                    read += u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
                }
                _ => {}
            }
        }
    }
}

/// An expiration between the arming of a copy and the writing of its count stays counted.
#[test]
fn a_count_is_not_written_over_an_expiration() {
    const INTERVAL_NS: u64 = 100_000;
    let start_ns = clock::now_ns(libc::CLOCK_MONOTONIC).expect("clock");
    let original = armed(
        libc::CLOCK_MONOTONIC,
        libc::TFD_TIMER_ABSTIME,
        start_ns,
        INTERVAL_NS,
    );
    let state = timerfd::capture(original.as_fd(), None).expect("capture");
    for _ in 0..5_000 {
        let copy = timerfd::restore(&state).expect("restore");
        let copied = timerfd::capture(copy.as_fd(), Some(&state)).expect("capture the copy");
        let passed = (copied.expiry_ns - state.expiry_ns) / INTERVAL_NS;
        assert_eq!(
            copied.ticks,
            state.ticks + passed,
            "{copied:?} of {state:?}"
        );
    }
}

#[test]
fn a_disarmed_timer_stays_so() {
    let original = clock::create(libc::CLOCK_MONOTONIC, 0).expect("timerfd_create");
    let state = timerfd::capture(original.as_fd(), None).expect("capture");
    let copy = timerfd::restore(&state).expect("restore");
    assert_eq!(
        timerfd::capture(copy.as_fd(), None).expect("capture"),
        state
    );
    assert_eq!(
        descriptor::poll_now(copy.as_fd(), libc::POLLIN).expect("poll"),
        0
    );
}
