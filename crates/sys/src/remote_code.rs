//! The machine code that runs inside a process of the service, and the layout it shares with who
//! drives it.
//!
//! The code is data here: it is copied out, never run in this process. The blocks rely on the two
//! labels of the assembly below being the first byte and the one past the last.
#![allow(unsafe_code)]

use std::arch::global_asm;

/// Where the code is mapped; the filter of the service lets calls from here pass.
pub const ADDRESS: u64 = 0x5ead_0000_0000;
/// Bytes of the whole mapping: a page of code (r-x), then pages of data (rw-).
pub const LENGTH_BYTES: u64 = 4 * 4096;
/// Where its data begins: the header, the table, scratch memory.
pub const DATA: u64 = ADDRESS + 4096;

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
pub const SCRATCH_BYTES: usize = LENGTH_BYTES as usize - 4096 - SCRATCH;

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
        // movabs rbx, DATA
        assert_eq!(code[STUB as usize..][..2], [0x48, 0xbb]);
        assert_eq!(code[STUB as usize + 2..][..8], DATA.to_le_bytes());
    }
}
