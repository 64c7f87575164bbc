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

/// How often a timer is read until a reading tells all: what it had left and how often it had
/// expired, as of one moment. Expirations in between make another necessary, and so does being
/// kept from the processor. A timer that is disarmed cannot be told from one whose interrupt is
/// late, a few microseconds, so it takes all of these.
const READINGS: usize = 16;

/// Of one that expires again and again while it is read.
const READINGS_MAX: usize = 256;

/// Readings that lie closer together than this need no better one.
const CLOSE_NS: u64 = 2_000;

/// How often a timer is armed until it has not expired before its count stands.
const ARMINGS: usize = 16;

/// How far a deadline that was reckoned when it was first read may lie from the true one, beyond
/// what later readings leave open.
const FIRST_ERROR_NS: u64 = 20_000;

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
    let Moment {
        shown, deadline, ..
    } = read_moment(fd)?;
    let expiry_ns = deadline.map_or(0, |between| exact(between, shown.interval_ns, previous));
    Ok(TimerDescriptor {
        flags,
        clock: shown.clock,
        set_flags: arming_flags(shown.clock, shown.set_flags),
        ticks: shown.ticks,
        expiry_ns,
        interval_ns: shown.interval_ns,
    })
}

/// A timer at one moment.
struct Moment {
    shown: Shown,
    /// What the deadline lies between; `None` when it is disarmed.
    deadline: Option<(u64, u64)>,
    /// How far apart the readings lie that it is made of.
    width_ns: u64,
}

/// Reads it until count and deadline belong together, or as often as is worth it.
fn read_moment(fd: BorrowedFd<'_>) -> Result<Moment, Error> {
    let mut text = Vec::new();
    let mut best: Option<Moment> = None;
    let mut last = None;
    for number in 1..=READINGS_MAX {
        let (moment, is_whole) = read_once(fd, &mut text)?;
        let is_enough = number >= READINGS && (best.is_some() || moment.deadline.is_none());
        if !is_whole {
            last = Some(moment);
            if is_enough {
                break;
            }
            continue;
        }
        let is_close = moment.deadline.is_none() || moment.width_ns <= CLOSE_NS;
        if best
            .as_ref()
            .is_none_or(|best| moment.width_ns < best.width_ns)
        {
            best = Some(moment);
        }
        if is_close || is_enough {
            break;
        }
    }
    best.or(last).ok_or_else(|| Error::Answer {
        operation: "read",
        subject: SUBJECT.to_owned(),
        answer: String::from_utf8_lossy(&text).into_owned(),
    })
}

/// One reading, and whether it is of one moment.
fn read_once(fd: BorrowedFd<'_>, text: &mut Vec<u8>) -> Result<(Moment, bool), Error> {
    // A periodic timer that expired unread reads as 0 in fdinfo; this moves it on to its next
    // deadline, which a reader would have done (fs/timerfd.c).
    timer::get(fd).during("read", SUBJECT)?;
    let now = |clock| timer::now_ns(clock).during("read the clock of", SUBJECT);
    let start_ns = now(libc::CLOCK_MONOTONIC)?;
    fdinfo::own_fdinfo(fd, text).during("read", SUBJECT)?;
    let shown = parse(text)?;
    let clock = counting_clock(shown.clock, shown.set_flags);
    let before_ns = now(clock)?;
    let left_ns = timer::get(fd).during("read", SUBJECT)?.value_ns;
    let after_ns = now(clock)?;
    let took_ns = now(libc::CLOCK_MONOTONIC)?.saturating_sub(start_ns);
    let has_fired = shown.interval_ns == 0 && shown.ticks != 0 && left_ns == 0;
    let moment = Moment {
        deadline: (left_ns != 0).then_some((before_ns + left_ns, after_ns + left_ns)),
        width_ns: after_ns.saturating_sub(before_ns),
        shown,
    };
    // What was left when the count was read has not passed since, so nothing was counted since.
    let is_whole = has_fired || moment.shown.remaining_ns > took_ns && left_ns != 0;
    Ok((moment, is_whole))
}

/// The deadline that `previous` leads to by whole intervals, when it agrees with what the deadline
/// was found to lie between. Otherwise the later end of that: no timer fires before it is due.
fn exact(
    (earliest_ns, latest_ns): (u64, u64),
    interval_ns: u64,
    previous: Option<&TimerDescriptor>,
) -> u64 {
    let Some(previous) =
        previous.filter(|known| known.expiry_ns != 0 && known.interval_ns == interval_ns)
    else {
        return latest_ns;
    };
    let middle_ns = earliest_ns + (latest_ns - earliest_ns) / 2;
    let passed_ns = middle_ns.saturating_sub(previous.expiry_ns);
    let steps = (passed_ns + interval_ns / 2)
        .checked_div(interval_ns)
        .unwrap_or(0);
    let candidate_ns = previous.expiry_ns + steps * interval_ns;
    let agrees =
        candidate_ns + FIRST_ERROR_NS >= earliest_ns && candidate_ns <= latest_ns + FIRST_ERROR_NS;
    if agrees { candidate_ns } else { latest_ns }
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
    for _ in 0..ARMINGS {
        if arm(fd.as_fd(), state)? {
            break;
        }
    }
    descriptor::set_status_flags(fd.as_fd(), state.flags).during("set the flags of", SUBJECT)?;
    Ok(fd)
}

/// Arms it, and gives it its count. False when it may have expired in between: the kernel has then
/// counted what the count written over it lacks.
fn arm(fd: BorrowedFd<'_>, state: &TimerDescriptor) -> Result<bool, Error> {
    let clock = counting_clock(state.clock, state.set_flags);
    let now = || timer::now_ns(clock).during("read the clock of", SUBJECT);
    let now_ns = now()?;
    let (due_ns, missed) = next_deadline(state, now_ns);
    if due_ns != 0 || state.set_flags != 0 {
        let absolute = state.set_flags & ABSOLUTE != 0;
        let value_ns = match due_ns {
            0 => 0,
            due if absolute => due,
            due => due.saturating_sub(now_ns).max(1),
        };
        let setting = Setting {
            value_ns,
            interval_ns: state.interval_ns,
        };
        timer::set(fd, state.set_flags as i32, setting).during("arm", SUBJECT)?;
    }
    // Arming clears the ticks, so they come after.
    let ticks = state.ticks + missed;
    if ticks == 0 {
        return Ok(true);
    }
    timer::set_ticks(fd, ticks).during("set the expirations of", SUBJECT)?;
    Ok(due_ns == 0 || now()? < due_ns)
}

/// How a replica's timer is to be armed. As a rest the deadline would move by the time that passes
/// until the kernel adds it to the clock, with each takeover; for a clock that nobody sets it makes
/// no other difference than what fdinfo shows of it.
fn arming_flags(clock: i32, set_flags: u32) -> u32 {
    match clock {
        libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME => set_flags | ABSOLUTE,
        _ => set_flags,
    }
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
        let near = |ns: u64| (ns - 300, ns + 200);
        assert_eq!(exact(near(5 * second), second, Some(&known)), 5 * second);
        assert_eq!(exact(near(9 * second), second, Some(&known)), 9 * second);
        let elsewhere = 9 * second + second / 2;
        assert_eq!(
            exact(near(elsewhere), second, Some(&known)),
            elsewhere + 200
        );
        let once = periodic(5 * second, 0);
        assert_eq!(exact(near(5 * second), 0, Some(&once)), 5 * second);
        assert_eq!(exact(near(7 * second), 0, Some(&once)), 7 * second + 200);
    }

    #[test]
    fn of_short_intervals_the_nearest_counts() {
        let second = 1_000_000_000;
        for interval in [50_000, 100_000, 1_000_000] {
            let known = periodic(5 * second, interval);
            for steps in [0, 1, 7, 10_000] {
                let due = 5 * second + steps * interval;
                for shift in [0, 900, 5_000] {
                    let between = (due - shift, due - shift + 6_000);
                    assert_eq!(exact(between, interval, Some(&known)), due);
                }
            }
        }
    }

    #[test]
    fn only_a_clock_that_can_be_set_keeps_a_rest() {
        assert_eq!(arming_flags(libc::CLOCK_MONOTONIC, 0), ABSOLUTE);
        assert_eq!(arming_flags(libc::CLOCK_BOOTTIME, 0), ABSOLUTE);
        assert_eq!(arming_flags(libc::CLOCK_REALTIME, 0), 0);
        assert_eq!(
            arming_flags(libc::CLOCK_REALTIME, ABSOLUTE | 2),
            ABSOLUTE | 2
        );
    }
}
