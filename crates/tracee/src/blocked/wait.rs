//! Whether a stopped thread waits in a call, and in which. Pure: all that is asked of the kernel
//! goes through [`Look`].

use super::call::{Argument, Call, Ending, Form, Timeout, time_bytes};
use super::look::Look;
use super::slot::{Content, SlotNumber};
use unbroken_image::{BlockedCall, Registers};
use unbroken_sys::remote_code::slot::USED_BYTES;

/// include/linux/errno.h
const ERESTARTSYS: i64 = 512;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// A call that ends this much past its deadline was not let run. One that is still waiting then is
/// not the call that the deadline belongs to.
const STALE_AFTER_NS: u64 = 5_000_000;

/// A call that a thread waits in, remembered from stop to stop for as long as it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    /// The program's registers in the call: `rip` behind its instruction, its number in
    /// `orig_rax`. Nothing of them changes before the call returns.
    pub made: Registers,
    pub call: Call,
    /// When a relative timeout ends. See [`Call::deadline_ns`].
    pub deadline_ns: Option<u64>,
    /// The kernel wrote what is left to where the program has its timeout (fs/select.c,
    /// `poll_select_finish`), from where the call, made again, takes it.
    pub writes_back: bool,
    /// Where it was made again.
    pub slot: Option<SlotNumber>,
}

/// What a thread keeps of the calls that it waits in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waiting {
    pub wait: Option<Wait>,
    /// The slot that it was given, with what was written there last.
    pub slot: Option<(SlotNumber, [u8; USED_BYTES])>,
}

/// How far a waiting thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Its call has ended with EINTR, and must be made again.
    Ended,
    /// The kernel will go on with it.
    Suspended,
    /// It stands at an instruction that begins the call, or goes on with it.
    Before,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// It waits in no call, or in one that the kernel restarts by its registers alone.
    NotWaiting,
    /// Its call in a slot has returned: the registers with which the program goes on.
    Returned(Registers),
    Waiting(Wait, Progress),
}

impl Wait {
    fn new(made: Registers, call: Call, look: &mut impl Look) -> Wait {
        let deadline_ns = call.deadline_ns(&made, look);
        Wait {
            made,
            call,
            deadline_ns,
            writes_back: false,
            slot: None,
        }
    }

    /// From what the replica is told.
    pub fn of_image(again: &Registers, call: BlockedCall) -> Wait {
        let BlockedCall {
            number,
            deadline_ns,
            writes_back,
        } = call;
        let made = Registers {
            rip: again.rip + 2,
            orig_rax: number,
            ..*again
        };
        Wait {
            made,
            call: known_call(number, &made),
            deadline_ns,
            writes_back,
            slot: None,
        }
    }

    pub fn number(&self) -> u64 {
        self.made.orig_rax
    }

    /// At the program's own instruction, about to make the call.
    pub fn again(&self) -> Registers {
        Registers {
            rip: self.made.rip - 2,
            rax: self.number(),
            orig_rax: u64::MAX,
            ..self.made
        }
    }

    /// The call as it ends when a signal handler runs.
    pub fn interrupted(&self) -> Registers {
        self.returned(-i64::from(libc::EINTR))
    }

    /// The call of a socket as it ends when its time is over.
    pub fn timed_out(&self) -> Registers {
        self.returned(Call::timed_out(self.number()))
    }

    fn returned(&self, result: i64) -> Registers {
        Registers {
            rax: result as u64,
            ..self.made
        }
    }

    /// The registers of a thread in the slot as they would be, had it made the call at its own
    /// instruction.
    pub fn outside(&self, slot: SlotNumber, inside: &Registers) -> Registers {
        let instruction = self.made.rip - 2;
        Registers {
            rip: instruction + (inside.rip - slot.address()).min(2),
            rax: inside.rax,
            orig_rax: inside.orig_rax,
            // As `syscall` leaves it.
            rcx: self.made.rip,
            r11: inside.r11,
            ..self.made
        }
    }

    /// How the call is made again in `slot`, with the time that is left: registers and content.
    pub fn in_slot(&self, slot: SlotNumber, now_ns: u64) -> (Registers, Content) {
        let left_ns = self
            .deadline_ns
            .map_or(0, |deadline| deadline.saturating_sub(now_ns));
        let mut registers = Registers {
            rip: slot.address(),
            ..self.again()
        };
        let (argument, time) = match self.call.timeout {
            Timeout::Argument { argument, form, .. } if !self.writes_back => {
                let value = match form {
                    // Rounded up: never early, and by less than one in all, since the deadline
                    // stays.
                    Form::Milliseconds => left_ns.div_ceil(1_000_000).min(i32::MAX as u64),
                    Form::Timespec | Form::Timeval => slot.time_address(),
                };
                argument.set(&mut registers, value);
                (argument, time_bytes(form, left_ns))
            }
            // Nothing is changed; the slot only tells this call from the program's next.
            _ => (Argument::Rdi, [0; 16]),
        };
        let content = Content {
            argument,
            value: argument.get(&self.made),
            return_to: self.made.rip,
            number: self.number(),
            time,
        };
        (registers, content)
    }

    /// Where in the program's memory what is left is to be put, and that. The pause between the
    /// kernel's own note and the next beginning of the call would be added to its time otherwise.
    pub fn correction(&self, now_ns: u64) -> Option<(u64, [u8; 16])> {
        let Timeout::Argument { argument, form, .. } = self.call.timeout else {
            return None;
        };
        let deadline_ns = self.deadline_ns.filter(|_| self.writes_back)?;
        let left_ns = deadline_ns.saturating_sub(now_ns);
        Some((argument.get(&self.made), time_bytes(form, left_ns)))
    }

    /// What a replica is told; see [`crate::ThreadReading::image_registers`].
    pub fn for_replica(&self, handler_runs: bool) -> (Registers, Option<BlockedCall>) {
        if handler_runs {
            return (self.interrupted(), None);
        }
        let call = BlockedCall {
            number: self.number(),
            deadline_ns: self.deadline_ns,
            writes_back: self.writes_back,
        };
        (self.again(), Some(call))
    }

    /// Whether its time is over although the call, made again, begins its timeout anew.
    pub fn is_socket_past(&self, now_ns: u64) -> bool {
        self.due_ns().is_some_and(|due_ns| due_ns <= now_ns)
    }

    /// When a stop has to end the call, which its socket would let go on.
    pub fn due_ns(&self) -> Option<u64> {
        let is_of_socket = matches!(self.call.timeout, Timeout::Socket { .. });
        self.deadline_ns.filter(|_| is_of_socket)
    }

    /// Whether `registers` are still of this call, `restart_syscall(2)` now: the kernel changes
    /// none but rax, and no user code has run.
    fn is_of(&self, registers: &Registers, instruction_end: u64, look: &mut impl Look) -> bool {
        let arguments = |r: &Registers| (r.rsp, r.rdi, r.rsi, r.rdx, r.r10, r.r8);
        self.made.rip == instruction_end
            && arguments(&self.made) == arguments(registers)
            && self
                .deadline_ns
                .is_none_or(|deadline| look.now_ns() <= deadline.saturating_add(STALE_AFTER_NS))
    }
}

/// Of a call that no table knows, only that it is to be made again.
fn known_call(number: u64, registers: &Registers) -> Call {
    Call::of(number, registers).unwrap_or(Call {
        ending: Ending::Suspended,
        timeout: Timeout::Fixed,
        writes_back: false,
    })
}

/// What a thread with these `registers`, stopped on its way back from the kernel, is doing; `known`
/// is the call that it was seen to wait in at the stop before.
pub(crate) fn find(registers: &Registers, known: Option<Wait>, look: &mut impl Look) -> Finding {
    if let Some(slot) = SlotNumber::containing(registers.rip) {
        let known = known.filter(|wait| wait.slot == Some(slot));
        return match known.or_else(|| adopt(registers, slot, look)) {
            Some(wait) => find_in_slot(registers, slot, wait),
            None => Finding::NotWaiting,
        };
    }
    if let Some(wait) = known.filter(|wait| *registers == wait.again()) {
        return Finding::Waiting(wait, Progress::Before);
    }
    let number = registers.orig_rax;
    if (number as i64) < 0 {
        return Finding::NotWaiting;
    }
    if registers.rax as i64 == -i64::from(libc::EINTR) {
        return match Call::of(number, registers) {
            Some(call) if call.ending == Ending::Interrupted => {
                Finding::Waiting(Wait::new(*registers, call, look), Progress::Ended)
            }
            _ => Finding::NotWaiting,
        };
    }
    if registers.rax as i64 == -ERESTARTNOHAND {
        return match Call::of(number, registers) {
            Some(call) if call.writes_back => {
                let wait = Wait {
                    writes_back: true,
                    ..Wait::new(*registers, call, look)
                };
                match wait.deadline_ns {
                    Some(_) => Finding::Waiting(wait, Progress::Ended),
                    None => Finding::NotWaiting,
                }
            }
            _ => Finding::NotWaiting,
        };
    }
    let (progress, instruction_end) = if registers.rax as i64 == -ERESTART_RESTARTBLOCK {
        (Progress::Suspended, registers.rip)
    } else if registers.rax == libc::SYS_restart_syscall as u64 && is_call(registers.rip, look) {
        // The kernel has set rax and rip back, and then found something else to do
        // (arch/x86/kernel/signal.c, arch_do_signal_or_restart).
        (Progress::Before, registers.rip + 2)
    } else {
        return Finding::NotWaiting;
    };
    match suspended(registers, instruction_end, known, look) {
        Some(wait) => Finding::Waiting(wait, progress),
        None => Finding::NotWaiting,
    }
}

fn find_in_slot(registers: &Registers, slot: SlotNumber, wait: Wait) -> Finding {
    let is_in_call = registers.orig_rax as i64 >= 0;
    match (registers.rip - slot.address(), registers.rax as i64) {
        (0, _) => Finding::Waiting(wait, Progress::Before),
        (2, result) if is_in_call && result == -i64::from(libc::EINTR) => {
            // Where it wrote before it could not write now.
            let writes_back = false;
            Finding::Waiting(
                Wait {
                    writes_back,
                    ..wait
                },
                Progress::Ended,
            )
        }
        (2, result) if is_in_call && wait.writes_back && result == -ERESTARTNOHAND => {
            Finding::Waiting(wait, Progress::Ended)
        }
        (2, result)
            if is_in_call
                && (result == -ERESTART_RESTARTBLOCK
                    || (-ERESTARTNOHAND..=-ERESTARTSYS).contains(&result)) =>
        {
            Finding::Waiting(wait, Progress::Suspended)
        }
        _ => Finding::Returned(wait.outside(slot, registers)),
    }
}

/// A call that the kernel notes in the thread. Seen first it has its own number, and later that of
/// `restart_syscall`.
fn suspended(
    registers: &Registers,
    instruction_end: u64,
    known: Option<Wait>,
    look: &mut impl Look,
) -> Option<Wait> {
    let mut number = registers.orig_rax;
    if number == libc::SYS_restart_syscall as u64 {
        if let Some(wait) = known.filter(|wait| wait.is_of(registers, instruction_end, look)) {
            return Some(wait);
        }
        // It began under another tracer: what libraries have in front of their calls tells.
        number = number_by_code(instruction_end, look)?;
    }
    let made = Registers {
        rip: instruction_end,
        orig_rax: number,
        ..*registers
    };
    Some(Wait::new(made, known_call(number, &made), look))
}

fn is_call(address: u64, look: &mut impl Look) -> bool {
    let mut instruction = [0; 2];
    look.read(address, &mut instruction) && instruction == SYSCALL
}

/// The number that `mov eax, NUMBER; syscall`, which ends at `end`, gives; only of calls that can
/// be suspended.
fn number_by_code(end: u64, look: &mut impl Look) -> Option<u64> {
    const MOV_EAX: u8 = 0xb8;
    let mut code = [0; 7];
    if !look.read(end - 7, &mut code) || code[0] != MOV_EAX || code[5..] != SYSCALL {
        return None;
    }
    let number = u64::from(u32::from_le_bytes([code[1], code[2], code[3], code[4]]));
    let can_be = matches!(
        number as i64,
        libc::SYS_poll | libc::SYS_nanosleep | libc::SYS_clock_nanosleep | libc::SYS_futex
    );
    can_be.then_some(number)
}

/// A call that another tracer has made again in `slot`. If the kernel does not tell when it ends, it
/// gets its whole time.
fn adopt(registers: &Registers, slot: SlotNumber, look: &mut impl Look) -> Option<Wait> {
    let content = Content::read(slot, look)?;
    let mut made = Registers {
        rip: content.return_to,
        orig_rax: content.number,
        ..*registers
    };
    content.argument.set(&mut made, content.value);
    let call = known_call(content.number, &made);
    Some(Wait {
        slot: Some(slot),
        // It was given the program's own timeout if no register stands for it.
        writes_back: call.writes_back && content.argument == Argument::Rdi,
        ..Wait::new(made, call, look)
    })
}
