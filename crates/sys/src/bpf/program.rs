//! The program that the kernel runs over the descriptors of a process: instructions of BPF
//! (Documentation/bpf/standardization/instruction-set.rst in the kernel's sources).
//!
//! ```text
//! no more files:       write a record of zeros, so that a reader knows that it has all
//! a socket of TCP:     its slot, guard, every number of the tables, guard; write the record
//! anything else:       nothing
//! ```

use super::btf::{Btf, Place};
use super::record::{Guard, Record};
use std::io;
use std::mem::{offset_of, size_of};

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    value: i32,
}

/// What the program is attached to: its arguments are the iterator's.
const TARGET: &str = "bpf_iter_task_file";

const SEQ_WRITE: i32 = 127;
const SKC_TO_TCP_SOCK: i32 = 137;
const SOCK_FROM_FILE: i32 = 162;

/// `struct bpf_iter__task_file`, and the first member of `struct bpf_iter_meta`: where the program
/// sees them, whatever the kernel's own structures look like.
const CONTEXT_META: i16 = 0;
const CONTEXT_DESCRIPTOR: i16 = 16;
const CONTEXT_FILE: i16 = 24;
const META_OUTPUT: i16 = 0;

/// The way to a member of `struct sock` within `struct tcp_sock`.
macro_rules! sock {
    ($member:literal) => {
        concat!("inet_conn.icsk_inet.sk.", $member)
    };
}

/// Members of `struct tcp_sock`, and where their values go: into words of eight bytes.
const WIDE_FIELDS: [(&str, usize); 5] = [
    ("bytes_acked", offset_of!(Record, bytes_acked)),
    ("bytes_received", offset_of!(Record, bytes_received)),
    ("bytes_sent", offset_of!(Record, bytes_sent)),
    ("bytes_retrans", offset_of!(Record, bytes_retransmitted)),
    (sock!("__sk_common.skc_flags"), offset_of!(Record, flags)),
];

/// The same, into words of four.
const FIELDS: [(&str, usize); 11] = [
    (sock!("__sk_common.skc_state"), offset_of!(Record, state)),
    ("snd_una", offset_of!(Record, send_unacknowledged)),
    ("snd_nxt", offset_of!(Record, send_next)),
    ("write_seq", offset_of!(Record, write_sequence)),
    ("rcv_nxt", offset_of!(Record, receive_next)),
    ("copied_seq", offset_of!(Record, copied_sequence)),
    ("snd_wnd", offset_of!(Record, send_window)),
    ("rcv_wnd", offset_of!(Record, receive_window)),
    ("packets_out", offset_of!(Record, packets_out)),
    ("urg_data", offset_of!(Record, urgent)),
    ("urg_seq", offset_of!(Record, urgent_sequence)),
];

/// Read before and after all others.
const GUARD_FIELDS: [(&str, usize); 4] = [
    (
        sock!("sk_lock.slock.rlock.raw_lock.val.counter"),
        offset_of!(Guard, lock),
    ),
    (sock!("sk_lock.owned"), offset_of!(Guard, owned)),
    ("segs_in", offset_of!(Guard, segments_in)),
    ("segs_out", offset_of!(Guard, segments_out)),
];

/// Registers: what a call returns, its arguments, what outlives it, and the end of the stack.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const CONTEXT: u8 = 6;
const CONNECTION: u8 = 7;
const STACK: u8 = 10;

/// The record lies at the end of the stack, which has 512 bytes.
const RECORD_BYTES: usize = size_of::<Record>();
const _: () = assert!(RECORD_BYTES <= 512 && RECORD_BYTES.is_multiple_of(8));

/// A program, and the number of what it is attached to.
pub(super) struct Program {
    pub instructions: Vec<Instruction>,
    pub target: u32,
}

/// Makes the program for the kernel that `types` describes.
///
/// # Errors
/// `Unsupported` when this kernel has no such iterator, or keeps the numbers otherwise.
pub(super) fn assemble(types: &Btf<'_>) -> io::Result<Program> {
    let target = types.function(TARGET)?;
    let connection = types.structure("tcp_sock")?;
    let sock = types.place(types.structure("socket")?, "sk")?;
    let mut reading = Vec::new();
    let mut read = |fields: &[(&str, usize)], base: usize, width_bytes: u32| -> io::Result<()> {
        for (path, offset) in fields {
            let place = types.place(connection, path)?;
            reading.extend(copy_number(path, place, base + offset, width_bytes)?);
        }
        Ok(())
    };
    read(&GUARD_FIELDS, offset_of!(Record, before), 4)?;
    read(&WIDE_FIELDS, 0, 8)?;
    read(&FIELDS, 0, 4)?;
    read(&GUARD_FIELDS, offset_of!(Record, after), 4)?;
    Ok(Program {
        instructions: around(&reading, offset_of_pointer("sk", sock)?),
        target,
    })
}

/// The whole program around the instructions that read a connection.
fn around(reading: &[Instruction], sock_offset: i16) -> Vec<Instruction> {
    let ending = [set_value(R0, 0), exit()];
    let writing = [
        load(8, R1, CONTEXT, CONTEXT_META),
        load(8, R1, R1, META_OUTPUT),
        set(R2, STACK),
        add_value(R2, -(RECORD_BYTES as i32)),
        set_value(R3, RECORD_BYTES as i32),
        call(SEQ_WRITE),
    ];
    let naming = [
        set(CONNECTION, R0),
        load(4, R1, CONTEXT, CONTEXT_DESCRIPTOR),
        store(4, offset_of!(Record, descriptor), R1),
    ];
    // Files that are no sockets, and sockets of other protocols, are passed over.
    let to_ending = naming.len() + reading.len() + writing.len();
    let converting = [
        call(SOCK_FROM_FILE),
        skip_if_zero(R0, 3 + to_ending),
        load(8, R1, R0, sock_offset),
        call(SKC_TO_TCP_SOCK),
        skip_if_zero(R0, to_ending),
    ];
    let mut at_the_end: Vec<Instruction> = (0..RECORD_BYTES).step_by(8).map(clear).collect();
    at_the_end.push(skip(converting.len() + naming.len() + reading.len()));
    let beginning = [
        set(CONTEXT, R1),
        load(8, R1, CONTEXT, CONTEXT_FILE),
        skip_if_not_zero(R1, at_the_end.len()),
    ];
    let parts: [&[Instruction]; 7] = [
        &beginning,
        &at_the_end,
        &converting,
        &naming,
        reading,
        &writing,
        &ending,
    ];
    parts.concat()
}

/// Copies a number of the connection to the record, where it may be wider.
fn copy_number(
    path: &str,
    place: Place,
    record_offset: usize,
    width_bytes: u32,
) -> io::Result<[Instruction; 2]> {
    let is_known = matches!(place.size_bytes, 1 | 2 | 4 | 8) && place.size_bytes <= width_bytes;
    let offset = expected(path, place, is_known)?;
    Ok([
        load(place.size_bytes, R1, CONNECTION, offset),
        store(width_bytes, record_offset, R1),
    ])
}

fn offset_of_pointer(path: &str, place: Place) -> io::Result<i16> {
    expected(path, place, place.size_bytes == 8)
}

/// An instruction reaches 32 KiB.
fn expected(path: &str, place: Place, is_known: bool) -> io::Result<i16> {
    let offset = i16::try_from(place.offset_bytes).ok().filter(|_| is_known);
    offset.ok_or_else(|| {
        let Place {
            offset_bytes,
            size_bytes,
        } = place;
        let text = format!(
            "this kernel keeps a socket's {path} at {offset_bytes} in {size_bytes} bytes, which \
             was not expected"
        );
        io::Error::new(io::ErrorKind::Unsupported, text)
    })
}

const fn instruction(
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    value: i32,
) -> Instruction {
    Instruction {
        code,
        registers: source << 4 | destination,
        offset,
        value,
    }
}

/// The bits of an instruction's code that say how many bytes it moves.
fn width_bits(bytes: u32) -> u8 {
    match bytes {
        1 => 0x10,
        2 => 0x08,
        4 => 0x00,
        _ => 0x18,
    }
}

/// `destination = *(source + offset)`.
fn load(bytes: u32, destination: u8, source: u8, offset: i16) -> Instruction {
    instruction(0x61 | width_bits(bytes), destination, source, offset, 0)
}

/// `record[offset] = source`.
fn store(bytes: u32, offset: usize, source: u8) -> Instruction {
    let offset = offset as i16 - RECORD_BYTES as i16;
    instruction(0x63 | width_bits(bytes), STACK, source, offset, 0)
}

/// `record[offset] = 0`, eight bytes.
fn clear(offset: usize) -> Instruction {
    instruction(0x7a, STACK, 0, offset as i16 - RECORD_BYTES as i16, 0)
}

fn set(destination: u8, source: u8) -> Instruction {
    instruction(0xbf, destination, source, 0, 0)
}

fn set_value(destination: u8, value: i32) -> Instruction {
    instruction(0xb7, destination, 0, 0, value)
}

fn add_value(destination: u8, value: i32) -> Instruction {
    instruction(0x07, destination, 0, 0, value)
}

/// Leaves out the next `count` instructions.
fn skip(count: usize) -> Instruction {
    instruction(0x05, 0, 0, count as i16, 0)
}

fn skip_if_zero(register: u8, count: usize) -> Instruction {
    instruction(0x15, register, 0, count as i16, 0)
}

fn skip_if_not_zero(register: u8, count: usize) -> Instruction {
    instruction(0x55, register, 0, count as i16, 0)
}

fn call(helper: i32) -> Instruction {
    instruction(0x85, 0, 0, 0, helper)
}

fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0, 0)
}
