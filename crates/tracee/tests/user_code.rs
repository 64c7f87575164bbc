//! Stops in user code that cannot be left half done.

mod common;

use common::Guest;
use unbroken_tracee::{HostTid, Tree};

/// What the guest runs.
#[test]
fn guest() {
    if common::role().as_deref() == Some("clock") {
        println!("ready");
        loop {
            std::hint::black_box(std::time::Instant::now());
        }
    }
}

#[test]
fn no_stop_finds_a_thread_in_the_vdso() {
    let guest = Guest::start("clock");
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    tree.stop()
        .unwrap()
        .install_blob(HostTid(guest.pid()))
        .unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.pid())).unwrap();
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    let range = u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap();
    for _ in 0..300 {
        let stopped = tree.stop().unwrap();
        for thread in stopped.processes().flat_map(|process| process.threads()) {
            assert!(!range.contains(&stopped.registers(thread.host_tid).unwrap().rip));
        }
        stopped.resume().unwrap();
    }
}

/// A program that is nearly always inside of a restartable sequence; prints where that is.
const RSEQ_GUEST: &str = r#"
#include <stdio.h>
#include <stdint.h>
#include <sys/rseq.h>
struct __attribute__((aligned(32))) sequence {
    uint32_t version, flags;
    uint64_t start, length, abort;
};
extern char sequence_start[], sequence_end[], sequence_abort[];
static struct sequence sequence;
int main(void) {
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    sequence.start = (uint64_t)sequence_start;
    sequence.length = sequence_end - sequence_start;
    sequence.abort = (uint64_t)sequence_abort;
    printf("ready %lx %lx\n", (long)sequence_start, (long)sequence_end);
    fflush(stdout);
    for (;;) {
        asm volatile(
            "movq %1, %0\n"
            ".globl sequence_start, sequence_end, sequence_abort\n"
            "sequence_start:\n"
            "movl $2000, %%ecx\n"
            "1: decl %%ecx\n"
            "jnz 1b\n"
            "sequence_end:\n"
            "jmp 2f\n"
            ".long 0x53053053\n"
            "sequence_abort:\n"
            "2:\n"
            : "=m"(area->rseq_cs) : "r"((uint64_t)&sequence) : "rcx", "memory", "cc");
    }
}
"#;

#[test]
fn no_stop_leaves_a_thread_in_a_restartable_sequence() {
    let directory = std::env::temp_dir().join(format!("unbroken-rseq-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (source, program) = (directory.join("guest.c"), directory.join("guest"));
    std::fs::write(&source, RSEQ_GUEST).unwrap();
    let mut compiler = std::process::Command::new("cc");
    compiler
        .arg("-O1")
        .arg("-no-pie")
        .arg("-o")
        .arg(&program)
        .arg(&source);
    assert!(compiler.status().unwrap().success());
    let mut child = std::process::Command::new(&program)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    let address = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let sequence = address(words[1])..address(words[2]);

    let tid = HostTid(child.id() as i32);
    let mut tree = Tree::seize(&[tid.0], true).unwrap();
    tree.stop().unwrap().install_blob(tid).unwrap();
    let mut aborted = 0;
    for _ in 0..200 {
        let mut stopped = tree.stop().unwrap();
        let rip = stopped.registers(tid).unwrap().rip;
        assert!(!sequence.contains(&rip));
        // The abort handler follows the end and its four bytes of signature.
        aborted += usize::from(rip > sequence.end);
        let mut batch = stopped.remote(tid);
        batch.call(libc::SYS_gettid, &[]).unwrap();
        batch.run().unwrap();
        assert_eq!(stopped.registers(tid).unwrap().rip, rip);
        stopped.resume().unwrap();
    }
    assert!(aborted > 20, "{aborted}");
    child.kill().unwrap();
    let _ = child.wait();
    std::fs::remove_dir_all(&directory).unwrap();
}
