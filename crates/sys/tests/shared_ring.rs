//! The ring between threads, and between processes one of which is killed at any moment.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use unbroken_sys::shared::{Consumer, Producer, RingMemory};
use unbroken_sys::wait::wait;
use unbroken_sys::{process, ptrace};

/// A small generator (splitmix64): the tests need cheap, seeded variety and nothing else.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Record `number` has a length and content that follow from its number.
fn length_of(number: u64, most_bytes: usize) -> usize {
    8 + (Random(number).next() as usize) % (most_bytes - 8)
}

fn fill(number: u64, record: &mut [u8]) {
    record[..8].copy_from_slice(&number.to_le_bytes());
    for (index, byte) in record[8..].iter_mut().enumerate() {
        *byte = (number as usize).wrapping_mul(31).wrapping_add(index) as u8;
    }
}

fn check(number: u64, most_bytes: usize, record: &[u8]) {
    let mut expected = vec![0; length_of(number, most_bytes)];
    fill(number, &mut expected);
    assert!(record == expected, "record {number} is torn");
}

fn produce_one(producer: &mut Producer, number: u64, most_bytes: usize) -> bool {
    let length = length_of(number, most_bytes);
    let Some(mut reservation) = producer.reserve(most_bytes) else {
        return false;
    };
    fill(number, &mut reservation[..length]);
    reservation.publish(length);
    producer.wake_consumer().unwrap();
    true
}

fn consume_one(consumer: &mut Consumer, number: u64, most_bytes: usize) -> bool {
    let Some(record) = consumer.peek().unwrap() else {
        return false;
    };
    check(number, most_bytes, record);
    consumer.consume().unwrap();
    true
}

#[test]
fn each_end_is_claimed_once() {
    let ring = RingMemory::create("unbroken-ring-test", 1 << 16).unwrap();
    let other = RingMemory::from_fd(ring.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let _producer = ring.producer().unwrap();
    let _consumer = other.consumer().unwrap();
    assert_eq!(
        other.producer().unwrap_err().kind(),
        std::io::ErrorKind::AlreadyExists
    );
    assert_eq!(
        ring.consumer().unwrap_err().kind(),
        std::io::ErrorKind::AlreadyExists
    );
}

#[test]
fn records_come_out_as_they_went_in_wherever_they_wrap() {
    let ring = RingMemory::create("unbroken-ring-test", 1 << 20).unwrap();
    let (mut producer, mut consumer) = (ring.producer().unwrap(), ring.consumer().unwrap());
    let mut random = Random(7);
    let (mut written, mut read) = (0, 0);
    let most = 100_000;
    while read < 1_000 {
        if random.next().is_multiple_of(2) {
            written += u64::from(produce_one(&mut producer, written, most));
        } else {
            let there = consume_one(&mut consumer, read, most);
            assert_eq!(there, written > read);
            read += u64::from(there);
        }
    }
}

#[test]
fn one_record_may_fill_the_ring_and_a_longer_one_never_fits() {
    let ring = RingMemory::create("unbroken-ring-test", 1 << 16).unwrap();
    let (mut producer, mut consumer) = (ring.producer().unwrap(), ring.consumer().unwrap());
    let most = ring.largest_record_bytes();
    for round in 0..5 {
        assert!(producer.reserve(most + 1).is_none());
        let mut reservation = producer.reserve(most).unwrap();
        reservation.fill(round);
        reservation.publish(most);
        assert!(producer.reserve(0).is_none());
        assert!(!producer.wait_for_room(1, Some(Duration::ZERO)).unwrap());
        assert!(
            consumer
                .peek()
                .unwrap()
                .unwrap()
                .iter()
                .all(|byte| *byte == round)
        );
        consumer.consume().unwrap();
        // An odd length moves the next round to another offset.
        producer.reserve(100).unwrap().publish(33);
        consumer.consume().unwrap();
        assert!(producer.is_drained());
    }
}

#[test]
fn a_dropped_reservation_leaves_nothing() {
    let ring = RingMemory::create("unbroken-ring-test", 1 << 16).unwrap();
    let (mut producer, mut consumer) = (ring.producer().unwrap(), ring.consumer().unwrap());
    producer.reserve(1000).unwrap().fill(0xff);
    assert!(consumer.peek().unwrap().is_none());
    assert!(!consumer.wait_or(Some(Duration::ZERO), || false).unwrap());
    assert!(produce_one(&mut producer, 0, 500));
    assert!(consume_one(&mut consumer, 0, 500));
}

#[test]
fn sleepers_on_both_ends_are_woken() {
    let ring = RingMemory::create("unbroken-ring-test", 1 << 16).unwrap();
    let (mut producer, mut consumer) = (ring.producer().unwrap(), ring.consumer().unwrap());
    let (records, most) = (3_000, 20_000);
    let writer = std::thread::spawn(move || {
        for number in 0..records {
            while !produce_one(&mut producer, number, most) {
                producer.wait_for_room(most, None).unwrap();
            }
        }
    });
    for number in 0..records {
        while !consume_one(&mut consumer, number, most) {
            consumer.wait_or(None, || false).unwrap();
        }
    }
    writer.join().unwrap();
}

const CHILD_RING: &str = "UNBROKEN_TEST_RING";
const CHILD_MOST_BYTES: usize = 40_000;

/// Not a test by itself: the producer process of the test below, until it is killed.
#[test]
fn producer_process() {
    let Ok(path) = std::env::var(CHILD_RING) else {
        return;
    };
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut producer = RingMemory::from_fd(file.into())
        .unwrap()
        .producer()
        .unwrap();
    println!("producing");
    for number in 0.. {
        while !produce_one(&mut producer, number, CHILD_MOST_BYTES) {
            producer.wait_for_room(CHILD_MOST_BYTES, None).unwrap();
        }
    }
}

#[test]
fn a_producer_killed_at_any_moment_leaves_whole_records() {
    let mut random = Random(0x5eed);
    for _ in 0..15 {
        let ring = RingMemory::create("unbroken-ring-test", 1 << 20).unwrap();
        let mut consumer = ring.consumer().unwrap();
        let path = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            ring.as_fd().as_raw_fd()
        );
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "producer_process", "--nocapture"])
            .env(CHILD_RING, path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        assert!(
            output
                .lines()
                .any(|line| line.unwrap().contains("producing"))
        );
        let enough = random.next() % 100;
        let mut number = 0;
        while number < enough {
            if !consume_one(&mut consumer, number, CHILD_MOST_BYTES) {
                consumer.wait_or(None, || false).unwrap();
            } else {
                number += 1;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        while consume_one(&mut consumer, number, CHILD_MOST_BYTES) {
            number += 1;
        }
        assert!(consumer.peek().unwrap().is_none());
    }
}

const STEPPED_RING: &str = "UNBROKEN_TEST_STEPPED_RING";
const STEPPED_BYTES: usize = 1000;

/// Not a test by itself: publishes one record when it is told to.
#[test]
fn stepped_producer() {
    let Ok(path) = std::env::var(STEPPED_RING) else {
        return;
    };
    let file = File::options().read(true).write(true).open(path).unwrap();
    let ring = RingMemory::from_fd(file.into()).unwrap();
    let mut producer = ring.producer().unwrap();
    let mut reservation = producer.reserve(STEPPED_BYTES).unwrap();
    let length = length_of(0, STEPPED_BYTES);
    let own = std::fs::read_link("/proc/thread-self").unwrap();
    println!("\nthread {}", own.file_name().unwrap().display());
    std::io::stdin().read_line(&mut String::new()).unwrap();
    fill(0, &mut reservation[..length]);
    reservation.publish(length);
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Killed after any instruction, it would leave what the consumer sees here: all or nothing.
#[test]
fn a_record_shows_by_one_instruction() {
    let ring = RingMemory::create("unbroken-ring-test", 1 << 16).unwrap();
    let mut consumer = ring.consumer().unwrap();
    let descriptor = ring.as_fd().as_raw_fd();
    let path = format!("/proc/{}/fd/{descriptor}", std::process::id());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "stepped_producer", "--nocapture"])
        .env(STEPPED_RING, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let thread: i32 = lines
        .find_map(|line| line.unwrap().strip_prefix("thread ")?.parse().ok())
        .unwrap();
    ptrace::seize(thread, 0).unwrap();
    ptrace::interrupt(thread).unwrap();
    wait(thread).unwrap();
    child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    let shown_after = (1..1_000_000).find(|_| {
        ptrace::single_step(thread, 0).unwrap();
        wait(thread).unwrap();
        consume_one(&mut consumer, 0, STEPPED_BYTES)
    });
    // It had to fill the record first.
    assert!(
        shown_after.is_some_and(|steps| steps > STEPPED_BYTES / 2),
        "{shown_after:?}"
    );
    // A process whose traced thread nobody waits for has not ended.
    ptrace::detach(thread, 0).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A sleep of this length was not woken from.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_producer_does_not_wait_for_a_consumer_that_is_gone() {
    let ring = RingMemory::create("unbroken-test", 4096).unwrap();
    let mut producer = ring.producer().unwrap();
    let whole = ring.largest_record_bytes();
    producer.reserve(whole).unwrap().publish(whole);
    let (tell, told) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn(move || {
        tell.send(process::this_thread()).unwrap();
        let started = Instant::now();
        let fits = producer.wait_for_room(1, Some(PATIENCE)).unwrap();
        (fits, producer.is_abandoned(), started.elapsed() < PATIENCE)
    });
    let state = format!("/proc/self/task/{}/stat", told.recv().unwrap());
    while !std::fs::read_to_string(&state).unwrap().contains(") S ") {
        std::thread::yield_now();
    }
    ring.abandon().unwrap();
    assert_eq!(waiting.join().unwrap(), (false, true, true));
}
