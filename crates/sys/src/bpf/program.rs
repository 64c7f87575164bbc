//! The program that the kernel runs over the descriptors of a process:
//!
//! ```text
//! no more files:       write a record of zeros, so that a reader knows that it has all
//! a socket of TCP:     its slot, guard, every number of the tables, guard; write the record
//! anything else:       nothing
//! ```

use super::btf::{Btf, Place};
use super::instruction::{
    self, CONTEXT, Instruction, Program, R0, R1, call, exit, load, put, set, set_value, skip,
    skip_if_not_zero, skip_if_zero, write_out,
};
use super::record::{Guard, Record};
use std::io;
use std::mem::{offset_of, size_of};

/// What the program is attached to: its arguments are the iterator's.
const TARGET: &str = "bpf_iter_task_file";

const SKC_TO_TCP_SOCK: i32 = 137;
const SOCK_FROM_FILE: i32 = 162;

/// `struct bpf_iter__task_file`: where the program sees it, whatever the kernel's own looks like.
const CONTEXT_DESCRIPTOR: i16 = 16;
const CONTEXT_FILE: i16 = 24;

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
const FIELDS: [(&str, usize); 13] = [
    ("max_window", offset_of!(Record, max_window)),
    ("rx_opt.mss_clamp", offset_of!(Record, mss_clamp)),
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

/// The register that keeps the connection.
const CONNECTION: u8 = 7;

/// The record lies at the end of the stack, which has 512 bytes.
const RECORD_BYTES: usize = size_of::<Record>();
const _: () = assert!(RECORD_BYTES <= 512 && RECORD_BYTES.is_multiple_of(8));

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
    let writing = write_out(RECORD_BYTES);
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

/// `record[offset] = source`.
fn store(bytes: u32, offset: usize, source: u8) -> Instruction {
    instruction::store(bytes, in_record(offset), source)
}

/// `record[offset] = 0`, eight bytes.
fn clear(offset: usize) -> Instruction {
    put(in_record(offset), 0)
}

fn in_record(offset: usize) -> i16 {
    offset as i16 - RECORD_BYTES as i16
}
