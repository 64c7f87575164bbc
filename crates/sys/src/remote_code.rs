//! The machine code that runs inside a process of the service, and the layout it shares with who
//! drives it.
//!
//! The code is data here: it is copied out, never run in this process. The blocks rely on the two
//! labels of the assembly below being the first byte and the one past the last.
#![allow(unsafe_code)]

use std::arch::global_asm;

/// Where the code is mapped; the filter of the service lets calls from here pass.
pub const ADDRESS: u64 = 0x5ead_0000_0000;
/// Where its data begins: the header, the table, scratch memory.
pub const DATA: u64 = ADDRESS + 4096;
/// Where the slots begin, from which single threads make a call again ([`slot`]). A page of code
/// (r-x) and the data (rw-) lie before them.
pub const SLOTS: u64 = ADDRESS + 4 * 4096;
/// Bytes of the whole mapping; the slots (r-x) take memory only where they are used.
pub const LENGTH_BYTES: u64 = SLOTS - ADDRESS + slot::COUNT as u64 * slot::LENGTH_BYTES;

/// A slot: a little code for one thread, written for the one call that it makes there.
///
/// A program may count on every register but rax, rcx and r11 being what it was before a call
/// (arch/x86/entry/entry_64.S), so a call that is to wait for less time than the program asked for
/// cannot be made at the program's own instruction: the register with the shorter timeout would
/// stay. The code makes the call, puts the register back, and ends behind the program's
/// instruction, with rcx as the kernel leaves it there. It changes no flags.
pub mod slot {
    /// How many there are.
    pub const COUNT: usize = 4096;
    pub const LENGTH_BYTES: u64 = 64;
    /// Offset of the word behind the code that holds the call's number.
    pub const NUMBER: usize = 24;
    /// Offset of room for a `struct timespec` or `timeval`.
    pub const TIME: usize = 32;
    /// Bytes that are written.
    pub const USED_BYTES: usize = 48;

    /// The first two bytes of `movabs REGISTER, imm64` for the registers that hold timeouts.
    pub const LOAD_RDI: [u8; 2] = [0x48, 0xbf];
    pub const LOAD_RDX: [u8; 2] = [0x48, 0xba];
    pub const LOAD_R10: [u8; 2] = [0x49, 0xba];
    pub const LOAD_R8: [u8; 2] = [0x49, 0xb8];

    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const LOAD_RCX: [u8; 2] = [0x48, 0xb9];
    const JUMP_TO_RCX: [u8; 2] = [0xff, 0xe1];

    /// The code that makes a call, loads `value` by the instruction `load`, and goes on at
    /// `return_to`.
    pub fn code(load: [u8; 2], value: u64, return_to: u64) -> [u8; NUMBER] {
        let mut code = [0; NUMBER];
        code[..2].copy_from_slice(&SYSCALL);
        code[2..4].copy_from_slice(&load);
        code[4..12].copy_from_slice(&value.to_le_bytes());
        code[12..14].copy_from_slice(&LOAD_RCX);
        code[14..22].copy_from_slice(&return_to.to_le_bytes());
        code[22..].copy_from_slice(&JUMP_TO_RCX);
        code
    }

    /// What a slot's code was made of: load instruction, value, and where it goes on.
    pub fn parse(code: &[u8]) -> Option<([u8; 2], u64, u64)> {
        let code = code.get(..NUMBER)?;
        let load = code.get(2..4)?.try_into().ok()?;
        let value = u64::from_le_bytes(code.get(4..12)?.try_into().ok()?);
        let return_to = u64::from_le_bytes(code.get(14..22)?.try_into().ok()?);
        (code == self::code(load, value, return_to)).then_some((load, value, return_to))
    }
}

/// Offsets of the header's words from [`DATA`].
pub mod header {
    /// Calls in the table.
    pub const COUNT: usize = 0;
    /// Calls that have returned.
    pub const DONE: usize = 8;
    /// The signals to block while the table runs.
    pub const BLOCKED: usize = 16;
    /// The signals that were blocked before.
    pub const ORIGINAL_MASK: usize = 24;
    /// Process, thread and signal of the notice that the table is done.
    pub const PID: usize = 32;
    pub const TID: usize = 40;
    pub const SIGNAL: usize = 48;
    /// The registers to return to.
    pub const EFLAGS: usize = 56;
    pub const RSP: usize = 64;
    pub const RIP: usize = 72;
    /// r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi.
    pub const GENERAL: usize = 80;
}

/// Offset of the table from [`DATA`].
pub const TABLE: usize = 256;
/// An entry: number, six arguments, result; eight bytes each.
pub const ENTRY_BYTES: usize = 64;
/// Entries that the table has room for.
pub const ENTRIES: usize = 96;
/// Offset of the scratch memory from [`DATA`].
pub const SCRATCH: usize = TABLE + ENTRIES * ENTRY_BYTES;
/// Bytes of scratch memory.
pub const SCRATCH_BYTES: usize = (SLOTS - DATA) as usize - SCRATCH;

const _: () = assert!(SCRATCH_BYTES >= 4096 + 256, "a path and a little must fit");

// `enter` runs the table in a thread of the live service, so it must bring the thread back by
// itself whenever the tracer dies. It returns in user mode and not through rt_sigreturn, which
// would want a copy of the extended state in its frame (a null pointer there resets it) and would
// set the alternate stack; nothing here touches either. Flags go back first, while signals are
// still blocked, since popfq needs a stack of ours; `syscall` keeps them, mov does not change them.
// From the mask on, a handler may run on top of this: rsp is already the thread's own.
//
// The notice is a signal that the service ignores. A traced thread stops for it all the same
// (kernel/signal.c, sig_ignored); without a tracer nothing happens, where a breakpoint would kill.
//
// `stub` is for a process that is nobody's yet: nothing to bring back, and a breakpoint will do.
global_asm!(
    ".pushsection .rodata.unbroken_remote, \"a\", @progbits",
    ".hidden unbroken_remote_begin",
    ".globl unbroken_remote_begin",
    "unbroken_remote_begin:",
    "    jmp 10f",
    "    .balign 16",
    // stub, at +16
    "5:  movabs rbx, {data}",
    "    mov r12, [rbx + {count}]",
    "    lea r13, [rbx + {table}]",
    "6:  test r12, r12",
    "    jz 7f",
    "    mov rax, [r13]",
    "    mov rdi, [r13 + 8]",
    "    mov rsi, [r13 + 16]",
    "    mov rdx, [r13 + 24]",
    "    mov r10, [r13 + 32]",
    "    mov r8, [r13 + 40]",
    "    mov r9, [r13 + 48]",
    "    syscall",
    "    mov [r13 + 56], rax",
    "    add r13, {entry}",
    "    inc qword ptr [rbx + {done}]",
    "    dec r12",
    "    jmp 6b",
    "7:  int3",
    "    jmp 5b",
    // enter
    "10: movabs rbx, {data}",
    "    lea rsi, [rbx + {blocked}]",
    "    mov edi, {setmask}",
    "    xor edx, edx",
    "    mov r10d, 8",
    "    mov eax, {sigprocmask}",
    "    syscall",
    "    mov r12, [rbx + {count}]",
    "    lea r13, [rbx + {table}]",
    "11: test r12, r12",
    "    jz 12f",
    "    mov rax, [r13]",
    "    mov rdi, [r13 + 8]",
    "    mov rsi, [r13 + 16]",
    "    mov rdx, [r13 + 24]",
    "    mov r10, [r13 + 32]",
    "    mov r8, [r13 + 40]",
    "    mov r9, [r13 + 48]",
    "    syscall",
    "    mov [r13 + 56], rax",
    "    add r13, {entry}",
    "    inc qword ptr [rbx + {done}]",
    "    dec r12",
    "    jmp 11b",
    "12: mov rdi, [rbx + {pid}]",
    "    mov rsi, [rbx + {tid}]",
    "    mov rdx, [rbx + {signal}]",
    "    mov eax, {tgkill}",
    "    syscall",
    "    lea rsp, [rbx + {eflags}]",
    "    popfq",
    "    mov rsp, [rbx + {rsp}]",
    "    lea rsi, [rbx + {original}]",
    "    mov edi, {setmask}",
    "    mov edx, 0",
    "    mov r10d, 8",
    "    mov eax, {sigprocmask}",
    "    syscall",
    "    mov r15, [rbx + {general}]",
    "    mov r14, [rbx + {general} + 8]",
    "    mov r13, [rbx + {general} + 16]",
    "    mov r12, [rbx + {general} + 24]",
    "    mov rbp, [rbx + {general} + 32]",
    "    mov r11, [rbx + {general} + 48]",
    "    mov r10, [rbx + {general} + 56]",
    "    mov r9, [rbx + {general} + 64]",
    "    mov r8, [rbx + {general} + 72]",
    "    mov rax, [rbx + {general} + 80]",
    "    mov rcx, [rbx + {general} + 88]",
    "    mov rdx, [rbx + {general} + 96]",
    "    mov rsi, [rbx + {general} + 104]",
    "    mov rdi, [rbx + {general} + 112]",
    "    mov rbx, [rbx + {general} + 40]",
    // An address relative to rip: the data page follows the page of code.
    "    jmp qword ptr [rip + unbroken_remote_begin + 4096 + {rip}]",
    ".hidden unbroken_remote_end",
    ".globl unbroken_remote_end",
    "unbroken_remote_end:",
    ".popsection",
    data = const DATA,
    table = const TABLE,
    entry = const ENTRY_BYTES,
    count = const header::COUNT,
    done = const header::DONE,
    blocked = const header::BLOCKED,
    original = const header::ORIGINAL_MASK,
    pid = const header::PID,
    tid = const header::TID,
    signal = const header::SIGNAL,
    eflags = const header::EFLAGS,
    rsp = const header::RSP,
    rip = const header::RIP,
    general = const header::GENERAL,
    setmask = const libc::SIG_SETMASK,
    sigprocmask = const libc::SYS_rt_sigprocmask,
    tgkill = const libc::SYS_tgkill,
);

unsafe extern "C" {
    static unbroken_remote_begin: u8;
    static unbroken_remote_end: u8;
}

/// Offset of the entry that returns to the saved registers.
pub const ENTER: u64 = 0;
/// Offset of the entry that ends in a breakpoint.
pub const STUB: u64 = 16;

/// The code, to be copied to [`ADDRESS`].
pub fn code() -> &'static [u8] {
    let begin = &raw const unbroken_remote_begin;
    let length = &raw const unbroken_remote_end as usize - begin as usize;
    // SAFETY: the labels enclose one piece of read-only data of this program.
    unsafe { std::slice::from_raw_parts(begin, length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_page_and_the_stub_entry_is_where_it_says() {
        let code = code();
        assert!(code.len() < 4000);
        assert_eq!(LENGTH_BYTES % 4096, 0);
        // movabs rbx, DATA
        assert_eq!(code[STUB as usize..][..2], [0x48, 0xbb]);
        assert_eq!(code[STUB as usize + 2..][..8], DATA.to_le_bytes());
    }

    #[test]
    fn a_slot_says_what_it_was_made_of() {
        let code = slot::code(slot::LOAD_R10, 1 << 40, 0x7fff_1234_5678);
        let parts = slot::parse(&code);
        assert_eq!(parts, Some((slot::LOAD_R10, 1 << 40, 0x7fff_1234_5678)));
        assert_eq!(slot::parse(&[0; slot::NUMBER]), None);
        assert_eq!(slot::parse(&code[1..]), None);
    }
}
