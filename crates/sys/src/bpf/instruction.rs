//! Instructions of BPF (Documentation/bpf/standardization/instruction-set.rst in the kernel's
//! sources), as far as our programs need them.

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

/// A program, and the number of what it is attached to.
pub(super) struct Program {
    pub instructions: Vec<Instruction>,
    pub target: u32,
}

/// The helper that writes to the file of an iterator (`bpf_seq_write`).
const SEQ_WRITE: i32 = 127;

/// The first member of every iterator's context, and of `struct bpf_iter_meta` in turn.
const CONTEXT_META: i16 = 0;
const META_OUTPUT: i16 = 0;

/// Registers: what a call returns, its arguments, what outlives it, and the end of the stack.
pub(super) const R0: u8 = 0;
pub(super) const R1: u8 = 1;
pub(super) const R2: u8 = 2;
pub(super) const R3: u8 = 3;
pub(super) const R4: u8 = 4;
pub(super) const CONTEXT: u8 = 6;
pub(super) const STACK: u8 = 10;

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
pub(super) fn load(bytes: u32, destination: u8, source: u8, offset: i16) -> Instruction {
    instruction(0x61 | width_bits(bytes), destination, source, offset, 0)
}

/// `*(stack + offset) = source`.
pub(super) fn store(bytes: u32, offset: i16, source: u8) -> Instruction {
    store_at(bytes, STACK, offset, source)
}

/// `*(base + offset) = source`.
pub(super) fn store_at(bytes: u32, base: u8, offset: i16, source: u8) -> Instruction {
    instruction(0x63 | width_bits(bytes), base, source, offset, 0)
}

/// `*(stack + offset) = value`, eight bytes.
pub(super) fn put(offset: i16, value: i32) -> Instruction {
    instruction(0x7a, STACK, 0, offset, value)
}

pub(super) fn set(destination: u8, source: u8) -> Instruction {
    instruction(0xbf, destination, source, 0, 0)
}

pub(super) fn set_value(destination: u8, value: i32) -> Instruction {
    instruction(0xb7, destination, 0, 0, value)
}

/// Loads a number of eight bytes.
pub(super) fn set_wide(destination: u8, value: u64) -> [Instruction; 2] {
    wide(destination, 0, value)
}

/// Loads a map, by the descriptor that the loading process has for it (BPF_PSEUDO_MAP_FD).
pub(super) fn set_map(destination: u8, descriptor: u32) -> [Instruction; 2] {
    wide(destination, 1, descriptor.into())
}

fn wide(destination: u8, kind: u8, value: u64) -> [Instruction; 2] {
    [
        instruction(0x18, destination, kind, 0, value as i32),
        instruction(0, 0, 0, 0, (value >> 32) as i32),
    ]
}

pub(super) fn subtract(destination: u8, source: u8) -> Instruction {
    instruction(0x1f, destination, source, 0, 0)
}

pub(super) fn add(destination: u8, source: u8) -> Instruction {
    instruction(0x0f, destination, source, 0, 0)
}

pub(super) fn multiply_by(destination: u8, value: i32) -> Instruction {
    instruction(0x27, destination, 0, 0, value)
}

pub(super) fn and_value(destination: u8, value: i32) -> Instruction {
    instruction(0x57, destination, 0, 0, value)
}

pub(super) fn add_value(destination: u8, value: i32) -> Instruction {
    instruction(0x07, destination, 0, 0, value)
}

/// Leaves out the next `count` instructions.
pub(super) fn skip(count: usize) -> Instruction {
    instruction(0x05, 0, 0, count as i16, 0)
}

pub(super) fn skip_if_zero(register: u8, count: usize) -> Instruction {
    instruction(0x15, register, 0, count as i16, 0)
}

pub(super) fn skip_if_not_zero(register: u8, count: usize) -> Instruction {
    instruction(0x55, register, 0, count as i16, 0)
}

/// Compares without signs.
pub(super) fn skip_if_at_least(register: u8, value: i32, count: usize) -> Instruction {
    instruction(0x35, register, 0, count as i16, value)
}

pub(super) fn skip_if_differs(register: u8, other: u8, count: usize) -> Instruction {
    instruction(0x5d, register, other, count as i16, 0)
}

pub(super) fn call(helper: i32) -> Instruction {
    instruction(0x85, 0, 0, 0, helper)
}

pub(super) fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0, 0)
}

/// How many instructions [`write_out`] gives.
pub(super) const WRITE_LENGTH: usize = 6;

/// Writes the last `bytes` of the stack to the iterator's file; `CONTEXT` holds the context.
pub(super) fn write_out(bytes: usize) -> [Instruction; WRITE_LENGTH] {
    [
        load(8, R1, CONTEXT, CONTEXT_META),
        load(8, R1, R1, META_OUTPUT),
        set(R2, STACK),
        add_value(R2, -(bytes as i32)),
        set_value(R3, bytes as i32),
        call(SEQ_WRITE),
    ]
}
