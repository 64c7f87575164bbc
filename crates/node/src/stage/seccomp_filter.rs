//! The filter of the service, as a classic BPF program.
//!
//! It first decides free calls by their number alone: the kernel finds out at installation that
//! these need no run of the program at all (kernel/seccomp.c, `seccomp_is_const_allow`). Only then
//! does it look at the instruction pointer, because every call from the blob passes, and at
//! arguments.

use super::rules::{Condition, RULES, Rule};
use super::syscalls::{self, Verdict};
use unbroken_image::AddressRange;
use unbroken_sys::seccomp::Instruction;

// linux/seccomp.h, linux/audit.h
const RETURN_ALLOW: u32 = 0x7fff_0000;
const RETURN_NOTIFY: u32 = 0x7fc0_0000;
const RETURN_ERRNO: u32 = 0x0005_0000;
const ARCHITECTURE_X86_64: u32 = 0xc000_003e;

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const INSTRUCTION_POINTER: u32 = 8;
const ARGUMENTS: u32 = 16;

// linux/bpf_common.h
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Where a number leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaf {
    Return(u32),
    /// To be decided further on: 0 is the second stage, 1 + n is rule n.
    Label(usize),
}

const SECOND_STAGE: usize = 0;

/// The program for a service whose blob lies at `blob`, which must not cross a 4 GB border.
pub fn build(blob: AddressRange) -> Vec<Instruction> {
    debug_assert_eq!(blob.start >> 32, (blob.end - 1) >> 32);
    let names = syscalls::names();
    let verdicts = syscalls::verdicts(&names);
    let rule_of = |number| rule_of(names.get(number as usize).copied().flatten());
    let mut program = Program::new(RULES.len() + 1);

    program.load(ARCHITECTURE);
    program.test(JUMP_EQUAL, ARCHITECTURE_X86_64, 1, 0);
    program.finish(RETURN_ERRNO | libc::ENOSYS as u32);
    program.load(NUMBER);
    program.tree(&ranges(&verdicts, |number, verdict| {
        let free = verdict == Verdict::Free && rule_of(number).is_none();
        if free {
            Leaf::Return(RETURN_ALLOW)
        } else {
            Leaf::Label(SECOND_STAGE)
        }
    }));

    program.place(SECOND_STAGE);
    program.load(INSTRUCTION_POINTER + 4);
    program.test(JUMP_EQUAL, (blob.start >> 32) as u32, 0, 4);
    program.load(INSTRUCTION_POINTER);
    program.test(JUMP_AT_LEAST, blob.start as u32, 0, 2);
    program.test(JUMP_AT_LEAST, blob.end as u32, 1, 0);
    program.finish(RETURN_ALLOW);
    program.load(NUMBER);
    program.tree(&ranges(&verdicts, |number, verdict| {
        match rule_of(number) {
            Some(rule) => Leaf::Label(1 + rule),
            None => Leaf::Return(return_value(verdict)),
        }
    }));

    for (index, rule) in RULES.iter().enumerate() {
        program.place(1 + index);
        program.rule(rule);
    }
    program.instructions
}

fn return_value(verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Free => RETURN_ALLOW,
        Verdict::Announced => RETURN_NOTIFY,
        Verdict::Denied(errno) => RETURN_ERRNO | errno as u32,
    }
}

fn rule_of(name: Option<&str>) -> Option<usize> {
    RULES.iter().position(|rule| Some(rule.call) == name)
}

/// Runs of numbers that lead to the same leaf, by their first number; the last run is endless.
/// Numbers beyond the table, those of the x32 interface (bit 30) included, do not exist.
fn ranges(verdicts: &[Verdict], leaf: impl Fn(u32, Verdict) -> Leaf) -> Vec<(u32, Leaf)> {
    let beyond = Verdict::Denied(libc::ENOSYS);
    let mut ranges: Vec<(u32, Leaf)> = Vec::new();
    for (number, &verdict) in (0u32..).zip(verdicts.iter().chain([&beyond])) {
        let leaf = leaf(number, verdict);
        if ranges.last().is_none_or(|last| last.1 != leaf) {
            ranges.push((number, leaf));
        }
    }
    ranges
}

/// A program in the making. Jumps to labels are filled in when the label is placed: all lead
/// forward, as the kernel demands.
struct Program {
    instructions: Vec<Instruction>,
    waiting: Vec<Vec<usize>>,
}

impl Program {
    fn new(labels: usize) -> Self {
        Program {
            instructions: Vec::new(),
            waiting: vec![Vec::new(); labels],
        }
    }

    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.instructions.push(Instruction { code, jt, jf, k });
    }

    fn load(&mut self, offset: u32) {
        self.push(LOAD, 0, 0, offset);
    }

    /// Skips `jt` instructions when the loaded word passes the test, else `jf`.
    fn test(&mut self, code: u16, value: u32, jt: u8, jf: u8) {
        self.push(code, jt, jf, value);
    }

    fn finish(&mut self, value: u32) {
        self.push(RETURN, 0, 0, value);
    }

    fn place(&mut self, label: usize) {
        let here = self.instructions.len();
        for index in std::mem::take(&mut self.waiting[label]) {
            self.instructions[index].k = (here - index - 1) as u32;
        }
    }

    /// A binary search over runs of numbers.
    fn tree(&mut self, ranges: &[(u32, Leaf)]) {
        if let [(_, leaf)] = ranges {
            match *leaf {
                Leaf::Return(value) => self.finish(value),
                Leaf::Label(label) => {
                    self.waiting[label].push(self.instructions.len());
                    self.push(JUMP, 0, 0, 0);
                }
            }
            return;
        }
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        // A conditional jump reaches 255 instructions, an unconditional one anywhere.
        self.test(JUMP_AT_LEAST, upper[0].0, 0, 1);
        let jump = self.instructions.len();
        self.push(JUMP, 0, 0, 0);
        self.tree(lower);
        self.instructions[jump].k = (self.instructions.len() - jump - 1) as u32;
        self.tree(upper);
    }

    fn rule(&mut self, rule: &Rule) {
        for (condition, verdict) in rule.cases {
            self.condition(condition);
            self.finish(return_value(*verdict));
        }
        self.finish(return_value(rule.otherwise));
    }

    /// Goes on to the next instruction when the condition holds, else skips one.
    fn condition(&mut self, condition: &Condition) {
        match *condition {
            Condition::OneOf(argument, values) => {
                self.load(ARGUMENTS + 8 * argument);
                for (left, value) in (0..values.len() as u8).rev().zip(values) {
                    self.test(JUMP_EQUAL, *value, left, u8::from(left == 0));
                }
            }
            Condition::NoneOf(argument, values) => {
                self.load(ARGUMENTS + 8 * argument);
                for (left, value) in (0..values.len() as u8).rev().zip(values) {
                    self.test(JUMP_EQUAL, *value, left + 1, 0);
                }
            }
            Condition::AnyBit(argument, bits) => {
                self.load(ARGUMENTS + 8 * argument);
                self.test(JUMP_ANY_BIT, bits, 0, 1);
            }
            Condition::Null(argument) => {
                self.load(ARGUMENTS + 8 * argument);
                self.test(JUMP_EQUAL, 0, 0, 3);
                self.load(ARGUMENTS + 8 * argument + 4);
                self.test(JUMP_EQUAL, 0, 0, 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules;
    use super::*;

    const BLOB: AddressRange = AddressRange {
        start: 0x5ead_0000_0000,
        end: 0x5ead_0000_4000,
    };

    struct Call {
        architecture: u32,
        number: u32,
        instruction_pointer: u64,
        arguments: [u64; 6],
    }

    fn call(name: &str, arguments: &[u64]) -> Call {
        let number = (0..)
            .zip(syscalls::names())
            .find(|(_, known)| *known == Some(name));
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        Call {
            architecture: ARCHITECTURE_X86_64,
            number: number.expect(name).0,
            instruction_pointer: 0x7f00_1234_5678,
            arguments: all,
        }
    }

    /// Runs the program as the kernel would. `number_only` fails on any load but the number and
    /// the architecture, like the kernel's search for calls that are always allowed.
    fn run(program: &[Instruction], call: &Call, number_only: bool) -> Option<u32> {
        let mut data = Vec::new();
        data.extend(call.number.to_le_bytes());
        data.extend(call.architecture.to_le_bytes());
        data.extend(call.instruction_pointer.to_le_bytes());
        call.arguments
            .iter()
            .for_each(|argument| data.extend(argument.to_le_bytes()));
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let instruction = program[at];
            at += 1;
            let jump = |holds| {
                usize::from(if holds {
                    instruction.jt
                } else {
                    instruction.jf
                })
            };
            match instruction.code {
                LOAD if number_only && instruction.k >= INSTRUCTION_POINTER => return None,
                LOAD => {
                    let offset = instruction.k as usize;
                    let word = data[offset..offset + 4].try_into().expect("four bytes");
                    accumulator = u32::from_le_bytes(word);
                }
                JUMP => at += instruction.k as usize,
                JUMP_EQUAL => at += jump(accumulator == instruction.k),
                JUMP_AT_LEAST => at += jump(accumulator >= instruction.k),
                JUMP_ANY_BIT => at += jump(accumulator & instruction.k != 0),
                RETURN => return Some(instruction.k),
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn verdict(call: &Call) -> u32 {
        run(&build(BLOB), call, false).expect("a verdict")
    }

    fn denied(errno: i32) -> u32 {
        RETURN_ERRNO | errno as u32
    }

    #[test]
    fn every_number_gets_the_verdict_of_the_table() {
        let program = build(BLOB);
        assert!(program.len() < 4096, "the kernel's limit, BPF_MAXINSNS");
        let names = syscalls::names();
        for ((number, verdict), name) in (0..).zip(syscalls::verdicts(&names)).zip(names) {
            let call = Call {
                number,
                ..call("read", &[])
            };
            if RULES.iter().any(|rule| Some(rule.call) == name) {
                assert_eq!(
                    run(&program, &call, true),
                    None,
                    "{name:?} needs its arguments"
                );
                continue;
            }
            assert_eq!(
                run(&program, &call, false),
                Some(return_value(verdict)),
                "{name:?}"
            );
            let by_number = (verdict == Verdict::Free).then_some(RETURN_ALLOW);
            assert_eq!(
                run(&program, &call, true),
                by_number,
                "{name:?} decided by number"
            );
        }
    }

    #[test]
    fn other_architectures_and_unknown_calls_do_not_exist() {
        let i386 = Call {
            architecture: 0x4000_0003,
            ..call("read", &[])
        };
        assert_eq!(verdict(&i386), denied(libc::ENOSYS));
        for number in [350, syscalls::CALLS_END, 0x4000_0000, 0x4000_0001, u32::MAX] {
            let unknown = Call {
                number,
                ..call("read", &[])
            };
            assert_eq!(verdict(&unknown), denied(libc::ENOSYS));
        }
    }

    #[test]
    fn the_blob_may_do_everything() {
        for name in ["userfaultfd", "mmap", "seccomp", "clone3", "socket"] {
            for (address, inside) in [
                (BLOB.start - 1, false),
                (BLOB.start, true),
                (BLOB.end - 1, true),
                (BLOB.end, false),
                (BLOB.start + (1 << 32), false),
                (BLOB.start & 0xffff_ffff, false),
            ] {
                let call = Call {
                    instruction_pointer: address,
                    ..call(name, &[99])
                };
                assert_eq!(
                    verdict(&call) == RETURN_ALLOW,
                    inside,
                    "{name} from {address:#x}"
                );
            }
        }
    }

    #[test]
    fn arguments_decide_where_a_rule_says_so() {
        let (allow, notify) = (RETURN_ALLOW, RETURN_NOTIFY);
        let pointer = 0x7fff_0000_0000;
        for (name, arguments, expected) in [
            ("socket", &[2, 1, 0][..], notify),
            ("socket", &[10, 1, 6], notify),
            ("socket", &[1, 5, 0], notify),
            ("socket", &[16, 3, 0], notify),
            ("socket", &[16, 3, 4], denied(libc::EPROTONOSUPPORT)),
            ("socket", &[2, 1, 262], denied(libc::EPROTONOSUPPORT)),
            ("socket", &[2, 1, 132], denied(libc::EPROTONOSUPPORT)),
            ("socket", &[17, 3, 0], denied(libc::EAFNOSUPPORT)),
            ("socket", &[40, 1, 0], denied(libc::EAFNOSUPPORT)),
            ("clone", &[0x3d_0f00], allow),
            ("clone", &[0x0120_0011], allow),
            ("clone", &[0x4000_0011], denied(libc::EPERM)),
            ("clone", &[0x0002_0011], denied(libc::EPERM)),
            ("clone", &[0x1011], notify),
            ("mmap", &[0, 4096, 3, 0x22], notify),
            ("mmap", &[0, 4096, 3, 0x4_0022], denied(libc::ENOMEM)),
            ("mmap", &[0, 4096, 3, 0x28], denied(libc::EINVAL)),
            ("brk", &[0], allow),
            ("brk", &[1 << 32], notify),
            ("madvise", &[0, 4096, 4], notify),
            ("madvise", &[0, 4096, 3], allow),
            ("madvise", &[0, 4096, 25], allow),
            ("madvise", &[0, 4096, 102], notify),
            ("fcntl", &[3, 1], allow),
            ("fcntl", &[3, 3], allow),
            ("fcntl", &[3, 0], notify),
            ("fcntl", &[3, 1030], notify),
            ("fcntl", &[3, 1026], denied(libc::EINVAL)),
            ("ioctl", &[3, 0x5421], notify),
            ("ioctl", &[3, 0x541b], allow),
            ("rt_sigaction", &[15, 0], allow),
            ("rt_sigaction", &[15, pointer], notify),
            ("prlimit64", &[0, 7, 0, pointer], allow),
            ("prlimit64", &[0, 7, pointer, 0], notify),
            ("prctl", &[16], allow),
            ("prctl", &[15], notify),
            ("prctl", &[22, 2], denied(libc::EINVAL)),
            ("arch_prctl", &[0x1002], allow),
            ("arch_prctl", &[0x1023], denied(libc::EINVAL)),
            ("personality", &[0xffff_ffff], allow),
            ("personality", &[0], notify),
            ("close_range", &[3, 9, 2], denied(libc::EINVAL)),
            ("close_range", &[3, 9, 4], notify),
        ] {
            assert_eq!(
                verdict(&call(name, arguments)),
                expected,
                "{name} {arguments:x?}"
            );
        }
    }

    /// The filter and the table that the tracer asks are made of the same rules in two ways.
    #[test]
    fn the_filter_decides_as_the_rules_say() {
        let program = build(BLOB);
        let values = RULES.iter().flat_map(|rule| rule.cases);
        let mut values: Vec<u64> = values
            .flat_map(|(condition, _)| match *condition {
                Condition::OneOf(_, values) | Condition::NoneOf(_, values) => values.to_vec(),
                Condition::AnyBit(_, bits) => vec![bits, bits & bits.wrapping_neg()],
                Condition::Null(_) => vec![0],
            })
            .map(u64::from)
            .collect();
        values.extend([1, 0xffff, 1 << 32, u64::MAX]);
        let mut sample = call("read", &[]);
        for number in 0..syscalls::CALLS_END + 2 {
            for &value in &values {
                sample.number = number;
                sample.arguments = [value; 6];
                let verdict = rules::verdict(u64::from(number), sample.arguments);
                assert_eq!(
                    run(&program, &sample, false),
                    Some(return_value(verdict)),
                    "call {number} with {value:#x}"
                );
            }
        }
    }

    #[test]
    fn every_rule_names_a_call() {
        for rule in RULES {
            assert!(
                syscalls::names().contains(&Some(rule.call)),
                "{} is no call",
                rule.call
            );
        }
    }
}
