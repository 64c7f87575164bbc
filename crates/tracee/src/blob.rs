//! The blob: the pages of ours in every process of the service through which [`crate::Batch`]
//! makes calls.
//!
//! Installing it is the one thing here that a dying tracer can spoil: the first calls are made from
//! an instruction of the vDSO, with the thread's registers only in the tracer. It happens while a
//! service is being taken over or started, under `PTRACE_O_EXITKILL`.

use crate::host::{HostPid, HostTid};
use crate::thread::State;
use crate::{Stopped, TraceError, proc};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use unbroken_image::{AddressRange, PAGE_SIZE, Registers};
use unbroken_sys::remote_code;
use unbroken_sys::wait::{Change, wait};
use unbroken_sys::{ptrace, signal};

/// Where the blob is in every process.
pub const RANGE: AddressRange = AddressRange {
    start: remote_code::ADDRESS,
    end: remote_code::ADDRESS + remote_code::LENGTH_BYTES,
};

/// The part of it from which every call passes the service's filter. What is made again from a slot
/// is the service's own call and is announced as any other.
pub const UNFILTERED: AddressRange = AddressRange {
    start: remote_code::ADDRESS,
    end: remote_code::SLOTS,
};

/// The name that `/proc/PID/maps` shows, where the kernel has `CONFIG_ANON_VMA_NAME`.
const NAME: &[u8] = b"unbroken\0";

/// Signals that do nothing by default, the least used first: one of them is the notice that a
/// batch is done. If all are handled the last is taken; a handler of it then runs once too often
/// only if the tracer dies in the middle of a batch. (SIGCONT would wake what is stopped.)
const NOTICES: [i32; 3] = [libc::SIGWINCH, libc::SIGURG, libc::SIGCHLD];

impl Stopped<'_> {
    /// Maps the blob into the process of thread `tid`, or takes over the one that an earlier
    /// tracer left there. Needed once for each new program (exec); a forked child inherits it.
    pub fn install_blob(&mut self, tid: HostTid) -> Result<(), TraceError> {
        let (process, _) = self.thread(tid).ok_or(TraceError::gone(tid))?;
        let host_pid = process.host_pid;
        let notice = choose_notice(host_pid)?;
        let vdso = find_vdso(host_pid, process.memory())?;
        let instruction = find_syscall_instruction(host_pid, process.memory(), vdso)?;
        if self.take_over_blob(tid)? {
            let left_open = self.userfault_left_open(tid)?;
            self.tree.set_notice(host_pid, notice, vdso);
            if let Some(number) = left_open {
                self.close_userfault(tid, number)?;
            }
            return Ok(());
        }

        let map = [
            RANGE.start,
            RANGE.length_bytes(),
            (libc::PROT_READ | libc::PROT_EXEC) as u64,
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64,
            u64::MAX,
            0,
        ];
        match self.inject_call(tid, instruction, libc::SYS_mmap, &map)? {
            address if address == RANGE.start => {}
            result if result as i64 == -i64::from(libc::EEXIST) => {
                return Err(TraceError::BlobAddressTaken {
                    tid,
                    address: RANGE.start,
                });
            }
            result => return Err(remote_error("mmap of the blob", tid, result)),
        }
        let data = remote_code::SLOTS - remote_code::DATA;
        let protect = [
            remote_code::DATA,
            data,
            (libc::PROT_READ | libc::PROT_WRITE) as u64,
        ];
        let result = self.inject_call(tid, instruction, libc::SYS_mprotect, &protect)?;
        if result != 0 {
            return Err(remote_error("mprotect of the blob", tid, result));
        }
        // The code last: where it stands, everything does.
        let (process, _) = self.thread(tid).ok_or(TraceError::gone(tid))?;
        let mut page = remote_code::code().to_vec();
        let name = RANGE.start + page.len() as u64;
        page.extend_from_slice(NAME);
        process
            .memory()
            .write_all_at(&page, RANGE.start)
            .map_err(TraceError::of_thread("write the blob", tid))?;
        self.tree.set_notice(host_pid, notice, vdso);
        // EINVAL where the kernel lacks names: nothing but /proc/PID/maps shows it.
        let set_name = [
            libc::PR_SET_VMA as u64,
            libc::PR_SET_VMA_ANON_NAME as u64,
            RANGE.start,
            RANGE.length_bytes(),
            name,
        ];
        let mut batch = self.remote(tid);
        batch.call(libc::SYS_prctl, &set_name)?;
        batch.run()?;
        Ok(())
    }

    /// Whether the process of `tid` is known to have a blob.
    pub fn has_blob(&self, tid: HostTid) -> bool {
        self.thread(tid)
            .is_some_and(|(process, _)| process.notice.is_some())
    }

    /// Whether what is mapped at the blob's address is ours: it then holds our code. Threads that a
    /// dead tracer left in it come out by themselves; they are let run until they have.
    fn take_over_blob(&mut self, tid: HostTid) -> Result<bool, TraceError> {
        let (process, _) = self.thread(tid).ok_or(TraceError::gone(tid))?;
        let code = remote_code::code();
        let mut found = vec![0; code.len()];
        // EIO where nothing is mapped.
        if process
            .memory()
            .read_exact_at(&mut found, RANGE.start)
            .is_err()
            || found != code
        {
            return Ok(false);
        }
        let threads: Vec<HostTid> = process.threads().map(|thread| thread.host_tid).collect();
        for thread in threads {
            self.run_while(thread, |now| UNFILTERED.contains(now.rip))?;
        }
        Ok(true)
    }

    /// Makes one call from a `syscall` instruction of the process's own. By PTRACE_SYSCALL and not
    /// by single steps: those end in a forced SIGTRAP, which resets the program's handler when it
    /// is blocked or ignored (KERNEL.md, Forced signals).
    fn inject_call(
        &mut self,
        tid: HostTid,
        instruction: u64,
        number: i64,
        arguments: &[u64],
    ) -> Result<u64, TraceError> {
        let original = self.registers(tid)?;
        let mask = self.signal_mask(tid)?;
        let argument = |position: usize| arguments.get(position).copied().unwrap_or(0);
        let call = Registers {
            rip: instruction,
            rax: number as u64,
            orig_rax: u64::MAX,
            rdi: argument(0),
            rsi: argument(1),
            rdx: argument(2),
            r10: argument(3),
            r8: argument(4),
            r9: argument(5),
            ..original
        };
        self.set_registers(tid, &call)?;
        self.set_signal_mask(tid, u64::MAX)?;
        self.tree.set_state(tid, State::Running);
        self.run_to_system_call_stop(tid)?;
        self.run_to_system_call_stop(tid)?;
        let result = self.registers(tid)?.rax;
        // A stop at the end of a call is not one at which the kernel looks for a call to restart
        // (that is done with signals); one more trap is.
        self.set_signal_mask(tid, mask)?;
        self.set_registers(
            tid,
            &Registers {
                orig_rax: u64::MAX,
                ..original
            },
        )?;
        ptrace::interrupt(tid.0).map_err(TraceError::of_thread("interrupt", tid))?;
        ptrace::resume(tid.0, 0).map_err(TraceError::of_thread("continue", tid))?;
        self.tree.settle()?;
        self.set_registers(tid, &original)?;
        Ok(result)
    }

    fn run_to_system_call_stop(&mut self, tid: HostTid) -> Result<(), TraceError> {
        let died = TraceError::Died {
            tid,
            operation: "an injected call",
        };
        let mut stops = Vec::new();
        loop {
            ptrace::resume_to_system_call(tid.0)
                .map_err(TraceError::of_thread("inject a call", tid))?;
            let report = wait(tid.0).map_err(TraceError::of_tracer("wait for a call"))?;
            let Some(report) = report else {
                return Err(died);
            };
            match report.change {
                Change::SystemCall => break,
                Change::Signal(signal) => stops.push(signal),
                Change::Event { event, .. } if event == libc::PTRACE_EVENT_EXIT => {
                    self.tree.handle(report, true)?;
                    return Err(died);
                }
                Change::Ended(_) => {
                    self.tree.handle(report, true)?;
                    return Err(died);
                }
                Change::Event { .. } => {}
            }
        }
        for missed in stops {
            if let Some((process, _)) = self.thread(tid) {
                // A thread that died meanwhile misses no signal.
                let _ = signal::to_thread(process.host_pid.0, tid.0, missed);
            }
        }
        Ok(())
    }
}

fn remote_error(call: &'static str, tid: HostTid, result: u64) -> TraceError {
    let source = io::Error::from_raw_os_error(-(result as i64) as i32);
    TraceError::RemoteCall { call, tid, source }
}

/// A signal that the process does not handle and that does nothing by default.
fn choose_notice(host_pid: HostPid) -> Result<i32, TraceError> {
    let path = format!("/proc/{host_pid}/status");
    let text = proc::read_if_alive(&path)?.ok_or(TraceError::NoSuchProcess { pid: host_pid.0 })?;
    let caught = text
        .lines()
        .find_map(|line| line.strip_prefix("SigCgt:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or(TraceError::ProcFormat {
            path,
            what: "SigCgt",
        })?;
    Ok(notice_for(caught))
}

/// The same for a process that handles the signals of `caught`, signal 1 in bit 0.
pub(crate) fn notice_for(caught: u64) -> i32 {
    let is_free = |signal: &i32| caught & (1 << (signal - 1)) == 0;
    NOTICES.into_iter().find(is_free).unwrap_or(libc::SIGCHLD)
}

/// Where the vDSO of a process is, by its auxiliary vector and its own ELF header.
pub(crate) fn find_vdso(host_pid: HostPid, memory: &File) -> Result<AddressRange, TraceError> {
    /// include/uapi/linux/auxvec.h
    const AT_SYSINFO_EHDR: u64 = 33;
    let path = format!("/proc/{host_pid}/auxv");
    let auxiliary = match fs::read(&path) {
        Ok(auxiliary) => auxiliary,
        Err(source) => return Err(TraceError::Proc { path, source }),
    };
    let start = auxiliary
        .chunks_exact(16)
        .find(|pair| word(pair, 0) == AT_SYSINFO_EHDR)
        .map(|pair| word(pair, 8))
        .ok_or(TraceError::ProcFormat {
            path,
            what: "AT_SYSINFO_EHDR",
        })?;
    let mut header = [0; PAGE_SIZE as usize];
    memory
        .read_exact_at(&mut header, start)
        .map_err(TraceError::of_thread("read the vDSO", HostTid(host_pid.0)))?;
    let path = format!("/proc/{host_pid}/mem");
    let length = loaded_bytes(&header).ok_or(TraceError::ProcFormat {
        path,
        what: "the header of the vDSO",
    })?;
    Ok(AddressRange {
        start,
        end: start + length.next_multiple_of(PAGE_SIZE),
    })
}

/// Bytes of the loaded segment of a small ELF file (`Elf64_Ehdr` and `Elf64_Phdr` of elf(5)).
fn loaded_bytes(header: &[u8]) -> Option<u64> {
    const PT_LOAD: u32 = 1;
    let half = |at: usize| {
        Some(usize::from(u16::from_ne_bytes(
            header.get(at..at + 2)?.try_into().ok()?,
        )))
    };
    let table = header.get(usize::try_from(word(header, 0x20)).ok()?..)?;
    let (entry_bytes, entries) = (half(0x36)?, half(0x38)?);
    let mut segments = table.chunks_exact(entry_bytes.max(0x38)).take(entries);
    let loaded = segments.find(|segment| segment[..4] == PT_LOAD.to_ne_bytes())?;
    Some(word(loaded, 0x28))
}

/// The eight bytes at `offset`, which the slice must have.
fn word(bytes: &[u8], offset: usize) -> u64 {
    let mut array = [0; 8];
    array.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_ne_bytes(array)
}

/// A `syscall` instruction that every program has: the vDSO's.
fn find_syscall_instruction(
    host_pid: HostPid,
    memory: &File,
    vdso: AddressRange,
) -> Result<u64, TraceError> {
    let mut code = vec![0; vdso.length_bytes() as usize];
    memory
        .read_exact_at(&mut code, vdso.start)
        .map_err(TraceError::of_thread("read the vDSO", HostTid(host_pid.0)))?;
    code.windows(2)
        .position(|pair| pair == [0x0f, 0x05])
        .map(|offset| vdso.start + offset as u64)
        .ok_or(TraceError::ProcFormat {
            path: format!("/proc/{host_pid}/mem"),
            what: "the vDSO, which has no syscall instruction",
        })
}
