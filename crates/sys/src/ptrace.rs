//! `ptrace(2)` on threads that were seized (`PTRACE_SEIZE`), x86-64.
//!
//! The blocks rely on: every pointer handed to `ptrace` is to a live local or to a caller's slice
//! whose length travels with it; requests without data get null. The kernel checks the target
//! itself: a thread that is not traced by the calling thread, or not stopped, gives `ESRCH`.
#![allow(unsafe_code)]

use std::io;

pub use libc::user_regs_struct as UserRegisters;

/// Bytes of a `siginfo_t`.
pub const SIGNAL_INFO_BYTES: usize = 128;

/// `NT_X86_XSTATE`, include/uapi/linux/elf.h.
const NT_X86_XSTATE: usize = 0x202;
/// include/uapi/linux/ptrace.h
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;
/// Bytes of the kernel's `sigset_t`.
const SIGNAL_SET_BYTES: usize = 8;

/// `struct ptrace_rseq_configuration`, include/uapi/linux/ptrace.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RseqConfiguration {
    pub address: u64,
    pub size_bytes: u32,
    pub signature: u32,
    pub flags: u32,
    pad: u32,
}

fn request(request: u32, tid: i32, address: usize, data: usize) -> io::Result<i64> {
    // SAFETY: the callers below pass in `address` and `data` either plain numbers or pointers to
    // memory that lives through the call and is as long as the request writes.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Starts tracing `tid` without stopping it. `options` are `PTRACE_O_*`.
pub fn seize(tid: i32, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Asks a running (or listening) thread to stop with `PTRACE_EVENT_STOP`; does not wait.
pub fn interrupt(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Continues a stopped thread, with `signal` delivered if it is in a signal-delivery stop; 0 is
/// none.
pub fn resume(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Continues a stopped thread up to its next entry to or exit from a system call.
pub fn resume_to_system_call(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Leaves a thread that is in a group stop stopped, but able to report `SIGCONT`.
pub fn listen(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Runs one instruction of a stopped thread.
pub fn single_step(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SINGLESTEP, tid, 0, signal as usize).map(drop)
}

/// Ends tracing of a stopped thread, which runs on with `signal`.
pub fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// Replaces the `PTRACE_O_*` options of a stopped thread.
pub fn set_options(tid: i32, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// What the event a thread is stopped at carries: the new thread's id, the exit status.
pub fn event_message(tid: i32) -> io::Result<u64> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message)
}

/// The general registers of a stopped thread.
pub fn registers(tid: i32) -> io::Result<UserRegisters> {
    // SAFETY: a struct of integers, for which zero is a value.
    let mut registers: UserRegisters = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut registers as usize)?;
    Ok(registers)
}

/// Loads the general registers of a stopped thread.
pub fn set_registers(tid: i32, registers: &UserRegisters) -> io::Result<()> {
    request(
        libc::PTRACE_SETREGS,
        tid,
        0,
        std::ptr::from_ref(registers) as usize,
    )
    .map(drop)
}

/// Reads the `NT_X86_XSTATE` register set into `buffer`; returns its length in bytes. A buffer
/// that is too small gets the first part only, so one as long as the answer may be cut.
pub fn extended_state(tid: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    request(
        libc::PTRACE_GETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw mut vector as usize,
    )?;
    Ok(vector.iov_len)
}

/// Loads the `NT_X86_XSTATE` register set; `state` is whole, as [`extended_state`] gave it.
pub fn set_extended_state(tid: i32, state: &[u8]) -> io::Result<()> {
    // The kernel only reads through the vector here.
    let mut vector = libc::iovec {
        iov_base: state.as_ptr().cast_mut().cast(),
        iov_len: state.len(),
    };
    request(
        libc::PTRACE_SETREGSET,
        tid,
        NT_X86_XSTATE,
        &raw mut vector as usize,
    )
    .map(drop)
}

/// The blocked signals of a stopped thread: those that will be blocked once the call it is in
/// (`ppoll` and the like, with their temporary mask) has ended.
pub fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0_u64;
    request(
        PTRACE_GETSIGMASK,
        tid,
        SIGNAL_SET_BYTES,
        &raw mut mask as usize,
    )?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped thread.
pub fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    request(
        PTRACE_SETSIGMASK,
        tid,
        SIGNAL_SET_BYTES,
        &raw const mask as usize,
    )
    .map(drop)
}

/// The registration by `rseq(2)` of a stopped thread; address 0 means none.
pub fn rseq_configuration(tid: i32) -> io::Result<RseqConfiguration> {
    let mut configuration = RseqConfiguration::default();
    request(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RseqConfiguration>(),
        &raw mut configuration as usize,
    )?;
    Ok(configuration)
}

/// Copies queued signals from number `first` on, of the thread or (`shared`) of its process, into
/// `buffer`; returns how many there were room for.
pub fn peek_signals(
    tid: i32,
    shared: bool,
    first: u64,
    buffer: &mut [[u8; SIGNAL_INFO_BYTES]],
) -> io::Result<usize> {
    /// `struct ptrace_peeksiginfo_args`, include/uapi/linux/ptrace.h.
    #[repr(C)]
    struct Arguments {
        offset: u64,
        flags: u32,
        count: i32,
    }
    let arguments = Arguments {
        offset: first,
        flags: if shared { PTRACE_PEEKSIGINFO_SHARED } else { 0 },
        count: i32::try_from(buffer.len()).unwrap_or(i32::MAX),
    };
    let found = request(
        PTRACE_PEEKSIGINFO,
        tid,
        &raw const arguments as usize,
        buffer.as_mut_ptr() as usize,
    )?;
    Ok(found as usize)
}

/// The `siginfo_t` of the signal-delivery stop that a thread is in.
pub fn signal_info(tid: i32) -> io::Result<[u8; SIGNAL_INFO_BYTES]> {
    let mut info = [0; SIGNAL_INFO_BYTES];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// Whether `error` says that the thread died (or is not in a stop).
pub fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}
