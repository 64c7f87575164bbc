//! Stages with real processes, each in network namespaces of its own. Needs root.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use unbroken_node::config::Bounds;
use unbroken_node::inherited::Inherited;
use unbroken_node::stage::address::{self, Addresses};
use unbroken_node::stage::announcement::{Announcement, Change};
use unbroken_node::stage::host::HostLink;
use unbroken_node::stage::launch::{
    INIT_SUBCOMMAND, Identity, Init, InitReport, InitRole, Output, Pending,
};
use unbroken_node::stage::notifier::{Announcements, serve};
use unbroken_node::stage::{Error, Stage, StageConfig, init};
use unbroken_sys::namespace::{self, Namespaces};

const NOTIFIER_SUBCOMMAND: &str = "__notifier";

/// The program itself: the first python3 in PATH may be a script that starts others.
const PYTHON: &str = "/usr/bin/python3";

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(first) if first == INIT_SUBCOMMAND => init::main(arguments),
        Some(first) if first == NOTIFIER_SUBCOMMAND => serve(
            std::io::stdin().as_fd(),
            &Announcements::new(Bounds::USUAL.announcements),
            false,
        )
        .expect("serve"),
        filter => run_all(
            filter
                .and_then(|filter| filter.into_string().ok())
                .as_deref(),
        ),
    }
}

fn run_all(filter: Option<&str>) {
    let tests: &[(&str, fn())] = &[
        ("runs_a_service_to_its_end", runs_a_service_to_its_end),
        (
            "follows_a_service_into_the_background",
            follows_a_service_into_the_background,
        ),
        (
            "says_why_a_command_does_not_run",
            says_why_a_command_does_not_run,
        ),
        ("takes_on_the_user", takes_on_the_user),
        ("sets_up_the_network", sets_up_the_network),
        ("carries_traffic", carries_traffic),
        ("announces_and_denies", announces_and_denies),
        ("survives_its_notifiers", survives_its_notifiers),
        ("dies_with_its_last_holder", dies_with_its_last_holder),
        (
            "a_stub_waits_and_ends_with_the_standby",
            a_stub_waits_and_ends_with_the_standby,
        ),
    ];
    for (name, test) in tests
        .iter()
        .filter(|(name, _)| filter.is_none_or(|f| name.contains(f)))
    {
        // A network namespace for the host's side too: nothing here touches the real host's.
        let result = thread::Builder::new()
            .name((*name).into())
            .spawn(|| {
                namespace::unshare(Namespaces::NETWORK).expect("be root");
                test();
            })
            .expect("a thread")
            .join();
        println!(
            "{name} ... {}",
            if result.is_ok() { "ok" } else { "FAILED" }
        );
        if result.is_err() {
            std::process::exit(101);
        }
    }
}

fn some_addresses() -> Addresses {
    address::pick_free_addresses(None)
        .expect("addresses")
        .next()
        .expect("a free pair")
}

fn stage() -> Stage {
    Stage::create(StageConfig {
        addresses: some_addresses(),
        mtu_bytes: 1500,
    })
    .expect("a stage")
}

fn service(command: &[&str]) -> InitRole {
    InitRole::Service {
        command: command.iter().map(OsString::from).collect(),
        identity: None,
        inherited: Inherited::default(),
    }
}

/// Installs the filter and serves it on a thread.
fn filtered(pending: &Pending) -> (Announcements, thread::JoinHandle<()>) {
    let listener = pending.install_filter().expect("the filter");
    let announcements = Announcements::new(Bounds::USUAL.announcements);
    announcements.set_recording(true);
    let queue = announcements.clone();
    let server = thread::spawn(move || serve(listener.as_fd(), &queue, false).expect("serve"));
    (announcements, server)
}

fn read_all(end: OwnedFd) -> String {
    let mut text = String::new();
    File::from(end).read_to_string(&mut text).expect("output");
    text
}

/// Runs a shell script as the service and returns what it printed.
fn run_script(stage: &Stage, script: &str) -> (String, Init) {
    let role = service(&["sh", "-c", script]);
    let (init, pending, output) = stage.spawn_init(role).expect("init");
    let (_, server) = filtered(&pending);
    pending.execute().expect("exec");
    let Output { stdout, stderr } = output.expect("a service has output");
    let printed = read_all(stdout) + &read_all(stderr);
    server.join().expect("the notifier ends with the service");
    (printed, init)
}

fn next_exit(init: &Init) -> (bool, Option<i32>) {
    match init.report().expect("a report") {
        InitReport::FirstExited(status) => (true, status.code()),
        InitReport::AllExited(status) => (false, status.code()),
        InitReport::InitGone => panic!("init said nothing"),
    }
}

fn runs_a_service_to_its_end() {
    let (printed, init) = run_script(
        &stage(),
        "echo pid $$; echo error >&2; readlink /proc/self; ls -l /proc/$$/fd; \
         cat /proc/$$/stat; grep -E 'Sig(Blk|Ign)' /proc/$$/status; exit 7",
    );
    assert!(printed.contains("pid 2\n"), "{printed}");
    assert!(printed.contains("error\n"), "{printed}");
    assert!(printed.contains("0 -> /dev/null"), "{printed}");
    assert!(
        !printed.contains(" 3 -> "),
        "no descriptor of ours is left: {printed}"
    );
    assert!(printed.contains("2 (sh) R 1 2 2 0") || printed.contains("2 (sh) S 1 2 2 0"));
    assert!(printed.contains("SigBlk:\t0000000000000000"), "{printed}");
    let ignored = printed.split_once("SigIgn:\t").expect("SigIgn").1;
    let ignored = u64::from_str_radix(ignored[..16].trim(), 16).expect("a mask");
    assert_eq!(
        ignored & 1 << (13 - 1),
        0,
        "SIGPIPE as a program expects it: {printed}"
    );
    assert_eq!(next_exit(&init), (true, Some(7)));
    assert_eq!(next_exit(&init), (false, Some(7)));
    assert_eq!(init.report().expect("a report"), InitReport::InitGone);
}

fn follows_a_service_into_the_background() {
    let (printed, init) = run_script(
        &stage(),
        "(trap 'echo last; exit 4' TERM; kill $$; sleep 0.1; exit 5) & wait",
    );
    assert_eq!(printed, "");
    // The shell died of the signal; its orphan went on and was reaped.
    assert_eq!(next_exit(&init), (true, None));
    assert_eq!(next_exit(&init), (false, Some(5)));
}

fn says_why_a_command_does_not_run() {
    let attempt = |command: &str| {
        let stage = stage();
        let (_init, pending, _output) = stage.spawn_init(service(&[command])).expect("init");
        let (_, server) = filtered(&pending);
        let error = pending.execute().expect_err("it cannot run");
        server.join().expect("the child ends");
        error
    };
    assert!(matches!(
        attempt("no-such-command-here"),
        Error::CommandNotFound { .. }
    ));
    assert!(matches!(
        attempt("/etc/passwd"),
        Error::CommandNotExecutable { .. }
    ));
    let error = attempt("no-such-command-here").to_string();
    assert_eq!(
        error,
        "run \"no-such-command-here\": no such command in PATH"
    );
}

fn takes_on_the_user() {
    let identity = Identity {
        user: 1234,
        group: 2345,
        groups: vec![2345, 3456],
    };
    let command = [
        "sh",
        "-c",
        "id -u; id -g; id -G; grep CapEff /proc/self/status",
    ];
    let command = command.iter().map(OsString::from).collect();
    let stage = stage();
    let role = InitRole::Service {
        command,
        identity: Some(identity),
        inherited: Inherited::default(),
    };
    let (_init, pending, output) = stage.spawn_init(role).expect("init");
    let (announcements, server) = filtered(&pending);
    pending.execute().expect("exec");
    let printed = read_all(output.expect("output").stdout);
    assert!(printed.starts_with("1234\n2345\n2345 3456\n"), "{printed}");
    assert!(printed.contains("CapEff:\t0000000000000000"), "{printed}");
    server.join().expect("the notifier ends with the service");
    let mut list = Vec::new();
    announcements.take(&mut list);
    assert!(
        list.iter()
            .any(|announcement| announcement.change == Change::Credentials)
    );
}

fn sets_up_the_network() {
    let stage = stage();
    let Addresses { service_v4, v6, .. } = some_addresses();
    let (printed, _init) = run_script(
        &stage,
        "ip -o addr; ip route; ip -6 route; ip link show ub0; cd /proc/sys/net/ipv4; \
         grep . tcp_syncookies tcp_congestion_control tcp_wmem",
    );
    for expected in [
        "127.0.0.1/8".to_owned(),
        format!("inet {service_v4}/32"),
        "default dev ub0".to_owned(),
        "mtu 1500".to_owned(),
        "qlen 10000".to_owned(),
        "tcp_syncookies:2".to_owned(),
        "tcp_wmem:4096\t16384\t1048576".to_owned(),
    ] {
        assert!(
            printed.contains(&expected),
            "{expected} is missing in {printed}"
        );
    }
    if let Some((_, service)) = v6 {
        assert!(
            printed.contains(&format!("inet6 {service}/128")),
            "{printed}"
        );
        assert!(
            !printed.contains("fe80"),
            "no link-local traffic: {printed}"
        );
        assert!(!printed.contains("tentative"), "{printed}");
    }
    let mut packet = [0; 2048];
    let silence = File::from(stage.tun().try_clone_to_owned().expect("dup")).read(&mut packet);
    let silence = silence.expect_err("an idle stage sends nothing").kind();
    assert_eq!(silence, ErrorKind::WouldBlock);
}

/// Copies packets from one device to the other until told to end. Counts those larger than the
/// MTU.
fn forward(from: OwnedFd, to: OwnedFd, end: &AtomicBool, large: &AtomicUsize) {
    let (mut from, mut to) = (File::from(from), File::from(to));
    let mut packet = vec![0; 70_000];
    while !end.load(Ordering::Relaxed) {
        match from.read(&mut packet) {
            Ok(length) => {
                large.fetch_add(usize::from(length > 1600), Ordering::Relaxed);
                to.write_all(&packet[..length])
                    .expect("a packet passes whole");
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            Err(error) => panic!("read a packet: {error}"),
        }
    }
}

fn carries_traffic() {
    let link = HostLink::create(None, 1500).expect("a host link");
    let stage = Stage::create(StageConfig {
        addresses: link.addresses,
        mtu_bytes: 1500,
    });
    let stage = stage.expect("a stage");
    assert_eq!(link.name, "ub0", "the first free name");
    let second = HostLink::create(None, 1500).expect("a second link");
    assert_eq!(second.name, "ub1");
    assert_ne!(second.addresses.service_v4, link.addresses.service_v4);
    let taken = HostLink::create_with(link.addresses, 1500).expect_err("the same addresses");
    assert!(matches!(taken, Error::AddressTaken { .. }));
    let wanted = IpAddr::from([198, 51, 100, 7]);
    let third = HostLink::create(Some(wanted), 1500).expect("a link with a wanted address");
    assert_eq!(IpAddr::from(third.addresses.service_v4), wanted);
    let taken = HostLink::create(Some(wanted), 1500).expect_err("the wanted address is in use");
    assert!(matches!(taken, Error::AddressTaken { .. }));

    let (end, large) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let duplicate = |end: std::os::fd::BorrowedFd<'_>| end.try_clone_to_owned().expect("dup");
    let forwarders = [
        (duplicate(link.tun.as_fd()), duplicate(stage.tun())),
        (duplicate(stage.tun()), duplicate(link.tun.as_fd())),
    ]
    .map(|(from, to)| {
        let (end, large) = (end.clone(), large.clone());
        thread::spawn(move || forward(from, to, &end, &large))
    });
    let v6 = link.addresses.v6.map(|(_, service)| IpAddr::from(service));
    for address in [Some(link.addresses.service_v4.into()), v6]
        .into_iter()
        .flatten()
    {
        let listener = stage
            .run(move || TcpListener::bind((address, 7777)))
            .expect("stage");
        let listener = listener.expect("bind inside");
        let echo = thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("accept");
            let mut received = Vec::new();
            client.read_to_end(&mut received).expect("read");
            client.write_all(&received).expect("write");
        });
        let mut client = TcpStream::connect(SocketAddr::from((address, 7777))).expect("connect");
        client
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("timeout");
        let sent: Vec<u8> = (0..3_000_000u32).map(|number| (number / 7) as u8).collect();
        client.write_all(&sent).expect("write");
        client
            .shutdown(std::net::Shutdown::Write)
            .expect("shutdown");
        let mut received = Vec::new();
        client.read_to_end(&mut received).expect("read");
        assert!(received == sent, "bytes differ over {address}");
        echo.join().expect("echo");
    }
    assert!(
        large.load(Ordering::Relaxed) > 0,
        "offload carries large packets whole"
    );
    end.store(true, Ordering::Relaxed);
    forwarders
        .into_iter()
        .for_each(|forwarder| forwarder.join().expect("forwarder"));
}

fn announces_and_denies() {
    const SCRIPT: &str = r#"
import ctypes, errno, mmap, os, select, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(number, *arguments):
    libc.syscall(number, *arguments)
    return errno.errorcode.get(ctypes.get_errno())
try: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
except OSError as error: print("packet", errno.errorcode[error.errno])
try: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
except OSError as error: print("mptcp", errno.errorcode[error.errno])
print("io_uring", errno_of(425, 1, 0))
print("unshare", errno_of(272, 0x40000000))
print("clone3", errno_of(435, 0, 0))
listener = socket.create_server(("127.0.0.1", 0))
epoll = select.epoll()
epoll.register(listener.fileno(), select.EPOLLIN)
print("slots", listener.fileno(), epoll.fileno())
copy = os.dup2(0, 77)
os.umask(0o77)
area = mmap.mmap(-1, 1 << 20)
area.close()
"#;
    let stage = stage();
    let role = service(&[PYTHON, "-c", SCRIPT]);
    let (_init, pending, output) = stage.spawn_init(role).expect("init");
    let (announcements, server) = filtered(&pending);
    pending.execute().expect("exec");
    let output = output.expect("output");
    let printed = read_all(output.stdout) + &read_all(output.stderr);
    for expected in [
        "packet EAFNOSUPPORT",
        "mptcp EPROTONOSUPPORT",
        "io_uring ENOSYS",
        "unshare EPERM",
        "clone3 ENOSYS",
    ] {
        assert!(
            printed.contains(expected),
            "{expected} is missing in {printed}"
        );
    }
    server.join().expect("the notifier ends with the service");
    let mut list = Vec::new();
    announcements.take(&mut list);
    let has =
        |test: fn(&Change) -> bool| list.iter().any(|Announcement { change, .. }| test(change));
    assert!(has(|change| matches!(change, Change::Created(1))));
    assert!(has(
        |change| matches!(change, Change::Slot(fd) if fd.0 == 77)
    ));
    assert!(has(|change| matches!(change, Change::Break(_))));
    assert!(has(
        |change| matches!(change, Change::MemoryVoid(range) if range.pages() == 256)
    ));
    assert!(has(|change| matches!(change, Change::ProcessState)));
    assert!(has(|change| matches!(change, Change::SignalActions)));
    let (listener, epoll) = printed
        .lines()
        .find_map(|line| line.strip_prefix("slots ")?.split_once(' '))
        .map(|(listener, epoll)| (listener.parse::<i32>(), epoll.parse::<i32>()))
        .expect("the script says its slots");
    let added = list
        .iter()
        .find_map(|announcement| match announcement.change {
            Change::Epoll(change) => Some(change),
            _ => None,
        });
    let added = added.expect("an epoll change");
    assert_eq!((Ok(added.target.0), Ok(added.epoll.0)), (listener, epoll));
    assert_eq!(
        added.event.map(|(mask, data)| (mask, data as i32)),
        Some((1, added.target.0))
    );
}

fn survives_its_notifiers() {
    // Every turn makes several announced calls; an error of any would end the script.
    const SCRIPT: &str = "import os\n\
        for turn in range(3000):\n\
        \x20   os.close(os.open('/dev/null', os.O_RDONLY))\n\
        print('done')\n";
    let stage = stage();
    let (_init, pending, output) = stage
        .spawn_init(service(&[PYTHON, "-c", SCRIPT]))
        .expect("init");
    let listener = pending.install_filter().expect("the filter");
    let notifier = || -> Child {
        Command::new("/proc/self/exe")
            .arg(NOTIFIER_SUBCOMMAND)
            .stdin(Stdio::from(listener.try_clone().expect("dup")))
            .spawn()
            .expect("a notifier")
    };
    let pid = pending.host_pid;
    let mut current = notifier();
    pending.execute().expect("exec");
    let reader = thread::spawn(move || read_all(output.expect("output").stdout));
    let mut killed = 0;
    while !reader.is_finished() {
        thread::sleep(Duration::from_millis(5));
        current.kill().expect("kill the notifier");
        current.wait().expect("reap the notifier");
        killed += 1;
        current = notifier();
        // A call that the dead notifier had taken is made again when its thread is interrupted.
        for signal in ["-STOP", "-CONT"] {
            let _ = Command::new("kill")
                .args([signal, &pid.to_string()])
                .stderr(Stdio::null())
                .status();
        }
    }
    assert_eq!(
        reader.join().expect("reader"),
        "done\n",
        "after {killed} notifiers"
    );
    assert!(killed > 1, "no notifier died while the service ran");
    let _ = current.kill();
    current.wait().expect("reap the notifier");
}

/// Waits until a process is gone or a zombie.
fn wait_gone(pid: i32) {
    let state = || std::fs::read_to_string(format!("/proc/{pid}/stat"));
    for _ in 0..2000 {
        match state() {
            Ok(stat) if !stat.contains(") Z") => thread::sleep(Duration::from_millis(5)),
            _ => return,
        }
    }
    panic!("process {pid} lives on: {:?}", state());
}

fn dies_with_its_last_holder() {
    let stage = stage();
    let (init, pending, _output) = stage.spawn_init(service(&["sleep", "1000"])).expect("init");
    let (_, server) = filtered(&pending);
    let pid = pending.host_pid;
    pending.execute().expect("exec");
    let heir = Init::adopt(
        init.control().try_clone_to_owned().expect("dup"),
        init.host_pid,
    );
    drop(init);
    thread::sleep(Duration::from_millis(50));
    assert!(
        std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "an heir holds it"
    );
    drop(heir);
    wait_gone(pid);
    server.join().expect("the notifier ends with the service");
}

fn a_stub_waits_and_ends_with_the_standby() {
    let stage = stage();
    let (init, pending, output) = stage.spawn_init(InitRole::Stub).expect("init");
    assert!(output.is_none());
    let listener = pending.install_filter().expect("the filter");
    let pid = pending.host_pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let namespaced = status
        .lines()
        .find(|line| line.starts_with("NSpid:"))
        .expect("NSpid");
    assert!(namespaced.ends_with("\t2"), "{namespaced}");
    drop((pending, init, listener));
    wait_gone(pid);
}
