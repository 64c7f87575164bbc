//! timerfds: kept as absolute deadlines, so that the time of the takeover is not added to them.

use crate::methods::{Capture, Look, Means, Methods, Reading};
use crate::restored::{Phase, make_each};
use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::Object;
use unbroken_image::object::TimerDescriptor;
use unbroken_sys::timer::{self, Setting};
use unbroken_sys::{descriptor, fdinfo};

pub(crate) const METHODS: Methods = Methods {
    is_volatile: |_| true,
    look,
    ..Methods::new(
        Capture::Descriptor(|reading, fd, means| {
            let previous = match &reading.state {
                Some(Object::TimerDescriptor(state)) if !means.announced => Some(state),
                _ => None,
            };
            reading.state = Some(Object::TimerDescriptor(capture(fd, previous)?));
            reading.watches.open(&means.holders)
        }),
        &[(Phase::Make, |batch, _, restored| {
            make_each(batch, restored, |_, object| match object {
                Object::TimerDescriptor(state) => restore(state).map(Some),
                _ => Ok(None),
            })
        })],
    )
};

const SUBJECT: &str = "a timerfd";
const ABSOLUTE: u32 = libc::TFD_TIMER_ABSTIME as u32;

/// How far a deadline reckoned from the remaining time may lie from the one known before and
/// still be the same: two clock reads with an interruption between them.
const SAME_DEADLINE_NS: u64 = 1_000_000;

/// How often a timer that reads "nothing left, not expired" is read again. The kernel says that
/// between the deadline and the interrupt that counts the expiration, a few microseconds, and for
/// a timer that is really disarmed, which stays so.
const LATE_INTERRUPT_READS: usize = 16;

/// The clock that the kernel runs a timer on: `CLOCK_REALTIME` timers that are not absolute are
/// `CLOCK_MONOTONIC` ones inside (kernel/time/hrtimer.c `__hrtimer_setup`), alarm clocks are their
/// base clock.
fn counting_clock(clock: i32, set_flags: u32) -> i32 {
    match clock {
        libc::CLOCK_REALTIME if set_flags & ABSOLUTE == 0 => libc::CLOCK_MONOTONIC,
        libc::CLOCK_REALTIME_ALARM => libc::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
        other => other,
    }
}

/// What fdinfo says about a timerfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub clock: i32,
    pub ticks: u64,
    pub set_flags: u32,
    pub remaining_ns: u64,
    pub interval_ns: u64,
}

pub(crate) fn parse(text: &[u8]) -> Result<Shown, Error> {
    let number = |name| fdinfo::field(text, name)?.parse::<u64>().ok();
    let pair = |name| {
        let value = fdinfo::field(text, name)?
            .strip_prefix('(')?
            .strip_suffix(')')?;
        let (seconds, rest) = value.split_once(", ")?;
        let seconds = seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?;
        seconds.checked_add(rest.parse().ok()?)
    };
    let reading = || {
        Some(Shown {
            clock: i32::try_from(number("clockid")?).ok()?,
            ticks: number("ticks")?,
            set_flags: u32::from_str_radix(fdinfo::field(text, "settime flags")?, 8).ok()?,
            remaining_ns: pair("it_value")?,
            interval_ns: pair("it_interval")?,
        })
    };
    reading().ok_or_else(|| Error::Answer {
        operation: "read",
        subject: SUBJECT.to_owned(),
        answer: String::from_utf8_lossy(text).into_owned(),
    })
}

/// Reads out a descriptor of ours that names a timerfd. `previous` is its last state when no
/// `timerfd_settime` was announced since: then the deadline stays exact instead of being reckoned
/// anew from the remaining time.
pub fn capture(
    fd: BorrowedFd<'_>,
    previous: Option<&TimerDescriptor>,
) -> Result<TimerDescriptor, Error> {
    let flags = descriptor::status_flags(fd).during("read the flags of", SUBJECT)?;
    crate::description::refuse_ownership(fd, flags, SUBJECT)?;
    let mut text = Vec::new();
    // A periodic timer that expired unread reads as 0 in fdinfo; this moves it on to its next
    // deadline, which a reader would have done (fs/timerfd.c).
    let mut left = timer::get(fd).during("read", SUBJECT)?;
    fdinfo::own_fdinfo(fd, &mut text).during("read", SUBJECT)?;
    let mut reading = parse(&text)?;
    for _ in 0..LATE_INTERRUPT_READS {
        if left.value_ns != 0 || reading.ticks != 0 {
            break;
        }
        left = timer::get(fd).during("read", SUBJECT)?;
        fdinfo::own_fdinfo(fd, &mut text).during("read", SUBJECT)?;
        reading = parse(&text)?;
    }
    let clock = counting_clock(reading.clock, reading.set_flags);
    let before_ns = timer::now_ns(clock).during("read the clock of", SUBJECT)?;
    let left = timer::get(fd).during("read", SUBJECT)?;
    let expiry_ns = match left.value_ns {
        0 => 0,
        remaining => exact(before_ns + remaining, left.interval_ns, previous),
    };
    Ok(TimerDescriptor {
        flags,
        clock: reading.clock,
        set_flags: reading.set_flags,
        ticks: reading.ticks,
        expiry_ns,
        interval_ns: left.interval_ns,
    })
}

/// The deadline that `previous` leads to by whole intervals, when it is as good as `reckoned_ns`.
fn exact(reckoned_ns: u64, interval_ns: u64, previous: Option<&TimerDescriptor>) -> u64 {
    let Some(previous) = previous.filter(|known| known.expiry_ns != 0) else {
        return reckoned_ns;
    };
    if previous.interval_ns != interval_ns {
        return reckoned_ns;
    }
    let passed_ns = (reckoned_ns + SAME_DEADLINE_NS).saturating_sub(previous.expiry_ns);
    let steps = passed_ns.checked_div(interval_ns).unwrap_or(0);
    let candidate_ns = previous.expiry_ns + steps * interval_ns;
    if candidate_ns.abs_diff(reckoned_ns) <= SAME_DEADLINE_NS {
        candidate_ns
    } else {
        reckoned_ns
    }
}

fn look(reading: &mut Reading, _: &mut Means<'_>) -> Result<Look, Error> {
    reading.watches.read()?;
    let (Some(text), Some(Object::TimerDescriptor(known))) =
        (reading.watches.text(), &reading.state)
    else {
        return Ok(Look::Unknown);
    };
    let now = parse(text)?;
    let is_due = known.expiry_ns != 0 && {
        let clock = counting_clock(known.clock, known.set_flags);
        timer::now_ns(clock).during("read the clock of", SUBJECT)? >= known.expiry_ns
    };
    match is_due || now.ticks != known.ticks {
        true => Ok(Look::Unknown),
        false => Ok(Look::Same),
    }
}

/// Makes a timerfd with that deadline. What became due since the capture counts as expired.
pub fn restore(state: &TimerDescriptor) -> Result<OwnedFd, Error> {
    let fd = timer::create(state.clock, 0).during("create", SUBJECT)?;
    let clock = counting_clock(state.clock, state.set_flags);
    let now_ns = timer::now_ns(clock).during("read the clock of", SUBJECT)?;
    let (value_ns, missed) = next_deadline(state, now_ns);
    if value_ns != 0 || state.set_flags != 0 {
        let absolute = state.set_flags & ABSOLUTE != 0;
        let value_ns = match value_ns {
            0 => 0,
            due if absolute => due,
            due => due.saturating_sub(now_ns).max(1),
        };
        let setting = Setting {
            value_ns,
            interval_ns: state.interval_ns,
        };
        timer::set(fd.as_fd(), state.set_flags as i32, setting).during("arm", SUBJECT)?;
    }
    // Arming clears the ticks, so they come after.
    let ticks = state.ticks + missed;
    if ticks > 0 {
        timer::set_ticks(fd.as_fd(), ticks).during("set the expirations of", SUBJECT)?;
    }
    descriptor::set_status_flags(fd.as_fd(), state.flags).during("set the flags of", SUBJECT)?;
    Ok(fd)
}

/// The deadline to arm at `now_ns` and how many expirations of a periodic timer lie before it. A
/// one-shot deadline in the past is armed as it is: the kernel fires it at once.
fn next_deadline(state: &TimerDescriptor, now_ns: u64) -> (u64, u64) {
    if state.expiry_ns == 0 || state.interval_ns == 0 || state.expiry_ns > now_ns {
        return (state.expiry_ns, 0);
    }
    let missed = (now_ns - state.expiry_ns) / state.interval_ns + 1;
    (state.expiry_ns + missed * state.interval_ns, missed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn periodic(expiry_ns: u64, interval_ns: u64) -> TimerDescriptor {
        TimerDescriptor {
            flags: 0,
            clock: libc::CLOCK_MONOTONIC,
            set_flags: 0,
            ticks: 0,
            expiry_ns,
            interval_ns,
        }
    }

    #[test]
    fn missed_intervals_count_and_the_phase_stays() {
        assert_eq!(next_deadline(&periodic(1000, 100), 999), (1000, 0));
        assert_eq!(next_deadline(&periodic(1000, 100), 1000), (1100, 1));
        assert_eq!(next_deadline(&periodic(1000, 100), 1250), (1300, 3));
        assert_eq!(next_deadline(&periodic(1000, 0), 1250), (1000, 0));
        assert_eq!(next_deadline(&periodic(0, 100), 1250), (0, 0));
    }

    #[test]
    fn a_known_deadline_is_kept_exactly() {
        let second = 1_000_000_000;
        let known = periodic(5 * second, second);
        assert_eq!(exact(5 * second + 300, second, Some(&known)), 5 * second);
        assert_eq!(exact(5 * second - 300, second, Some(&known)), 5 * second);
        assert_eq!(exact(9 * second - 300, second, Some(&known)), 9 * second);
        assert_eq!(
            exact(9 * second + second / 2, second, Some(&known)),
            9 * second + second / 2
        );
        let once = periodic(5 * second, 0);
        assert_eq!(exact(5 * second + 300, 0, Some(&once)), 5 * second);
        assert_eq!(exact(7 * second, 0, Some(&once)), 7 * second);
    }
}
