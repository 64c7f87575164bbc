//! The calls that wait: how each of them ends when a tracer stops its thread, and where it was told
//! how long to wait.

use super::look::Look;
use unbroken_image::Registers;
use unbroken_sys::remote_code::slot;

const SECOND_NS: u64 = 1_000_000_000;
const TIMER_ABSTIME: u64 = 1;
/// linux/futex.h: the command without its flags, and the one command whose time is relative.
const FUTEX_COMMAND: u64 = 0x7f;
const FUTEX_WAIT: u64 = 0;

/// What a stop makes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It returns EINTR at any wake-up, although no handler ran (kernel sources: fs/eventpoll.c
    /// `ep_poll`, kernel/signal.c `do_sigtimedwait`, ipc/sem.c, `sock_intr_errno` for sockets with
    /// a timeout, fs/select.c `poll_select_finish` where the time that is left cannot be written).
    Interrupted,
    /// It returns ERESTART_RESTARTBLOCK: the kernel goes on with it by what it noted in the
    /// thread, which no other thread has (fs/select.c, kernel/time/hrtimer.c,
    /// kernel/futex/waitwake.c).
    Suspended,
}

/// The register of an argument that says how long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Argument {
    Rdi,
    Rdx,
    R10,
    R8,
}

/// What such an argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// An `int` of milliseconds; negative for ever.
    Milliseconds,
    /// A pointer to a `struct timespec`; null for ever.
    Timespec,
    /// A pointer to a `struct timeval`; null for ever.
    Timeval,
}

/// How long a call waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timeout {
    /// For ever, or until a point in time.
    Fixed,
    Argument {
        argument: Argument,
        form: Form,
        /// Where the kernel wrote what was left when it was stopped (man 2 nanosleep).
        left_at: Option<u64>,
    },
    /// As an option of the socket in rdi says: SO_RCVTIMEO or SO_SNDTIMEO.
    Socket { option: i32 },
}

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub ending: Ending,
    pub timeout: Timeout,
    /// It returns ERESTARTNOHAND, having written what is left to where its timeout is; EINTR only
    /// where it could not.
    pub writes_back: bool,
}

impl Argument {
    pub fn get(self, registers: &Registers) -> u64 {
        match self {
            Argument::Rdi => registers.rdi,
            Argument::Rdx => registers.rdx,
            Argument::R10 => registers.r10,
            Argument::R8 => registers.r8,
        }
    }

    pub fn set(self, registers: &mut Registers, value: u64) {
        match self {
            Argument::Rdi => registers.rdi = value,
            Argument::Rdx => registers.rdx = value,
            Argument::R10 => registers.r10 = value,
            Argument::R8 => registers.r8 = value,
        }
    }

    /// The instruction that loads it, as far as the value.
    pub fn load(self) -> [u8; 2] {
        match self {
            Argument::Rdi => slot::LOAD_RDI,
            Argument::Rdx => slot::LOAD_RDX,
            Argument::R10 => slot::LOAD_R10,
            Argument::R8 => slot::LOAD_R8,
        }
    }

    pub fn of_load(load: [u8; 2]) -> Option<Argument> {
        [Argument::Rdi, Argument::Rdx, Argument::R10, Argument::R8]
            .into_iter()
            .find(|argument| argument.load() == load)
    }
}

impl Call {
    /// The call of `number` with the arguments in `registers`; `None` when it is none of those
    /// that wait, or one that the kernel restarts by its registers alone.
    pub fn of(number: u64, registers: &Registers) -> Option<Call> {
        use Argument::{R8, R10, Rdi, Rdx};
        use Ending::{Interrupted, Suspended};
        use Form::{Milliseconds, Timespec, Timeval};
        let told = |argument, form| Timeout::Argument {
            argument,
            form,
            left_at: None,
        };
        let (ending, timeout) = match number as i64 {
            libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (Interrupted, told(R10, Milliseconds)),
            libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => (Interrupted, told(R10, Timespec)),
            libc::SYS_rt_sigtimedwait => (Interrupted, told(Rdx, Timespec)),
            libc::SYS_semop => (Interrupted, Timeout::Fixed),
            // These write back what is left, unless the program keeps its timeout in memory that
            // cannot be written or asked for STICKY_TIMEOUTS.
            libc::SYS_select => (Interrupted, told(R8, Timeval)),
            libc::SYS_pselect6 => (Interrupted, told(R8, Timespec)),
            libc::SYS_ppoll => (Interrupted, told(Rdx, Timespec)),
            libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_preadv2
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_splice => {
                let option = libc::SO_RCVTIMEO;
                (Interrupted, Timeout::Socket { option })
            }
            libc::SYS_connect
            | libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_pwritev2
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_sendfile => {
                let option = libc::SO_SNDTIMEO;
                (Interrupted, Timeout::Socket { option })
            }
            libc::SYS_poll => (Suspended, told(Rdx, Milliseconds)),
            libc::SYS_nanosleep => {
                let left_at = (registers.rsi != 0).then_some(registers.rsi);
                let (argument, form) = (Rdi, Timespec);
                let timeout = Timeout::Argument {
                    argument,
                    form,
                    left_at,
                };
                (Suspended, timeout)
            }
            libc::SYS_clock_nanosleep => (Suspended, timeout_of_sleep_on_clock(registers)),
            libc::SYS_futex if registers.rsi & FUTEX_COMMAND == FUTEX_WAIT => {
                (Suspended, told(R10, Timespec))
            }
            // All other commands, and the newer futex calls, wait until a point in time.
            libc::SYS_futex | FUTEX_WAIT_CALL => (Suspended, Timeout::Fixed),
            _ => return None,
        };
        let writes_back = matches!(
            number as i64,
            libc::SYS_select | libc::SYS_pselect6 | libc::SYS_ppoll
        );
        Some(Call {
            ending,
            timeout,
            writes_back,
        })
    }

    /// When the call whose `registers` were seen at `look`'s now ends by itself; `None` when it
    /// waits for ever or until a point in time.
    ///
    /// The kernel's own timer says it, if it was seen. Otherwise a call is taken to have begun when
    /// it was first seen: no wait ends early, as POSIX demands. One may end late then, by no more
    /// than the thread waited undisturbed before it was seen, and so by no more than its own
    /// timeout, once.
    pub fn deadline_ns(&self, registers: &Registers, look: &mut impl Look) -> Option<u64> {
        let left_ns = match self.timeout {
            Timeout::Fixed => None,
            Timeout::Argument {
                argument,
                form,
                left_at,
            } => {
                let value = argument.get(registers);
                match form {
                    Form::Milliseconds => u64::try_from(value as i32).ok().map(|ms| ms * 1_000_000),
                    Form::Timespec => read_time(left_at.unwrap_or(value), 1, look),
                    Form::Timeval => read_time(value, 1000, look),
                }
            }
            Timeout::Socket { option } => look.socket_timeout_ns(registers.rdi as i32, option),
        };
        let left_ns = left_ns?;
        let latest_ns = look.now_ns().saturating_add(left_ns);
        let told_ns = match self.timeout {
            // Before it waits it may have slept for a while because memory was short
            // (net/core/stream.c, sk_stream_wait_memory): the timer may be that one.
            Timeout::Socket {
                option: libc::SO_SNDTIMEO,
            } => None,
            _ => look.broken_off_ns(left_ns),
        };
        Some(told_ns.map_or(latest_ns, |told_ns| told_ns.min(latest_ns)))
    }

    /// What the kernel returns when the time of a call on a socket is over.
    pub fn timed_out(number: u64) -> i64 {
        match number as i64 {
            libc::SYS_connect => -i64::from(libc::EINPROGRESS),
            _ => -i64::from(libc::EAGAIN),
        }
    }
}

/// include/uapi/asm-generic/unistd.h, since Linux 6.7: `futex_wait`.
const FUTEX_WAIT_CALL: i64 = 455;

fn timeout_of_sleep_on_clock(registers: &Registers) -> Timeout {
    let (clock, flags) = (registers.rdi as i32, registers.rsi);
    // A clock of processor time (negative for a process or thread that is named) does not follow
    // ours: such a sleep begins anew in a replica.
    let counts_processor_time = clock < 0 || clock == libc::CLOCK_PROCESS_CPUTIME_ID;
    if flags & TIMER_ABSTIME != 0 || counts_processor_time {
        return Timeout::Fixed;
    }
    Timeout::Argument {
        argument: Argument::Rdx,
        form: Form::Timespec,
        left_at: (registers.r10 != 0).then_some(registers.r10),
    }
}

/// Two words at `address`: seconds, and a fraction of which `unit_ns` is one.
fn read_time(address: u64, unit_ns: u64, look: &mut impl Look) -> Option<u64> {
    let mut time = [0; 16];
    if address == 0 || !look.read(address, &mut time) {
        return None;
    }
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&time[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    Some(
        word(0)
            .saturating_mul(SECOND_NS)
            .saturating_add(word(8).saturating_mul(unit_ns)),
    )
}

/// `left_ns` as the bytes that an argument of `form` points to; rounded up where it must be.
pub(crate) fn time_bytes(form: Form, left_ns: u64) -> [u8; 16] {
    let unit_ns = if form == Form::Timeval { 1000 } else { 1 };
    let units = left_ns.div_ceil(unit_ns);
    let a_second = SECOND_NS / unit_ns;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(units / a_second).to_le_bytes());
    bytes[8..].copy_from_slice(&(units % a_second).to_le_bytes());
    bytes
}
