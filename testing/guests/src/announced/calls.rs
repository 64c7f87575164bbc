//! The tables of calls.

use super::{Made, Try, all, both_closed, call, closed};
use crate::area::PAGE;
use std::fs::File;

/// What never waits: these must give what they give undisturbed.
pub const TRIES: &[Try] = &[
    Try {
        names: "mmap munmap mremap",
        make: |_| {
            let (protection, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            let mapped = call(libc::SYS_mmap, &[&0, &PAGE, &protection, &flags, &-1, &0]);
            if mapped < 0 {
                return mapped;
            }
            let moved = call(
                libc::SYS_mremap,
                &[&mapped, &PAGE, &(2 * PAGE), &libc::MREMAP_MAYMOVE],
            );
            if moved < 0 {
                return moved;
            }
            call(libc::SYS_munmap, &[&moved, &(2 * PAGE)])
        },
    },
    Try {
        names: "mprotect pkey_mprotect madvise mlock mlock2 munlock",
        make: |scene| {
            let (page, readable) = (scene.page.address(), libc::PROT_READ);
            let writable = readable | libc::PROT_WRITE;
            all(&[
                call(libc::SYS_mprotect, &[&page, &PAGE, &readable]),
                call(libc::SYS_pkey_mprotect, &[&page, &PAGE, &writable, &-1]),
                call(libc::SYS_madvise, &[&page, &PAGE, &libc::MADV_DONTNEED]),
                call(libc::SYS_mlock, &[&page, &PAGE]),
                call(libc::SYS_mlock2, &[&page, &PAGE, &0]),
                call(libc::SYS_munlock, &[&page, &PAGE]),
            ])
        },
    },
    Try {
        names: "mlockall",
        make: |_| call(libc::SYS_mlockall, &[&0x100]),
    },
    Try {
        names: "munlockall brk",
        make: |_| {
            let end = call(libc::SYS_brk, &[&0]);
            let same = call(libc::SYS_brk, &[&end]) - end;
            all(&[call(libc::SYS_munlockall, &[]), same])
        },
    },
    Try {
        names: "open openat openat2 creat close",
        make: |scene| {
            let here = libc::AT_FDCWD;
            let how = scene.put(&[libc::O_RDWR as u64, 0, 0]);
            all(&[
                closed(call(libc::SYS_open, &[&scene.path, &libc::O_RDONLY])),
                closed(call(
                    libc::SYS_openat,
                    &[&here, &scene.path, &libc::O_WRONLY],
                )),
                closed(call(libc::SYS_openat2, &[&here, &scene.path, &how, &24])),
                closed(call(libc::SYS_creat, &[&scene.path, &0o600])),
            ])
        },
    },
    Try {
        names: "openat",
        make: |scene| {
            // Made again and again with the same arguments, and never a success.
            let nothing = scene.put(&[0]);
            call(
                libc::SYS_openat,
                &[&libc::AT_FDCWD, &nothing, &libc::O_RDONLY],
            )
        },
    },
    Try {
        names: "open_by_handle_at",
        make: |scene| {
            let handle = scene.put(&[8, 0]);
            call(libc::SYS_open_by_handle_at, &[&-1, &handle, &0])
        },
    },
    Try {
        names: "close",
        make: |_| call(libc::SYS_close, &[&-1]),
    },
    Try {
        names: "close_range",
        make: |_| call(libc::SYS_close_range, &[&9000, &9001, &0]),
    },
    Try {
        names: "dup dup2 dup3 fcntl",
        make: |scene| {
            let file = &scene.file;
            all(&[
                closed(call(libc::SYS_dup, &[file])),
                closed(call(libc::SYS_dup2, &[file, &500])),
                closed(call(libc::SYS_dup3, &[file, &501, &libc::O_CLOEXEC])),
                closed(call(libc::SYS_fcntl, &[file, &libc::F_DUPFD, &502])),
                call(libc::SYS_fcntl, &[file, &libc::F_SETFD, &libc::FD_CLOEXEC]),
            ])
        },
    },
    Try {
        names: "fcntl flock",
        make: |scene| {
            let (file, by_process, by_description) =
                (&scene.file, libc::F_SETLKW, libc::F_OFD_SETLKW);
            all(&[
                call(
                    libc::SYS_fcntl,
                    &[file, &by_process, &scene.lock(libc::F_WRLCK)],
                ),
                call(
                    libc::SYS_fcntl,
                    &[file, &by_process, &scene.lock(libc::F_WRLCK)],
                ),
                call(
                    libc::SYS_fcntl,
                    &[file, &by_process, &scene.lock(libc::F_UNLCK)],
                ),
                call(
                    libc::SYS_fcntl,
                    &[file, &by_description, &scene.lock(libc::F_WRLCK)],
                ),
                call(
                    libc::SYS_fcntl,
                    &[file, &by_description, &scene.lock(libc::F_UNLCK)],
                ),
                call(libc::SYS_flock, &[file, &libc::LOCK_SH]),
                call(libc::SYS_flock, &[file, &libc::LOCK_EX]),
                call(libc::SYS_flock, &[file, &libc::LOCK_UN]),
            ])
        },
    },
    Try {
        names: "pipe pipe2 socketpair",
        make: |scene| {
            let pair = scene.put(&[0]);
            all(&[
                both_closed(scene, call(libc::SYS_pipe, &[&pair])),
                both_closed(scene, call(libc::SYS_pipe2, &[&pair, &libc::O_NONBLOCK])),
                both_closed(
                    scene,
                    call(
                        libc::SYS_socketpair,
                        &[&libc::AF_UNIX, &libc::SOCK_STREAM, &0, &pair],
                    ),
                ),
            ])
        },
    },
    Try {
        names: "socket bind listen setsockopt ioctl",
        make: |scene| {
            let socket = call(libc::SYS_socket, &[&libc::AF_INET, &libc::SOCK_STREAM, &0]);
            if socket < 0 {
                return socket;
            }
            let on = scene.put(&[1]);
            let (level, name) = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
            let made = [
                call(libc::SYS_setsockopt, &[&socket, &level, &name, &on, &4]),
                call(libc::SYS_ioctl, &[&socket, &libc::FIONBIO, &on]),
                {
                    let anywhere = scene.put(&[libc::AF_INET as u64, 0]);
                    call(libc::SYS_bind, &[&socket, &anywhere, &16])
                },
                call(libc::SYS_listen, &[&socket, &1]),
            ];
            all(&[all(&made), closed(socket)])
        },
    },
    Try {
        names: "socket connect accept accept4 shutdown",
        make: |scene| all(&[scene.meet(libc::SYS_accept), scene.meet(libc::SYS_accept4)]),
    },
    Try {
        names: "accept",
        make: |scene| {
            let on = scene.put(&[1, 0]);
            let off = on + 8;
            let nobody = &scene.nobody_calls;
            call(libc::SYS_ioctl, &[nobody, &libc::FIONBIO, &on]);
            let made = call(libc::SYS_accept, &[nobody, &0, &0]);
            call(libc::SYS_ioctl, &[nobody, &libc::FIONBIO, &off]);
            made
        },
    },
    Try {
        names: "sendto sendmsg sendmmsg",
        make: |scene| {
            let more = libc::MSG_MORE;
            let message = scene.page.address() + 2 * PAGE;
            // struct iovec of one byte, then a struct mmsghdr with it.
            let vector = scene.put(&[scene.scratch() as u64, 1]) as u64;
            let header = [0, 0, vector, 1, 0, 0, 0, 0];
            let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
            scene.page.write(2 * PAGE, &bytes);
            let made = [
                call(libc::SYS_sendto, &[&scene.near, &vector, &1, &more, &0, &0]),
                call(libc::SYS_sendmsg, &[&scene.near, &message, &more]),
                call(libc::SYS_sendmmsg, &[&scene.near, &message, &1, &more]),
            ];
            let sent: Made = made.iter().sum();
            let read = call(libc::SYS_read, &[&scene.far, &vector, &16]);
            all(&[all(&made), if read == sent { 0 } else { read }])
        },
    },
    Try {
        names: "splice",
        make: |scene| {
            let (reader, writer) = &scene.pipe;
            let byte = scene.put(&[0]);
            let more = libc::SPLICE_F_MORE;
            let written = call(libc::SYS_write, &[writer, &byte, &1]);
            // It looks for a signal first (fs/splice.c, splice_from_pipe_next).
            let interrupted = -i64::from(libc::EINTR);
            let mut spliced = std::iter::repeat_with(|| {
                call(libc::SYS_splice, &[reader, &0, &scene.near, &0, &1, &more])
            });
            let spliced = spliced.find(|made| *made != interrupted);
            let read = call(libc::SYS_read, &[&scene.far, &byte, &1]);
            all(&[written, spliced.unwrap_or(interrupted), read])
        },
    },
    Try {
        names: "epoll_create epoll_create1 epoll_ctl",
        make: |scene| {
            let (epoll, event) = (&scene.epoll, &scene.event);
            let interest = scene.put(&[libc::EPOLLIN as u64, 0]);
            let control =
                |operation: i32| call(libc::SYS_epoll_ctl, &[epoll, &operation, event, &interest]);
            all(&[
                closed(call(libc::SYS_epoll_create, &[&1])),
                closed(call(libc::SYS_epoll_create1, &[&0])),
                control(libc::EPOLL_CTL_ADD),
                control(libc::EPOLL_CTL_MOD),
                control(libc::EPOLL_CTL_DEL),
            ])
        },
    },
    Try {
        names: "eventfd eventfd2 memfd_create",
        make: |scene| {
            all(&[
                closed(call(libc::SYS_eventfd, &[&1])),
                closed(call(libc::SYS_eventfd2, &[&1, &0])),
                closed(call(libc::SYS_memfd_create, &[&scene.path, &0])),
            ])
        },
    },
    Try {
        names: "timerfd_create timerfd_settime",
        make: |scene| {
            let timer = call(libc::SYS_timerfd_create, &[&libc::CLOCK_MONOTONIC, &0]);
            if timer < 0 {
                return timer;
            }
            let setting = scene.put(&[0, 0, 1000, 0]);
            let set = call(libc::SYS_timerfd_settime, &[&timer, &0, &setting, &0]);
            all(&[set, closed(timer)])
        },
    },
    Try {
        names: "signalfd signalfd4",
        make: |scene| {
            let mask = scene.put(&[1 << (libc::SIGWINCH - 1)]);
            all(&[
                closed(call(libc::SYS_signalfd, &[&-1, &mask, &8])),
                closed(call(libc::SYS_signalfd4, &[&-1, &mask, &8, &0])),
            ])
        },
    },
    Try {
        // A descriptor of a process would end protection.
        names: "pidfd_open",
        make: |_| call(libc::SYS_pidfd_open, &[&-1, &0]),
    },
    Try {
        names: "pidfd_getfd",
        make: |_| call(libc::SYS_pidfd_getfd, &[&-1, &0, &0]),
    },
    Try {
        // As would a child.
        names: "clone",
        make: |scene| {
            let flags = libc::CLONE_PIDFD | libc::CLONE_PARENT_SETTID;
            call(libc::SYS_clone, &[&flags, &0, &scene.scratch(), &0, &0])
        },
    },
    Try {
        names: "rt_sigaction sigaltstack",
        make: |scene| {
            let (stack, handler) = (libc::SYS_sigaltstack, libc::SYS_rt_sigaction);
            let ignore = scene.put(&[libc::SIG_IGN as u64, 0, 0, 0]);
            let ignored = call(handler, &[&libc::SIGWINCH, &ignore, &0, &8]);
            let none = scene.put(&[0, libc::SS_DISABLE as u64, 0]);
            all(&[ignored, call(stack, &[&none, &0])])
        },
    },
    Try {
        names: "set_tid_address set_robust_list",
        make: |scene| {
            let head = scene.page.address() + 3 * PAGE;
            let place = scene.scratch();
            let mut made = vec![call(libc::SYS_set_tid_address, &[&head])];
            made.push(call(libc::SYS_get_robust_list, &[&0, &place, &(place + 8)]));
            let known = scene.page.read(PAGE, 8);
            let known = u64::from_ne_bytes(known.try_into().unwrap_or_default());
            made.push(call(libc::SYS_set_robust_list, &[&known, &24]));
            all(&made)
        },
    },
    Try {
        names: "rseq",
        make: |_| call(libc::SYS_rseq, &[&0, &0, &0, &0]),
    },
    Try {
        names: "prctl personality umask",
        make: |scene| {
            let name = scene.put(&[0x006d_726f_7473]);
            all(&[
                call(libc::SYS_prctl, &[&libc::PR_SET_NAME, &name, &0, &0, &0]),
                call(libc::SYS_personality, &[&0]),
                call(libc::SYS_umask, &[&0o22]),
            ])
        },
    },
    Try {
        names: "alarm setitimer timer_create timer_settime timer_delete",
        make: |scene| {
            let none = scene.put(&[0; 4]);
            // SIGEV_NONE.
            let event = scene.put(&[0, (libc::SIGEV_NONE as u64) << 32, 0, 0, 0, 0, 0, 0]);
            let number = scene.page.address() + 2 * PAGE;
            let created = call(
                libc::SYS_timer_create,
                &[&libc::CLOCK_MONOTONIC, &event, &number],
            );
            let timer = scene.page.read(2 * PAGE, 4);
            let timer = i32::from_ne_bytes(timer.try_into().unwrap_or_default());
            let never = scene.put(&[0; 4]);
            all(&[
                call(libc::SYS_alarm, &[&10_000]),
                call(libc::SYS_alarm, &[&0]),
                call(libc::SYS_setitimer, &[&libc::ITIMER_VIRTUAL, &none, &0]),
                created,
                call(libc::SYS_timer_settime, &[&timer, &0, &never, &0]),
                call(libc::SYS_timer_delete, &[&timer]),
            ])
        },
    },
    Try {
        names: "setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups",
        make: |scene| {
            let (user, group) = (call(libc::SYS_getuid, &[]), call(libc::SYS_getgid, &[]));
            let groups = call(libc::SYS_getgroups, &[&512, &scene.scratch()]);
            all(&[
                call(libc::SYS_setgroups, &[&groups, &scene.scratch()]),
                call(libc::SYS_setuid, &[&user]),
                call(libc::SYS_setgid, &[&group]),
                call(libc::SYS_setreuid, &[&-1, &-1]),
                call(libc::SYS_setregid, &[&-1, &-1]),
                call(libc::SYS_setresuid, &[&-1, &-1, &-1]),
                call(libc::SYS_setresgid, &[&-1, &-1, &-1]),
                call(libc::SYS_setfsuid, &[&user]),
                call(libc::SYS_setfsgid, &[&group]),
            ])
        },
    },
    Try {
        names: "capset",
        make: |scene| {
            // _LINUX_CAPABILITY_VERSION_3 of this thread.
            let header = scene.put(&[0x2008_0522]);
            let data = header + 64;
            all(&[
                call(libc::SYS_capget, &[&header, &data]),
                call(libc::SYS_capset, &[&header, &data]),
            ])
        },
    },
    Try {
        names: "chdir fchdir chroot",
        make: |scene| {
            let root = scene.put(&[u64::from(b'/')]);
            all(&[
                call(libc::SYS_chdir, &[&scene.directory_path]),
                call(libc::SYS_fchdir, &[&scene.directory]),
                call(libc::SYS_chroot, &[&root]),
            ])
        },
    },
    Try {
        names: "setrlimit prlimit64",
        make: |scene| {
            let (limit, which) = (scene.scratch(), libc::RLIMIT_CORE);
            all(&[
                call(libc::SYS_getrlimit, &[&which, &limit]),
                call(libc::SYS_setrlimit, &[&which, &limit]),
                call(libc::SYS_prlimit64, &[&0, &which, &limit, &0]),
            ])
        },
    },
    Try {
        names: "setsid",
        make: |_| call(libc::SYS_setsid, &[]),
    },
    Try {
        names: "setpgid",
        make: |_| call(libc::SYS_setpgid, &[&0, &0]),
    },
    Try {
        names: "setpriority sched_setparam sched_setscheduler sched_setaffinity sched_setattr",
        make: |scene| {
            let mask = scene.scratch();
            let set = call(libc::SYS_sched_getaffinity, &[&0, &1024, &mask]);
            let affinity = call(libc::SYS_sched_setaffinity, &[&0, &set, &mask]);
            let none = scene.put(&[0]);
            let made = [
                call(libc::SYS_setpriority, &[&libc::PRIO_PROCESS, &0, &0]),
                call(libc::SYS_sched_setparam, &[&0, &none]),
                call(
                    libc::SYS_sched_setscheduler,
                    &[&0, &libc::SCHED_OTHER, &none],
                ),
            ];
            // struct sched_attr of 48 bytes.
            let attributes = scene.put(&[48, 0, 0, 0, 0, 0]);
            let attributes = call(libc::SYS_sched_setattr, &[&0, &attributes, &0]);
            all(&[set, affinity, all(&made), attributes])
        },
    },
    Try {
        names: "ioprio_set set_mempolicy",
        make: |_| {
            // A thread's own, class and level of none; the policy of the system.
            all(&[
                call(libc::SYS_ioprio_set, &[&1, &0, &0]),
                call(libc::SYS_set_mempolicy, &[&libc::MPOL_DEFAULT, &0, &0]),
            ])
        },
    },
];

/// What waits for somebody who never comes: a signal with a handler must end it.
pub const WAITS: &[Try] = &[
    Try {
        names: "accept",
        make: |scene| call(libc::SYS_accept, &[&scene.nobody_calls, &0, &0]),
    },
    Try {
        names: "accept4",
        make: |scene| call(libc::SYS_accept4, &[&scene.nobody_calls, &0, &0, &0]),
    },
    Try {
        names: "flock",
        make: |scene| {
            call(libc::SYS_flock, &[&scene.other, &libc::LOCK_EX]);
            let made = call(libc::SYS_flock, &[&scene.file, &libc::LOCK_EX]);
            call(libc::SYS_flock, &[&scene.other, &libc::LOCK_UN]);
            made
        },
    },
    Try {
        names: "fcntl",
        make: |scene| {
            let command = libc::F_OFD_SETLKW;
            let lock = |file: &File, kind: i32| {
                call(libc::SYS_fcntl, &[file, &command, &scene.lock(kind)])
            };
            lock(&scene.other, libc::F_RDLCK);
            let made = lock(&scene.file, libc::F_WRLCK);
            lock(&scene.other, libc::F_UNLCK);
            made
        },
    },
    Try {
        names: "sendto",
        make: |scene| {
            let byte = scene.scratch();
            let more = libc::MSG_MORE;
            call(libc::SYS_sendto, &[&scene.full, &byte, &1, &more, &0, &0])
        },
    },
    Try {
        names: "splice",
        make: |scene| {
            let (reader, more) = (&scene.pipe.0, libc::SPLICE_F_MORE);
            call(libc::SYS_splice, &[reader, &0, &scene.near, &0, &1, &more])
        },
    },
    Try {
        names: "open",
        make: |scene| closed(call(libc::SYS_open, &[&scene.fifo, &libc::O_RDONLY])),
    },
];
