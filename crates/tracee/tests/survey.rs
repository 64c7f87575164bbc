//! What a survey says about live processes, against what they did to themselves.

mod common;

use common::Guest;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use unbroken_image::{FileIdentity, Pid, ProcessState};
use unbroken_tracee::{HostTid, Tree, survey};

const NOBODY: u32 = 65534;

/// A process that runs `script`, which must print "ready" when it is as it should be.
fn python(script: &str) -> Guest {
    let mut command = Command::new("python3");
    let prelude = "import ctypes, os, signal, sys, threading, time, resource\n\
                   c = ctypes.CDLL(None, use_errno=True)\n\
                   def ready():\n    print('ready', flush=True)\n";
    command.arg("-c").arg(format!("{prelude}{script}"));
    Guest::spawn(command)
}

/// Seizes the guest and gives it a blob.
fn seize(guest: &Guest) -> (Tree, Pid, HostTid) {
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    let tid = HostTid(guest.pid());
    let mut stopped = tree.stop().unwrap();
    stopped.install_blob(tid).unwrap();
    stopped.resume().unwrap();
    (tree, Pid(guest.pid()), tid)
}

fn survey(guest: &Guest) -> ProcessState {
    let (mut tree, pid, _) = seize(guest);
    tree.stop().unwrap().survey_process(pid).unwrap()
}

#[test]
fn signals_limits_and_settings() {
    let directory = std::env::temp_dir().canonicalize().unwrap();
    let guest = python(&format!(
        "signal.signal(signal.SIGUSR1, lambda *a: None)\n\
         signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n\
         signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n\
         os.kill(os.getpid(), signal.SIGTERM)\n\
         os.umask(0o027); os.chdir({directory:?})\n\
         resource.setrlimit(resource.RLIMIT_NOFILE, (77, 88))\n\
         c.prctl(36, 1); c.prctl(4, 0); c.prctl(41, 1, 0, 0, 0); c.personality(0x0040000)\n\
         os.setsid() if os.getpid() != os.getsid(0) else None\n\
         ready(); time.sleep(1000)"
    ));
    let state = survey(&guest);
    let action = |signal: i32| state.signal_actions[signal as usize - 1];
    assert_eq!(state.signal_actions.len(), 64);
    assert!(action(libc::SIGUSR1).handler > 1);
    assert_ne!(action(libc::SIGUSR1).restorer, 0);
    assert_eq!(action(libc::SIGUSR2).handler, libc::SIG_IGN as u64);
    assert_eq!(action(libc::SIGKILL).handler, libc::SIG_DFL as u64);
    let handled = survey::handled_signals(&state.signal_actions);
    assert_ne!(handled & 1 << (libc::SIGUSR1 - 1), 0);
    assert_eq!(handled & 1 << (libc::SIGUSR2 - 1), 0);
    assert_eq!(state.umask, 0o27);
    assert_eq!(state.working_directory.path, directory.to_str().unwrap());
    assert_eq!(state.working_directory.identity, identity(&directory));
    assert_eq!(state.root_directory.path, "/");
    assert_eq!(state.root_directory.identity, identity(Path::new("/")));
    assert_eq!(state.limits.len(), 16);
    assert_eq!(state.limits[libc::RLIMIT_NOFILE as usize], (77, 88));
    assert!(state.child_subreaper);
    assert_eq!(state.dumpable, 0);
    assert!(state.huge_pages_disabled == 1);
    assert_eq!(state.personality, 0x0040000);
    assert_eq!(
        (state.session, state.process_group),
        (guest.pid(), guest.pid())
    );
    assert_eq!(state.credentials.uids, [0; 4]);
    assert!(state.posix_timers.is_empty());
}

#[test]
fn a_process_that_dropped_root_can_be_surveyed_whole() {
    let guest = python(
        "os.setgroups([5, 6]); os.setresgid(65534, 65534, 65534)\n\
         os.setresuid(65534, 65534, 65534)\n\
         ready(); time.sleep(1000)",
    );
    let (mut tree, pid, tid) = seize(&guest);
    let mut stopped = tree.stop().unwrap();
    let state = stopped.survey_process(pid).unwrap();
    assert_eq!(state.credentials.uids, [NOBODY; 4]);
    assert_eq!(state.credentials.gids, [NOBODY; 4]);
    assert_eq!(state.credentials.groups, [5, 6]);
    assert_eq!(
        (state.credentials.effective, state.credentials.permitted),
        (0, 0)
    );
    // fs.suid_dumpable: 0 or 2, never 1 after a change of uid.
    assert_ne!(state.dumpable, 1);
    let nofile = state.limits[libc::RLIMIT_NOFILE as usize];
    assert!(nofile.0 > 0 && nofile.0 <= nofile.1);
    let attributes = stopped.survey_thread(tid).unwrap();
    assert_ne!(attributes.robust_list.head, 0);
    let layout = stopped.survey_memory_layout(pid).unwrap();
    let program = format!("/proc/{}/exe", guest.pid());
    assert_eq!(layout.executable, identity(Path::new(&program)));
}

#[test]
fn timers_have_deadlines_on_their_clocks() {
    let guest = python(
        "signal.signal(signal.SIGALRM, lambda *a: None)\n\
         signal.setitimer(signal.ITIMER_REAL, 500, 7)\n\
         signal.setitimer(signal.ITIMER_PROF, 300)\n\
         class Event(ctypes.Structure):\n\
         \x20   _fields_ = [('value', ctypes.c_void_p), ('signo', ctypes.c_int), \
                            ('notify', ctypes.c_int), ('tid', ctypes.c_int), \
                            ('pad', ctypes.c_int * 11)]\n\
         def timer(clock, signo, notify, value, interval, seconds):\n\
         \x20   e = Event(value, signo, notify, threading.get_native_id())\n\
         \x20   id = ctypes.c_int(); s = (ctypes.c_long * 4)(interval, 0, seconds, 0)\n\
         \x20   assert c.syscall(222, clock, ctypes.byref(e), ctypes.byref(id)) == 0\n\
         \x20   assert c.syscall(223, id, 0, s, None) == 0\n\
         timer(1, 34, 0, 0x1234, 2, 600)\n\
         timer(0, 35, 4, 0, 0, 700)\n\
         timer(2, 36, 1, 0, 0, 0)\n\
         ready(); time.sleep(1000)",
    );
    let (mut tree, pid, _) = seize(&guest);
    let now_ns = monotonic_ns();
    let mut stopped = tree.stop().unwrap();
    let mut state = stopped.survey_process(pid).unwrap();
    const SECOND_NS: u64 = 1_000_000_000;
    let [real, virt, profile] = state.interval_timers;
    assert_eq!(real.interval_ns, 7 * SECOND_NS);
    assert!((now_ns + 400 * SECOND_NS..now_ns + 501 * SECOND_NS).contains(&real.expiry_ns));
    assert_eq!((virt.expiry_ns, virt.interval_ns), (0, 0));
    assert!((200 * SECOND_NS..301 * SECOND_NS).contains(&profile.expiry_ns));

    assert_eq!(state.posix_timers.len(), 3);
    let [first, second, third] = [0, 1, 2].map(|position| state.posix_timers[position].clone());
    assert_eq!(
        (first.signal, first.notify, first.value),
        (34, libc::SIGEV_SIGNAL, 0x1234)
    );
    assert_eq!(
        (first.clock, first.interval_ns),
        (libc::CLOCK_MONOTONIC, 2 * SECOND_NS)
    );
    assert!((now_ns + 500 * SECOND_NS..now_ns + 601 * SECOND_NS).contains(&first.expiry_ns));
    assert_eq!(second.notify, libc::SIGEV_THREAD_ID);
    assert_eq!(second.notify_tid, guest.pid());
    assert!(
        second.expiry_ns > 1_000_000_000 * SECOND_NS,
        "it is on the wall clock"
    );
    assert_eq!((third.notify, third.expiry_ns), (libc::SIGEV_NONE, 0));

    let before = state.clone();
    stopped.survey_timers(pid, &mut state).unwrap();
    let difference = state.posix_timers[0]
        .expiry_ns
        .abs_diff(before.posix_timers[0].expiry_ns);
    assert!(
        difference < SECOND_NS,
        "the deadline of a stopped process moved: {difference} ns"
    );
    let is_stale = |state: &ProcessState, now_ns| stopped.timers_are_stale(pid, state, now_ns);
    // The profiling timer and the one on the wall clock can only be asked for.
    assert!(is_stale(&state, now_ns).unwrap());
    state.interval_timers[2].expiry_ns = 0;
    assert!(is_stale(&state, now_ns).unwrap());
    state.posix_timers[1].expiry_ns = 0;
    assert!(!is_stale(&state, now_ns).unwrap());
    assert!(is_stale(&state, now_ns + 601 * SECOND_NS).unwrap());
    // A thread that is not there.
    state.posix_timers[1].notify_tid += 1;
    assert!(is_stale(&state, now_ns).unwrap());
}

#[test]
fn one_category_can_be_read_again() {
    let mut guest = python(
        "ready(); sys.stdin.readline()\n\
         signal.signal(signal.SIGUSR1, lambda *a: None); os.umask(0o077)\n\
         os.setresuid(65534, 65534, 0); os.chdir('/'); resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))\n\
         ready(); time.sleep(1000)",
    );
    let (mut tree, pid, _) = seize(&guest);
    let mut state = tree.stop().unwrap().survey_process(pid).unwrap();
    use std::io::Write;
    guest.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    guest.expect_line("ready");
    let mut stopped = tree.stop().unwrap();
    stopped
        .survey_signal_actions(pid, &mut state.signal_actions)
        .unwrap();
    stopped.survey_settings(pid, &mut state).unwrap();
    assert_eq!(state, stopped.survey_process(pid).unwrap());
    assert_eq!(state.umask, 0o77);
    assert_eq!(state.credentials.uids, [NOBODY, NOBODY, 0, NOBODY]);
    assert_eq!(state.limits[libc::RLIMIT_NOFILE as usize], (50, 60));
}

#[test]
fn a_handler_for_one_signal_is_read_again_when_it_has_run() {
    let mut guest = python(
        "handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)\n\
         c.sysv_signal(signal.SIGUSR1, handler); signal.signal(signal.SIGUSR2, lambda *a: None)\n\
         ready()\n\
         for line in sys.stdin:\n\
         \x20   os.kill(os.getpid(), int(line)); print('done', flush=True)",
    );
    let (mut tree, pid, _) = seize(&guest);
    let mut actions = Vec::new();
    let position = libc::SIGUSR1 as usize - 1;
    let mut stopped = tree.stop().unwrap();
    stopped.survey_signal_actions(pid, &mut actions).unwrap();
    stopped.resume().unwrap();
    assert!(actions[position].handler > 1);
    for (signal, is_stale) in [(libc::SIGUSR2, false), (libc::SIGUSR1, true)] {
        guest.tell(&mut tree, &signal.to_string());
        let stopped = tree.stop().unwrap();
        let found = stopped.signal_actions_are_stale(pid, &actions).unwrap();
        assert_eq!(found, is_stale, "signal {signal}");
    }
    let mut stopped = tree.stop().unwrap();
    stopped.survey_signal_actions(pid, &mut actions).unwrap();
    assert_eq!(actions[position].handler, libc::SIG_DFL as u64);
    assert!(!stopped.signal_actions_are_stale(pid, &actions).unwrap());
}

#[test]
fn threads_and_memory_layout() {
    let guest = python(
        "def work():\n\
         \x20   s = (ctypes.c_long * 3)(ctypes.addressof(stack), 0, 65536)\n\
         \x20   assert c.sigaltstack(s, None) == 0\n\
         \x20   c.prctl(15, b'a-worker'); c.prctl(1, 10); c.prctl(29, 77000)\n\
         \x20   os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)\n\
         \x20   done.set(); time.sleep(1000)\n\
         stack = ctypes.create_string_buffer(65536); done = threading.Event()\n\
         threading.Thread(target=work, daemon=True).start(); done.wait()\n\
         ready(); time.sleep(1000)",
    );
    let (mut tree, pid, leader) = seize(&guest);
    let mut stopped = tree.stop().unwrap();
    let process = stopped.process(pid).unwrap();
    let worker = process
        .threads()
        .map(|thread| thread.host_tid)
        .find(|&tid| tid != leader);
    let attributes = stopped.survey_thread(worker.unwrap()).unwrap();
    assert_eq!(attributes.name, b"a-worker");
    assert_eq!(attributes.parent_death_signal, 10);
    assert_eq!(attributes.timer_slack_ns, 77000);
    assert_eq!(attributes.nice, 5);
    assert!(!attributes.no_new_privileges);
    assert_eq!(attributes.alternate_stack.length_bytes, 65536);
    assert_eq!(attributes.alternate_stack.flags, 0);
    assert_ne!(attributes.clear_child_tid, 0);
    assert_eq!(attributes.robust_list.length_bytes, 24);
    let leader = stopped.survey_thread(leader).unwrap();
    assert_eq!(leader.alternate_stack.flags, libc::SS_DISABLE);
    assert_eq!(leader.nice, 0);

    let layout = stopped.survey_memory_layout(pid).unwrap();
    assert!(layout.start_code < layout.end_code && layout.start_data < layout.end_data);
    assert!(layout.start_brk < layout.brk);
    assert!(layout.arg_start < layout.arg_end && layout.arg_end <= layout.env_start);
    assert!(layout.env_end > layout.start_stack);
    assert_eq!(layout.auxv.len() % 16, 0);
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.pid())).unwrap();
    let heap = maps.lines().find(|line| line.ends_with("[heap]")).unwrap();
    let end = heap.split(['-', ' ']).nth(1).unwrap();
    assert_eq!(layout.brk, u64::from_str_radix(end, 16).unwrap());
}

#[test]
fn a_directory_is_the_same_one_whatever_its_name_becomes() {
    let guest = python(
        "import tempfile\nd = tempfile.mkdtemp(); os.mkdir(d + '/a'); os.chdir(d + '/a')\n\
         os.rename(d + '/a', d + '/b'); os.rmdir(d + '/b'); os.rmdir(d)\n\
         ready(); time.sleep(1000)",
    );
    let (mut tree, pid, _) = seize(&guest);
    let state = tree.stop().unwrap().survey_process(pid).unwrap();
    let link = format!("/proc/{}/cwd", guest.pid());
    assert_eq!(state.working_directory.identity, identity(Path::new(&link)));
}

#[test]
fn a_directory_whose_identity_does_not_last_has_none() {
    let guest = python("os.chdir('/proc'); ready(); time.sleep(1000)");
    let state = survey(&guest);
    assert_eq!(state.working_directory.path, "/proc");
    assert_eq!(state.working_directory.identity, FileIdentity::default());
}

fn identity(path: &Path) -> FileIdentity {
    let file = std::fs::metadata(path).unwrap();
    FileIdentity {
        device: file.dev(),
        inode: file.ino(),
    }
}

fn monotonic_ns() -> u64 {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let seconds: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
    (seconds * 1e9) as u64
}
