//! What is made of the registers of a thread, one case a line.

use super::call::Call;
use super::look::Look;
use super::slot::{Content, SlotsInUse};
use super::wait::{Finding, Progress, Wait, find};
use std::collections::BTreeMap;
use unbroken_image::{BlockedCall, Registers};
use unbroken_sys::remote_code::slot::{NUMBER, USED_BYTES, parse};

const MS: u64 = 1_000_000;
const EINTR: i64 = -(libc::EINTR as i64);
const RESTARTBLOCK: i64 = -516;
/// Behind a `syscall` instruction.
const AFTER: u64 = 0x1002;
const TIME: u64 = 0x8000;

/// A process that is only what is asked of it.
#[derive(Default)]
struct Paper {
    now_ns: u64,
    memory: BTreeMap<u64, Vec<u8>>,
    socket_timeout_ns: Option<u64>,
    broken_off_ns: Option<u64>,
}

impl Look for Paper {
    fn now_ns(&mut self) -> u64 {
        self.now_ns
    }

    fn read(&mut self, address: u64, bytes: &mut [u8]) -> bool {
        let Some((start, held)) = self.memory.range(..=address).next_back() else {
            return false;
        };
        let offset = (address - start) as usize;
        let found = held.get(offset..offset + bytes.len());
        found.map(|found| bytes.copy_from_slice(found)).is_some()
    }

    fn broken_off_ns(&mut self, _: u64) -> Option<u64> {
        self.broken_off_ns
    }

    fn socket_timeout_ns(&mut self, _: i32, _: i32) -> Option<u64> {
        self.socket_timeout_ns
    }
}

impl Paper {
    fn at(now_ns: u64) -> Paper {
        let mut paper = Paper {
            now_ns,
            ..Paper::default()
        };
        // 250 ms, and code: mov eax, SYS_poll; syscall; nop.
        let time = [0u64, 250 * MS].map(u64::to_le_bytes).concat();
        paper.memory.insert(TIME, time);
        let code = [0xb8, 7, 0, 0, 0, 0x0f, 0x05, 0x90, 0x90];
        paper.memory.insert(AFTER - 7, code.to_vec());
        paper
    }
}

fn registers(number: i64, result: i64) -> Registers {
    Registers {
        orig_rax: number as u64,
        rax: result as u64,
        rip: AFTER,
        rsp: 0x7000,
        ..Registers::default()
    }
}

fn waiting(finding: Finding) -> (Wait, Progress) {
    match finding {
        Finding::Waiting(wait, progress) => (wait, progress),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_ending_is_told_from_the_others() {
    let cases = [
        (libc::SYS_epoll_wait, EINTR, Some(Progress::Ended)),
        (libc::SYS_epoll_wait, 1, None),
        (libc::SYS_epoll_wait, 0, None),
        (libc::SYS_rt_sigtimedwait, EINTR, Some(Progress::Ended)),
        (libc::SYS_recvfrom, EINTR, Some(Progress::Ended)),
        (libc::SYS_recvfrom, -512, None),
        (libc::SYS_accept4, EINTR, Some(Progress::Ended)),
        (libc::SYS_ppoll, -514, None),
        (libc::SYS_ppoll, EINTR, Some(Progress::Ended)),
        // A real one: nothing but a handler ends these so.
        (libc::SYS_poll, EINTR, None),
        (libc::SYS_nanosleep, EINTR, None),
        (libc::SYS_poll, RESTARTBLOCK, Some(Progress::Suspended)),
        (libc::SYS_futex, RESTARTBLOCK, Some(Progress::Suspended)),
        // Of a call that nobody knows, only that it is to be made again.
        (100_000, RESTARTBLOCK, Some(Progress::Suspended)),
        // In user code these are numbers like any others.
        (-1, EINTR, None),
        (-1, RESTARTBLOCK, None),
    ];
    for (number, result, expected) in cases {
        let finding = find(&registers(number, result), None, &mut Paper::at(0));
        let progress = match finding {
            Finding::Waiting(_, progress) => Some(progress),
            _ => None,
        };
        assert_eq!(progress, expected, "call {number} with {result}");
    }
}

/// Whichever is earlier, should the kernel have told of something else.
#[test]
fn a_deadline_that_the_kernel_told_is_taken_if_it_is_not_late() {
    let deadline = |number, set: fn(&mut Registers), told_ms: u64| {
        let mut registers = registers(number, EINTR);
        set(&mut registers);
        let mut paper = Paper::at(1000 * MS);
        paper.broken_off_ns = Some(told_ms * MS);
        paper.socket_timeout_ns = Some(100 * MS);
        let (wait, _) = waiting(find(&registers, None, &mut paper));
        wait.deadline_ns.map(|deadline_ns| deadline_ns / MS)
    };
    let in_100_ms = |r: &mut Registers| r.r10 = 100;
    let epoll = libc::SYS_epoll_wait;
    assert_eq!(deadline(epoll, in_100_ms, 1040), Some(1040));
    assert_eq!(deadline(epoll, in_100_ms, 990), Some(990));
    assert_eq!(deadline(epoll, in_100_ms, 1101), Some(1100));
    assert_eq!(deadline(epoll, |r| r.r10 = u64::MAX, 1040), None);
    assert_eq!(deadline(libc::SYS_recvfrom, |_| {}, 1040), Some(1040));
    // It may have slept for memory.
    assert_eq!(deadline(libc::SYS_sendto, |_| {}, 1040), Some(1100));
}

#[test]
fn deadlines_are_read_from_where_the_call_has_them() {
    let with = |number, change: fn(&mut Registers)| {
        let mut registers = registers(number, 0);
        change(&mut registers);
        registers
    };
    let cases = [
        (with(libc::SYS_epoll_wait, |r| r.r10 = 100), Some(100)),
        // The kernel takes an int: the upper half says nothing.
        (
            with(libc::SYS_epoll_wait, |r| r.r10 = 5 << 32 | 100),
            Some(100),
        ),
        (
            with(libc::SYS_epoll_wait, |r| r.r10 = u64::from(u32::MAX)),
            None,
        ),
        (with(libc::SYS_epoll_pwait2, |r| r.r10 = TIME), Some(250)),
        (with(libc::SYS_epoll_pwait2, |r| r.r10 = 0), None),
        (with(libc::SYS_epoll_pwait2, |r| r.r10 = 1), None),
        (with(libc::SYS_rt_sigtimedwait, |r| r.rdx = TIME), Some(250)),
        (with(libc::SYS_poll, |r| r.rdx = 7), Some(7)),
        (with(libc::SYS_nanosleep, |r| r.rdi = TIME), Some(250)),
        // What is left, exactly: the kernel has written it down.
        (with(libc::SYS_nanosleep, |r| r.rsi = TIME), Some(250)),
        (
            with(libc::SYS_clock_nanosleep, |r| {
                (r.rdi, r.rdx) = (1, TIME);
            }),
            Some(250),
        ),
        (
            with(libc::SYS_clock_nanosleep, |r| {
                (r.rsi, r.rdx) = (1, TIME);
            }),
            None,
        ),
        (
            with(libc::SYS_clock_nanosleep, |r| {
                (r.rdi, r.rdx) = (libc::CLOCK_PROCESS_CPUTIME_ID as u64, TIME);
            }),
            None,
        ),
        (
            with(libc::SYS_futex, |r| (r.rsi, r.r10) = (128, TIME)),
            Some(250),
        ),
        (
            with(libc::SYS_futex, |r| (r.rsi, r.r10) = (128 | 9, TIME)),
            None,
        ),
        (with(libc::SYS_read, |_| {}), Some(30)),
        (with(libc::SYS_sendto, |_| {}), Some(30)),
    ];
    for (registers, expected_ms) in cases {
        let mut paper = Paper::at(1000 * MS);
        paper.socket_timeout_ns = Some(30 * MS);
        let call = Call::of(registers.orig_rax, &registers).unwrap();
        let deadline = call.deadline_ns(&registers, &mut paper);
        let expected = expected_ms.map(|ms| (1000 + ms) * MS);
        assert_eq!(deadline, expected, "{registers:?}");
    }
}

#[test]
fn a_call_in_its_slot_keeps_its_deadline_and_the_next_has_its_own() {
    let mut slots = SlotsInUse::default();
    let slot = slots.take().unwrap();
    let mut made = registers(libc::SYS_epoll_wait, EINTR);
    made.r10 = 100;
    let (mut wait, progress) = waiting(find(&made, None, &mut Paper::at(10 * MS)));
    assert_eq!(
        (progress, wait.deadline_ns),
        (Progress::Ended, Some(110 * MS))
    );

    wait.slot = Some(slot);
    let (again, content) = wait.in_slot(slot, 70 * MS + 1);
    let view = (again.rip, again.rax as i64, again.orig_rax, again.r10);
    // 39.999999 ms are left: never early.
    assert_eq!(view, (slot.address(), libc::SYS_epoll_wait, u64::MAX, 40));
    assert_eq!((content.value, content.return_to), (100, AFTER));
    assert_eq!(wait.in_slot(slot, 500 * MS).0.r10, 0);

    // Not begun, then ended again: the same call.
    let find_then = |registers: &Registers| find(registers, Some(wait), &mut Paper::at(90 * MS));
    assert_eq!(find_then(&again), Finding::Waiting(wait, Progress::Before));
    let blocked = Registers {
        rip: slot.address() + 2,
        rax: EINTR as u64,
        orig_rax: libc::SYS_epoll_wait as u64,
        rcx: slot.address() + 2,
        ..again
    };
    assert_eq!(find_then(&blocked), Finding::Waiting(wait, Progress::Ended));

    // It returned, seen in the kernel or on the way out of the slot.
    for (offset, orig_rax) in [
        (2, libc::SYS_epoll_wait as u64),
        (2, u64::MAX),
        (12, u64::MAX),
        (22, u64::MAX),
    ] {
        let returned = Registers {
            rip: slot.address() + offset,
            rax: 1,
            orig_rax,
            ..blocked
        };
        let Finding::Returned(outside) = find_then(&returned) else {
            panic!("at {offset}");
        };
        let expected = Registers {
            rax: 1,
            orig_rax,
            rcx: AFTER,
            ..made
        };
        assert_eq!(outside, expected);
    }

    // The program's next call looks like its last.
    let (next, _) = waiting(find_then(&made));
    assert_eq!((next.deadline_ns, next.slot), (Some(190 * MS), None));
}

#[test]
fn what_is_left_of_a_select_is_corrected_where_the_kernel_wrote_it() {
    let slot = SlotsInUse::default().take().unwrap();
    let mut made = registers(libc::SYS_ppoll, -514);
    made.rdx = TIME;
    let (mut wait, progress) = waiting(find(&made, None, &mut Paper::at(MS)));
    assert_eq!(
        (progress, wait.deadline_ns),
        (Progress::Ended, Some(251 * MS))
    );
    wait.slot = Some(slot);
    let (again, _) = wait.in_slot(slot, 11 * MS);
    assert_eq!((again.rip, again.rdx), (slot.address(), TIME));
    let left = [0u64, 240 * MS].map(u64::to_le_bytes).concat();
    let (address, bytes) = wait.correction(11 * MS).unwrap();
    assert_eq!((address, &bytes[..]), (TIME, &left[..]));
    // The replica corrects it, too.
    let (registers, call) = wait.for_replica(false);
    let there = Wait::of_image(&registers, call.unwrap());
    assert_eq!(there.correction(11 * MS), Some((address, bytes)));

    let stopped = Registers {
        rip: slot.address() + 2,
        orig_rax: libc::SYS_ppoll as u64,
        rax: -514_i64 as u64,
        ..again
    };
    let (same, progress) = waiting(find(&stopped, Some(wait), &mut Paper::at(20 * MS)));
    assert_eq!((same, progress), (wait, Progress::Ended));

    // Memory that cannot be written any more: the time that is left goes into the slot.
    let stopped = Registers {
        rax: EINTR as u64,
        ..stopped
    };
    let (same, _) = waiting(find(&stopped, Some(wait), &mut Paper::at(20 * MS)));
    assert_eq!(
        (same.correction(20 * MS), same.deadline_ns),
        (None, Some(251 * MS))
    );
    assert_eq!(same.in_slot(slot, 0).0.rdx, slot.time_address());
}

#[test]
fn a_suspended_call_keeps_its_number_and_its_deadline() {
    let mut made = registers(libc::SYS_poll, RESTARTBLOCK);
    made.rdx = 60;
    let (wait, _) = waiting(find(&made, None, &mut Paper::at(0)));
    let restarted = registers(libc::SYS_restart_syscall, RESTARTBLOCK);
    let restarted = Registers {
        rdx: 60,
        ..restarted
    };
    let (same, progress) = waiting(find(&restarted, Some(wait), &mut Paper::at(50 * MS)));
    assert_eq!((same, progress), (wait, Progress::Suspended));

    // Set back by the kernel, about to go on.
    let before = Registers {
        rip: AFTER - 2,
        rax: libc::SYS_restart_syscall as u64,
        ..made
    };
    let (_, progress) = waiting(find(&before, None, &mut Paper::at(0)));
    assert_eq!(progress, Progress::Before);

    // Whatever waits here long after the deadline is another, as is one with other arguments, and
    // one that nothing is known of. The code says which call it is.
    let other = Registers {
        rdx: 61,
        ..restarted
    };
    for (registers, known, now) in [
        (restarted, Some(wait), 1000 * MS),
        (other, Some(wait), 0),
        (restarted, None, 0),
    ] {
        let (fresh, _) = waiting(find(&registers, known, &mut Paper::at(now)));
        assert_eq!(fresh.number(), libc::SYS_poll as u64);
        assert_eq!(fresh.deadline_ns, Some(now + registers.rdx * MS));
    }
    // No code that tells: nothing is made up.
    let elsewhere = Registers {
        rip: 0x5002,
        ..restarted
    };
    let finding = find(&elsewhere, None, &mut Paper::at(0));
    assert_eq!(finding, Finding::NotWaiting);
}

#[test]
fn a_replica_makes_the_call_unless_a_handler_is_due() {
    let mut made = registers(libc::SYS_nanosleep, RESTARTBLOCK);
    made.rdi = TIME;
    let (wait, _) = waiting(find(&made, None, &mut Paper::at(MS)));
    let (again, call) = wait.for_replica(false);
    let view = (again.rip, again.rax as i64, again.orig_rax, again.rdi);
    assert_eq!(view, (AFTER - 2, libc::SYS_nanosleep, u64::MAX, TIME));
    let expected = BlockedCall {
        number: libc::SYS_nanosleep as u64,
        deadline_ns: Some(251 * MS),
        writes_back: false,
    };
    assert_eq!(call, Some(expected));

    let there = Wait::of_image(&again, expected);
    let slot = SlotsInUse::default().take().unwrap();
    let (registers, content) = there.in_slot(slot, 200 * MS);
    assert_eq!(registers.rdi, slot.time_address());
    let left = [0, 51 * MS].map(u64::to_le_bytes).concat();
    assert_eq!(content.time[..], left[..]);

    let (ended, call) = wait.for_replica(true);
    assert_eq!((ended.rip, ended.rax as i64, call), (AFTER, EINTR, None));
}

#[test]
fn a_socket_past_its_deadline_ends_as_the_kernel_ends_it() {
    for (number, expected) in [
        (libc::SYS_recvmsg, -i64::from(libc::EAGAIN)),
        (libc::SYS_accept4, -i64::from(libc::EAGAIN)),
        (libc::SYS_connect, -i64::from(libc::EINPROGRESS)),
    ] {
        let mut paper = Paper::at(0);
        paper.socket_timeout_ns = Some(100 * MS);
        let (wait, _) = waiting(find(&registers(number, EINTR), None, &mut paper));
        assert!(!wait.is_socket_past(99 * MS));
        assert!(wait.is_socket_past(100 * MS));
        assert_eq!(wait.timed_out().rax as i64, expected);
        assert_eq!(wait.timed_out().rip, AFTER);
    }
}

#[test]
fn another_tracer_takes_a_slot_over() {
    let slot = SlotsInUse::default().take().unwrap();
    let mut made = registers(libc::SYS_epoll_wait, EINTR);
    made.r10 = 100;
    let (wait, _) = waiting(find(&made, None, &mut Paper::at(0)));
    let (again, content) = wait.in_slot(slot, 60 * MS);
    let mut paper = Paper::at(80 * MS);
    let bytes: [u8; USED_BYTES] = content.bytes();
    assert!(parse(&bytes[..NUMBER]).is_some());
    paper.memory.insert(slot.address(), bytes.to_vec());
    assert_eq!(Content::read(slot, &mut paper), Some(content));
    let (taken, progress) = waiting(find(&again, None, &mut paper));
    assert_eq!((progress, taken.slot), (Progress::Before, Some(slot)));
    assert_eq!(taken.again(), wait.again());
    // Its deadline was the other tracer's; it gets its whole time.
    assert_eq!(taken.deadline_ns, Some(180 * MS));
    // A slot that holds nothing of ours is nobody's.
    assert_eq!(find(&again, None, &mut Paper::at(0)), Finding::NotWaiting);
}
