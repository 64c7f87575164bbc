//! Every system call of x86-64 and what the filter does with it.
//!
//! A call is *free* when it changes nothing that an epoch does not look at anyway (pages, sockets
//! that the wire watches, file positions, registers), *announced* when it changes what an epoch
//! would otherwise have to search for, and *denied* when its effect cannot be replicated; the
//! errno of a denied call is the one that a kernel built without the feature gives, so programs
//! are prepared for it. Some announced and free calls depend on an argument: `rules` has those.

use std::collections::HashMap;

/// What the filter does with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    Free,
    /// The notifier hears of it, then it goes on.
    Announced,
    /// It returns this errno and has no effect.
    Denied(i32),
}

/// The number after the highest call that this table knows. Later ones do not exist for a service.
pub const CALLS_END: u32 = 471;

/// Numbers between the two tables of names that x86-64 has never given out.
pub const UNUSED: std::ops::Range<u32> = 337..424;

/// Names in the order of their numbers (arch/x86/entry/syscalls/syscall_64.tbl).
const NAMES_FROM_0: &str = "\
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction \
    rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select \
    sched_yield mremap msync mincore madvise shmget shmat shmctl dup dup2 pause nanosleep \
    getitimer alarm setitimer getpid sendfile socket connect accept sendto recvfrom sendmsg \
    recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt clone \
    fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd msgrcv \
    msgctl fcntl flock fsync fdatasync truncate ftruncate getdents getcwd chdir fchdir rename \
    mkdir rmdir creat link unlink symlink readlink chmod fchmod chown fchown lchown umask \
    gettimeofday getrlimit getrusage sysinfo times ptrace getuid syslog getgid setuid setgid \
    geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups setgroups \
    setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid capget capset \
    rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime mknod uselib \
    personality ustat statfs fstatfs sysfs getpriority setpriority sched_setparam sched_getparam \
    sched_setscheduler sched_getscheduler sched_get_priority_max sched_get_priority_min \
    sched_rr_get_interval mlock munlock mlockall munlockall vhangup modify_ldt pivot_root \
    _sysctl prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2 \
    swapon swapoff reboot sethostname setdomainname iopl ioperm create_module init_module \
    delete_module get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall \
    tuxcall security gettid readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr \
    listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr tkill time futex \
    sched_setaffinity sched_getaffinity set_thread_area io_setup io_destroy io_getevents \
    io_submit io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old epoll_wait_old \
    remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64 \
    timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime \
    clock_gettime clock_getres clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes \
    vserver mbind set_mempolicy get_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive \
    mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl ioprio_set ioprio_get \
    inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat mknodat \
    fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat \
    faccessat pselect6 ppoll unshare set_robust_list get_robust_list splice tee sync_file_range \
    vmsplice move_pages utimensat epoll_pwait signalfd timerfd_create eventfd fallocate \
    timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2 epoll_create1 dup3 pipe2 \
    inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg fanotify_init \
    fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs sendmmsg \
    setns getcpu process_vm_readv process_vm_writev kcmp finit_module sched_setattr \
    sched_getattr renameat2 seccomp getrandom memfd_create kexec_file_load bpf execveat \
    userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc \
    pkey_free statx io_pgetevents rseq uretprobe uprobe";

/// Continues after [`UNUSED`].
const NAMES_FROM_424: &str = "\
    pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount \
    fsopen fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 \
    process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset \
    landlock_add_rule landlock_restrict_self memfd_secret process_mrelease futex_waitv \
    set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait \
    futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal \
    setxattrat getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr \
    listns";

/// Memory map, descriptors, epoll interest, signals, timers, credentials, process state.
const ANNOUNCED: &str = "\
    mmap munmap mremap mprotect pkey_mprotect brk madvise mlock mlock2 munlock mlockall \
    munlockall open openat openat2 open_by_handle_at creat close close_range dup dup2 dup3 fcntl \
    flock ioctl pipe pipe2 socket socketpair accept accept4 bind listen connect shutdown \
    setsockopt epoll_create epoll_create1 epoll_ctl eventfd eventfd2 timerfd_create \
    timerfd_settime signalfd signalfd4 memfd_create pidfd_open pidfd_getfd rt_sigaction \
    sigaltstack set_tid_address set_robust_list rseq prctl alarm setitimer timer_create \
    timer_settime timer_delete setuid setgid setreuid setregid setresuid setresgid setfsuid \
    setfsgid setgroups capset umask chdir fchdir chroot setrlimit prlimit64 setpriority setsid \
    setpgid personality sched_setparam sched_setscheduler sched_setaffinity sched_setattr \
    ioprio_set set_mempolicy";

/// State that lives where nothing can read it back (rings, AIO, System V and POSIX queues, watches,
/// keys, sandboxes), or only mapping by mapping (`mbind`), or that would hide changes from us
/// (`process_madvise`, `mseal`). `clone3` takes its flags through a pointer that a filter cannot
/// follow; C libraries fall back to `clone`.
const DENIED_ENOSYS: &str = "\
    io_uring_setup io_uring_enter io_uring_register io_setup io_destroy io_getevents io_submit \
    io_cancel io_pgetevents userfaultfd memfd_secret process_madvise remap_file_pages \
    map_shadow_stack mseal shmget shmat shmctl shmdt semget semop semctl semtimedop msgget \
    msgsnd msgrcv msgctl mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr \
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch fanotify_init fanotify_mark \
    add_key request_key keyctl landlock_create_ruleset landlock_add_rule landlock_restrict_self \
    seccomp clone3 modify_ldt mbind set_mempolicy_home_node";

/// Changes of namespaces and mounts, and tracing, which would meet our own.
const DENIED_EPERM: &str = "\
    perf_event_open bpf ptrace unshare setns mount umount2 pivot_root move_mount mount_setattr \
    open_tree open_tree_attr fsopen fsconfig fsmount fspick iopl ioperm";

/// `pkey_alloc`: the kernel does not tell which keys are taken. `ENOSPC` means none is left.
const DENIED_ENOSPC: &str = "\
    pkey_alloc";

/// Everything else. Written out, so that a call which no list names fails the build's test.
const FREE: &str = "\
    read write stat fstat lstat poll lseek rt_sigprocmask rt_sigreturn pread64 pwrite64 readv \
    writev access select sched_yield msync mincore pause nanosleep getitimer getpid sendfile \
    sendto recvfrom sendmsg recvmsg getsockname getpeername getsockopt clone fork vfork execve \
    exit wait4 kill uname fsync fdatasync truncate ftruncate getdents getcwd rename mkdir rmdir \
    link unlink symlink readlink chmod fchmod chown fchown lchown gettimeofday getrlimit \
    getrusage sysinfo times getuid syslog getgid geteuid getegid getppid getpgrp getgroups \
    getresuid getresgid getpgid getsid capget rt_sigpending rt_sigtimedwait rt_sigqueueinfo \
    rt_sigsuspend utime mknod uselib ustat statfs fstatfs sysfs getpriority sched_getparam \
    sched_getscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval \
    vhangup _sysctl arch_prctl adjtimex sync acct settimeofday swapon swapoff reboot sethostname \
    setdomainname create_module init_module delete_module get_kernel_syms query_module quotactl \
    nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead setxattr lsetxattr \
    fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr \
    lremovexattr fremovexattr tkill time futex sched_getaffinity set_thread_area get_thread_area \
    lookup_dcookie epoll_ctl_old epoll_wait_old getdents64 restart_syscall fadvise64 \
    timer_gettime timer_getoverrun clock_settime clock_gettime clock_getres clock_nanosleep \
    exit_group epoll_wait tgkill utimes vserver get_mempolicy kexec_load \
    waitid ioprio_get migrate_pages mkdirat mknodat fchownat futimesat newfstatat \
    unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll \
    get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait \
    fallocate timerfd_gettime preadv pwritev rt_tgsigqueueinfo recvmmsg name_to_handle_at \
    clock_adjtime syncfs sendmmsg getcpu process_vm_readv process_vm_writev kcmp finit_module \
    sched_getattr renameat2 getrandom kexec_file_load execveat membarrier copy_file_range \
    preadv2 pwritev2 pkey_free statx uretprobe uprobe pidfd_send_signal faccessat2 epoll_pwait2 \
    quotactl_fd process_mrelease futex_waitv cachestat fchmodat2 \
    futex_wake futex_wait futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr \
    lsm_list_modules setxattrat getxattrat listxattrat removexattrat file_getattr file_setattr \
    listns";

/// The names of the calls by number, up to [`CALLS_END`]. `None` for an unused number.
pub fn names() -> Vec<Option<&'static str>> {
    let unused = UNUSED.map(|_| None);
    let low = NAMES_FROM_0.split_whitespace().map(Some);
    low.chain(unused)
        .chain(NAMES_FROM_424.split_whitespace().map(Some))
        .collect()
}

/// The verdict on each of `names`, before any rule about arguments.
pub fn verdicts(names: &[Option<&str>]) -> Vec<Verdict> {
    let mut by_name = HashMap::new();
    for (verdict, listed) in LISTS {
        by_name.extend(listed.split_whitespace().map(|name| (name, verdict)));
    }
    let verdict = |name: &Option<&str>| name.and_then(|name| by_name.get(name).copied());
    names
        .iter()
        .map(|name| verdict(name).unwrap_or(Verdict::Denied(libc::ENOSYS)))
        .collect()
}

const LISTS: [(Verdict, &str); 5] = [
    (Verdict::Announced, ANNOUNCED),
    (Verdict::Denied(libc::ENOSYS), DENIED_ENOSYS),
    (Verdict::Denied(libc::EPERM), DENIED_EPERM),
    (Verdict::Denied(libc::ENOSPC), DENIED_ENOSPC),
    (Verdict::Free, FREE),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_call_has_exactly_one_verdict() {
        let listed: Vec<&str> = LISTS
            .iter()
            .flat_map(|(_, names)| names.split_whitespace())
            .collect();
        let distinct: HashSet<&str> = listed.iter().copied().collect();
        assert_eq!(listed.len(), distinct.len(), "a call stands in two lists");
        let names = names();
        assert_eq!(names.len() as u32, CALLS_END);
        for (number, name) in (0..).zip(&names) {
            match name {
                Some(name) => assert!(distinct.contains(name), "{name} stands in no list"),
                None => assert!(UNUSED.contains(&number), "call {number} has no name"),
            }
        }
        assert_eq!(
            listed.len(),
            names.iter().flatten().count(),
            "a list names no call"
        );
        assert_eq!(verdicts(&names).len() as u32, CALLS_END);
    }

    #[test]
    fn numbers_agree_with_the_c_library() {
        for (number, expected) in [
            (libc::SYS_read, "read"),
            (libc::SYS_ptrace, "ptrace"),
            (libc::SYS_gettid, "gettid"),
            (libc::SYS_openat, "openat"),
            (libc::SYS_rseq, "rseq"),
            (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
            (libc::SYS_clone3, "clone3"),
            (libc::SYS_futex_waitv, "futex_waitv"),
            (libc::SYS_fchmodat2, "fchmodat2"),
            (libc::SYS_mseal, "mseal"),
        ] {
            assert_eq!(names()[number as usize], Some(expected));
        }
    }
}
