//! Whether a process works, as a pass over its threads says it.
#![allow(clippy::unwrap_used)]

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use unbroken_sys::bpf::{ThreadProgram, ThreadReader};

const PATIENCE: Duration = Duration::from_secs(20);

fn shell(text: &str) -> Child {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(text).stdin(Stdio::piped());
    shell.spawn().unwrap()
}

fn reader(child: &Child) -> ThreadReader {
    let program = ThreadProgram::load().unwrap();
    program.reader(child.id().cast_signed()).unwrap()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "never {what}");
    }
}

#[test]
fn one_that_waits_does_not_run_and_one_that_computes_does() {
    let mut child = shell("read line; while :; do :; done");
    let reader = reader(&child);
    until("waited", || !reader.any_runs().unwrap());
    let looks = (0..100).filter(|_| reader.any_runs().unwrap()).count();
    assert_eq!(looks, 0, "it waits for its input");
    drop(child.stdin.take());
    until("worked", || reader.any_runs().unwrap());
    let looks = (0..100).filter(|_| reader.any_runs().unwrap()).count();
    assert_eq!(looks, 100, "it does nothing but compute");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!reader.any_runs().unwrap(), "it is gone");
}

/// Any thread counts, not the first.
#[test]
fn a_thread_that_works_is_seen_among_those_that_wait() {
    let reader = ThreadProgram::load()
        .and_then(|program| program.reader(std::process::id().cast_signed()))
        .unwrap();
    // The first thread of a test waits for this one.
    assert!(reader.any_runs().unwrap());
}
