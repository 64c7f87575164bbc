//! What an announced call is about to change, in the words of whoever captures it.

use unbroken_image::{AddressRange, Fd};

/// One thing to look at again at the next capture. A call is announced before it runs, and it may
/// fail: an announcement means "may have changed", never "has changed".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The calling thread, in the pid namespace of the notifier.
    pub thread: u32,
    pub change: Change,
}

/// The change itself. A call can make two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The memory map, in this range if the call named one; old content stays.
    MemoryMap(Option<AddressRange>),
    /// The memory map, and advice or locks with it, somewhere.
    MemoryAdvice,
    /// The memory map, and the content of this range is void.
    MemoryVoid(AddressRange),
    /// The end of the heap moves here; what lay above is void.
    Break(u64),
    /// A file is opened in the lowest free slot, or taken over from another process.
    Opened,
    /// A file of /proc is opened for writing: what is written to it may change any process and thread.
    ProcFile,
    /// Up to this many descriptors appear in the lowest free slots.
    Created(u32),
    /// One descriptor appears in the lowest free slot at or above this one.
    CreatedFrom(Fd),
    /// This slot gets another description.
    Slot(Fd),
    /// This slot is closed. The socket behind it may live on as an orphan.
    Closing(Fd),
    /// These slots are closed, or marked close-on-exec.
    CloseRange {
        first: Fd,
        last: Fd,
        close_on_exec: bool,
    },
    /// Flags of the slot, or state of the description that no cheap look would show: options,
    /// locks, addresses.
    Object(Fd),
    Epoll(EpollChange),
    /// Any slot of the table, and whatever one names.
    Descriptors,
    SignalActions,
    /// Of the announcing thread: alternate stack, robust list, tid address, rseq, name and
    /// whatever else prctl sets.
    ThreadAttributes,
    /// As above, of any threads: a call may name another one, or all of a process, group or user.
    AnyThreadAttributes,
    Timers,
    Credentials,
    /// Directories, limits, umask, session, personality, and prctl of the process.
    ProcessState,
}

impl Change {
    /// Whether it may be of another process than the announcing thread's.
    pub fn may_be_of_others(self) -> bool {
        matches!(self, Change::AnyThreadAttributes | Change::ProcFile)
    }
}

/// A call of `epoll_ctl(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollChange {
    pub epoll: Fd,
    /// `EPOLL_CTL_ADD`, `EPOLL_CTL_DEL` or `EPOLL_CTL_MOD`.
    pub operation: i32,
    pub target: Fd,
    /// The event mask and data; `None` when the call has none, or a bad pointer.
    pub event: Option<(u32, u64)>,
}

/// What a call will change. `read` copies memory of the caller; `false` when it cannot.
///
/// An announced call that this does not know counts as a change of the process state.
pub fn changes(
    call: i64,
    arguments: [u64; 6],
    read: impl Fn(u64, &mut [u8]) -> bool,
) -> [Option<Change>; 2] {
    let [a, b, c, d, e, _] = arguments;
    let fd = |argument: u64| Fd(argument as i32);
    let range = |start: u64, length: u64| page_range(start, length);
    // What these ask for does not show in /proc/PID/maps.
    let advising = (libc::MAP_NORESERVE | libc::MAP_LOCKED | libc::MAP_GROWSDOWN) as u64;
    let fixed = (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) as u64;
    let change = match call {
        libc::SYS_mmap => {
            let advice = (d & advising != 0).then_some(Change::MemoryAdvice);
            let map = match d & fixed {
                0 => Change::MemoryMap(None),
                _ => Change::MemoryVoid(range(a, b)),
            };
            return [Some(map), advice];
        }
        libc::SYS_munmap => Change::MemoryVoid(range(a, b)),
        libc::SYS_mremap => {
            let target =
                (d & libc::MREMAP_FIXED as u64 != 0).then(|| Change::MemoryVoid(range(e, c)));
            return [Some(Change::MemoryVoid(range(a, b.max(c)))), target];
        }
        libc::SYS_mprotect | libc::SYS_pkey_mprotect => Change::MemoryMap(Some(range(a, b))),
        libc::SYS_madvise if voids(c) => Change::MemoryVoid(range(a, b)),
        libc::SYS_madvise
        | libc::SYS_mlock
        | libc::SYS_mlock2
        | libc::SYS_munlock
        | libc::SYS_mlockall
        | libc::SYS_munlockall => Change::MemoryAdvice,
        libc::SYS_brk => Change::Break(a),
        libc::SYS_open
        | libc::SYS_openat
        | libc::SYS_openat2
        | libc::SYS_open_by_handle_at
        | libc::SYS_creat
        | libc::SYS_pidfd_getfd => {
            let of_proc = opens_proc_for_writing(call, arguments, read);
            return [Some(Change::Opened), of_proc.then_some(Change::ProcFile)];
        }
        libc::SYS_socket
        | libc::SYS_accept
        | libc::SYS_accept4
        | libc::SYS_epoll_create
        | libc::SYS_epoll_create1
        | libc::SYS_eventfd
        | libc::SYS_eventfd2
        | libc::SYS_timerfd_create
        | libc::SYS_memfd_create
        | libc::SYS_pidfd_open
        | libc::SYS_clone => Change::Created(1),
        libc::SYS_pipe | libc::SYS_pipe2 | libc::SYS_socketpair => Change::Created(2),
        libc::SYS_signalfd | libc::SYS_signalfd4 if a as i32 == -1 => Change::Created(1),
        libc::SYS_dup => Change::CreatedFrom(Fd(0)),
        libc::SYS_fcntl if matches!(b as i32, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) => {
            Change::CreatedFrom(fd(c))
        }
        libc::SYS_dup2 | libc::SYS_dup3 => Change::Slot(fd(b)),
        libc::SYS_close => Change::Closing(fd(a)),
        libc::SYS_close_range => Change::CloseRange {
            first: Fd(i32::try_from(a as u32).unwrap_or(i32::MAX)),
            last: Fd(i32::try_from(b as u32).unwrap_or(i32::MAX)),
            close_on_exec: c & u64::from(libc::CLOSE_RANGE_CLOEXEC) != 0,
        },
        libc::SYS_fcntl
        | libc::SYS_ioctl
        | libc::SYS_flock
        | libc::SYS_bind
        | libc::SYS_listen
        | libc::SYS_connect
        | libc::SYS_shutdown
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg
        | libc::SYS_setsockopt
        | libc::SYS_timerfd_settime
        | libc::SYS_signalfd
        | libc::SYS_signalfd4 => Change::Object(fd(a)),
        libc::SYS_splice => Change::Object(fd(c)),
        libc::SYS_epoll_ctl => Change::Epoll(EpollChange {
            epoll: fd(a),
            operation: b as i32,
            target: fd(c),
            event: read_event(d, read),
        }),
        libc::SYS_rt_sigaction => Change::SignalActions,
        libc::SYS_sigaltstack
        | libc::SYS_set_tid_address
        | libc::SYS_set_robust_list
        | libc::SYS_rseq
        | libc::SYS_set_mempolicy => Change::ThreadAttributes,
        libc::SYS_setpriority
        | libc::SYS_sched_setparam
        | libc::SYS_sched_setscheduler
        | libc::SYS_sched_setattr
        | libc::SYS_ioprio_set => Change::AnyThreadAttributes,
        libc::SYS_prctl if a as i32 == libc::PR_SET_MEMORY_MERGE => {
            return [Some(Change::ProcessState), Some(Change::MemoryAdvice)];
        }
        libc::SYS_prctl => return [Some(Change::ThreadAttributes), Some(Change::ProcessState)],
        libc::SYS_alarm
        | libc::SYS_setitimer
        | libc::SYS_timer_create
        | libc::SYS_timer_settime
        | libc::SYS_timer_delete => Change::Timers,
        libc::SYS_setuid
        | libc::SYS_setgid
        | libc::SYS_setreuid
        | libc::SYS_setregid
        | libc::SYS_setresuid
        | libc::SYS_setresgid
        | libc::SYS_setfsuid
        | libc::SYS_setfsgid
        | libc::SYS_setgroups
        | libc::SYS_capset => {
            return [Some(Change::Credentials), Some(Change::ThreadAttributes)];
        }
        _ => Change::ProcessState,
    };
    [Some(change), None]
}

/// Whether a call opens a file of /proc for writing by its whole path.
fn opens_proc_for_writing(
    call: i64,
    arguments: [u64; 6],
    read: impl Fn(u64, &mut [u8]) -> bool,
) -> bool {
    const PROC: &[u8] = b"/proc/";
    let [a, b, c, ..] = arguments;
    let (path, flags) = match call {
        libc::SYS_open => (a, b),
        libc::SYS_openat => (b, c),
        libc::SYS_creat => (a, libc::O_WRONLY as u64),
        libc::SYS_openat2 => {
            // struct open_how begins with the flags.
            let mut flags = [0; 8];
            let told = read(c, &mut flags);
            (b, if told { u64::from_ne_bytes(flags) } else { 0 })
        }
        _ => return false,
    };
    let mut start = [0; PROC.len()];
    flags as i32 & libc::O_ACCMODE != libc::O_RDONLY && read(path, &mut start) && start == *PROC
}

/// Advice after which the old content is gone: MADV_DONTNEED, FREE, REMOVE, DONTNEED_LOCKED,
/// GUARD_INSTALL, and GUARD_REMOVE for the guards themselves (asm-generic/mman-common.h).
fn voids(advice: u64) -> bool {
    matches!(advice as i32, 4 | 8 | 9 | 24 | 102 | 103)
}

fn page_range(start: u64, length: u64) -> AddressRange {
    let page = unbroken_image::PAGE_SIZE;
    let end = start.saturating_add(length).checked_next_multiple_of(page);
    AddressRange {
        start: start & !(page - 1),
        end: end.unwrap_or(!(page - 1)),
    }
}

/// `struct epoll_event` is packed on x86-64: 12 bytes.
fn read_event(address: u64, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<(u32, u64)> {
    let mut event = [0; 12];
    if address == 0 || !read(address, &mut event) {
        return None;
    }
    let (mask, data) = event.split_at(4);
    let mask = u32::from_ne_bytes(mask.try_into().ok()?);
    Some((mask, u64::from_ne_bytes(data.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::super::syscalls::{self, Verdict};
    use super::*;

    fn one(call: i64, arguments: &[u64]) -> Option<Change> {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        changes(call, all, |_, _| false)[0]
    }

    #[test]
    fn calls_name_what_they_change() {
        let range = |start, end| AddressRange { start, end };
        for (call, arguments, expected) in [
            (
                libc::SYS_munmap,
                &[0x1000, 0x1001][..],
                Change::MemoryVoid(range(0x1000, 0x3000)),
            ),
            (
                libc::SYS_mmap,
                &[0x1000, 0x1000, 3, 0x22],
                Change::MemoryMap(None),
            ),
            (
                libc::SYS_mmap,
                &[0x1000, 1, 3, 0x32],
                Change::MemoryVoid(range(0x1000, 0x2000)),
            ),
            (
                libc::SYS_madvise,
                &[0x1000, 1, 4],
                Change::MemoryVoid(range(0x1000, 0x2000)),
            ),
            (libc::SYS_madvise, &[0x1000, 1, 14], Change::MemoryAdvice),
            (libc::SYS_dup2, &[3, 7], Change::Slot(Fd(7))),
            (libc::SYS_close, &[7], Change::Closing(Fd(7))),
            (libc::SYS_fcntl, &[3, 1030, 10], Change::CreatedFrom(Fd(10))),
            (libc::SYS_fcntl, &[3, 4, 10], Change::Object(Fd(3))),
            (libc::SYS_signalfd4, &[0xffff_ffff], Change::Created(1)),
            (libc::SYS_signalfd4, &[5], Change::Object(Fd(5))),
            (libc::SYS_umask, &[5], Change::ProcessState),
            (
                libc::SYS_setpriority,
                &[0, 7, 5],
                Change::AnyThreadAttributes,
            ),
        ] {
            assert_eq!(
                one(call, arguments),
                Some(expected),
                "call {call} {arguments:x?}"
            );
        }
        let everything = one(libc::SYS_munmap, &[u64::MAX - 10, u64::MAX]);
        assert!(matches!(everything, Some(Change::MemoryVoid(_))));
    }

    #[test]
    fn epoll_events_are_read_from_the_caller() {
        let read = |address: u64, buffer: &mut [u8]| {
            assert_eq!(address, 0x1234);
            buffer.copy_from_slice(&[1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
            true
        };
        let [change, _] = changes(libc::SYS_epoll_ctl, [4, 1, 5, 0x1234, 0, 0], read);
        let expected = EpollChange {
            epoll: Fd(4),
            operation: 1,
            target: Fd(5),
            event: Some((1, 9)),
        };
        assert_eq!(change, Some(Change::Epoll(expected)));
    }

    #[test]
    fn a_file_of_proc_that_is_opened_for_writing_is_told() {
        let path_at = |path: &'static [u8]| {
            move |_: u64, buffer: &mut [u8]| {
                let length = buffer.len();
                buffer.copy_from_slice(&path[..length]);
                true
            }
        };
        let at = libc::AT_FDCWD as u64;
        let write = libc::O_WRONLY as u64;
        for (call, arguments, path, is_told) in [
            (
                libc::SYS_openat,
                [at, 1, write, 0, 0, 0],
                b"/proc/self/comm",
                true,
            ),
            (
                libc::SYS_openat,
                [at, 1, 2, 0, 0, 0],
                b"/proc/self/comm",
                true,
            ),
            (
                libc::SYS_openat,
                [at, 1, 0, 0, 0, 0],
                b"/proc/self/comm",
                false,
            ),
            (
                libc::SYS_open,
                [1, write, 0, 0, 0, 0],
                b"/process/a/file",
                false,
            ),
            (
                libc::SYS_creat,
                [1, 0, 0, 0, 0, 0],
                b"/proc/self/comm",
                true,
            ),
        ] {
            let [opened, told] = changes(call, arguments, path_at(path));
            assert_eq!(opened, Some(Change::Opened));
            assert_eq!(told, is_told.then_some(Change::ProcFile), "{arguments:?}");
        }
    }

    /// The calls that mean "anything about the process" are meant to; no other may fall there.
    #[test]
    fn no_announced_call_is_forgotten() {
        const MEANT: &[&str] = &[
            "umask",
            "chdir",
            "fchdir",
            "chroot",
            "setrlimit",
            "prlimit64",
            "setsid",
            "setpgid",
            "personality",
            "sched_setaffinity",
        ];
        let names = syscalls::names();
        for ((number, verdict), name) in (0i64..).zip(syscalls::verdicts(&names)).zip(names) {
            if verdict == Verdict::Announced {
                let name = name.expect("an announced call has a name");
                let general = one(number, &[]) == Some(Change::ProcessState);
                assert_eq!(general, MEANT.contains(&name), "{name}");
            }
        }
    }

    /// Calls come from the service with whatever it puts into its registers, and what they point
    /// at is the service's too.
    #[test]
    fn fuzz_announced_calls() {
        let sample = |call: i64, arguments: [u64; 6]| {
            let mut bytes = call.to_le_bytes().to_vec();
            bytes.extend(arguments.iter().flat_map(|word| word.to_le_bytes()));
            bytes.extend([1; 16]);
            bytes
        };
        let samples: Vec<Vec<u8>> = (0..460)
            .map(|call| sample(call, [0x7000_0000_1000, 4096, 3, 0x22, 5, 0]))
            .collect();
        unbroken_fuzz::bytes("announced-call", &samples, |bytes| {
            let (words, memory) = bytes.split_at(bytes.len().min(56));
            let mut words = words
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
            let mut word = || words.next().unwrap_or(u64::MAX);
            let call = word() as i64;
            let arguments = [word(), word(), word(), word(), word(), word()];
            let read = |_, into: &mut [u8]| {
                let known = memory.get(..into.len());
                known.map(|known| into.copy_from_slice(known)).is_some()
            };
            let _ = changes(call, arguments, read);
        });
    }
}
