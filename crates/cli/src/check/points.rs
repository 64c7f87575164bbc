//! The points that `check` tries.

use super::{Finding, Verdict};
use crate::exit::Exit;
use std::fs;
use std::io;
use std::path::Path;
use unbroken_node::directory::RUN_ROOT;
use unbroken_node::inherited::Inherited;
use unbroken_sys::bpf::{DeadlineProgram, SocketProgram};
use unbroken_sys::page_faults::FaultRing;
use unbroken_sys::probe;

/// Capabilities that root has and a restricted root may lack, by their bit (linux/capability.h).
/// CAP_SYS_RESOURCE is not among them: limits are taken as they are.
const CAPABILITIES: [(u32, &str); 9] = [
    (1, "CAP_DAC_OVERRIDE"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (8, "CAP_SETPCAP"),
    (12, "CAP_NET_ADMIN"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (23, "CAP_SYS_NICE"),
];

/// The first kernel with userfaultfd WP_ASYNC and PAGEMAP_SCAN.
const OLDEST_KERNEL: (u32, u32) = (6, 7);

/// A probe of the kernel: what it is for, what to do when it says no, and the probe.
type Probe = (&'static str, &'static str, fn() -> io::Result<()>);

const NEWER_KERNEL: &str = "boot Linux 6.7 or later";
const CHECKPOINT_RESTORE: &str = "boot a kernel built with CONFIG_CHECKPOINT_RESTORE=y, as those \
                                  of the distributions are";

const PROBES: [Probe; 10] = [
    (
        "tracking of dirty pages (userfaultfd WP_ASYNC, PAGEMAP_SCAN)",
        NEWER_KERNEL,
        probe::dirty_tracking,
    ),
    (
        "capture of connections (TCP_REPAIR)",
        CHECKPOINT_RESTORE,
        probe::tcp_repair,
    ),
    (
        "announcement of system calls (seccomp user notification)",
        "boot a kernel built with CONFIG_SECCOMP_FILTER=y",
        probe::seccomp_notification,
    ),
    (
        "capture of descriptors (pidfd_getfd)",
        NEWER_KERNEL,
        probe::pidfd_getfd,
    ),
    (
        "comparison of descriptors (kcmp)",
        "boot a kernel built with CONFIG_KCMP=y",
        probe::kcmp,
    ),
    (
        "replicas with the same pids (clone3 set_tid)",
        NEWER_KERNEL,
        probe::chosen_pid,
    ),
    (
        "replicas with the same vDSO (ARCH_MAP_VDSO_64)",
        CHECKPOINT_RESTORE,
        probe::map_vdso,
    ),
    (
        "replicas with the same memory layout (PR_SET_MM_MAP)",
        CHECKPOINT_RESTORE,
        probe::memory_layout,
    ),
    (
        "network devices (/dev/net/tun)",
        "modprobe tun; in a container: add --device /dev/net/tun",
        probe::tun,
    ),
    (
        "namespaces (network, mount, IPC, pid)",
        "boot a kernel built with CONFIG_NAMESPACES=y; in a container: add --privileged",
        probe::namespaces,
    ),
];

pub(super) fn all() -> Vec<Finding> {
    let rights = rights();
    let restricted = rights.verdict != Verdict::Ok;
    let mut findings = vec![rights, kernel()];
    findings.extend(PROBES.map(|probe| try_probe(probe, restricted)));
    findings.extend([
        ptrace_scope(),
        limits(),
        run_directory(),
        cores(),
        sockets(),
        writes(),
        waits(),
        nft(),
    ]);
    findings
}

fn ok(subject: impl Into<String>) -> Finding {
    Finding {
        subject: subject.into(),
        verdict: Verdict::Ok,
    }
}

fn missing(
    subject: impl Into<String>,
    cause: impl Into<String>,
    fix: impl Into<String>,
    exit: Exit,
) -> Finding {
    let verdict = Verdict::Missing {
        cause: cause.into(),
        fix: fix.into(),
        exit,
    };
    Finding {
        subject: subject.into(),
        verdict,
    }
}

fn warning(
    subject: impl Into<String>,
    cause: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    let verdict = Verdict::Warning {
        cause: cause.into(),
        fix: fix.into(),
    };
    Finding {
        subject: subject.into(),
        verdict,
    }
}

fn try_probe((subject, fix, probe): Probe, restricted: bool) -> Finding {
    match probe() {
        Ok(()) => ok(subject),
        Err(error) if restricted && error.kind() == io::ErrorKind::PermissionDenied => missing(
            subject,
            "cannot be tried without the rights above",
            "give those first",
            Exit::Rights,
        ),
        Err(error) => missing(subject, error.to_string(), fix, Exit::Machine),
    }
}

fn rights() -> Finding {
    let subject = "rights (root)";
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    let is_root = field("Uid:").split_whitespace().nth(1) == Some("0");
    if !is_root {
        return missing(
            subject,
            "this is not root",
            "run it with sudo: sudo unbroken ...",
            Exit::Rights,
        );
    }
    let lacking = lacking(u64::from_str_radix(&field("CapEff:"), 16).unwrap_or(0));
    if lacking.is_empty() {
        return ok(subject);
    }
    let lacking = lacking.join(", ");
    missing(
        subject,
        format!("this root lacks {lacking}"),
        "give them back; in a container: add --privileged, or --cap-add for each",
        Exit::Rights,
    )
}

fn lacking(effective: u64) -> Vec<&'static str> {
    let lacks = |(bit, name): (u32, _)| (effective & (1_u64 << bit) == 0).then_some(name);
    CAPABILITIES.into_iter().filter_map(lacks).collect()
}

fn kernel() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let subject = format!("kernel {release} (6.7 or later)");
    match version(release) {
        Some(version) if version >= OLDEST_KERNEL => ok(subject),
        _ => missing(subject, "it is too old", NEWER_KERNEL, Exit::Machine),
    }
}

/// Major and minor number of a kernel release such as `6.7.0-rc1-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What a shell or a service manager gave us and we cannot go beyond. A service gets what came.
fn limits() -> Finding {
    let subject = "limits of our own processes";
    let fix = "raise it where this is started from: ulimit of the shell, Limit...= of the unit, \
               /etc/security/limits.conf";
    match Inherited::read() {
        Ok(inherited) => match inherited.check() {
            Ok(()) => ok(subject),
            Err(error) => missing(subject, error.to_string(), fix, Exit::Machine),
        },
        Err(error) => missing(subject, error.to_string(), NEWER_KERNEL, Exit::Machine),
    }
}

/// Yama's scope 3 forbids ptrace to everybody until the next boot (Documentation: Yama).
fn ptrace_scope() -> Finding {
    let subject = "ptrace";
    match fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope") {
        Ok(scope) if scope.trim() == "3" => missing(
            subject,
            "kernel.yama.ptrace_scope is 3, which cannot be undone while the machine runs",
            "set it to 2 or lower in /etc/sysctl.d and reboot",
            Exit::Machine,
        ),
        _ => ok(subject),
    }
}

/// Read-only or absent /run is found before a service is started on it.
fn run_directory() -> Finding {
    let subject = format!("state directory ({RUN_ROOT})");
    let parent = Path::new(RUN_ROOT)
        .ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"));
    let probe = parent.join(format!(".unbroken-check-{}", std::process::id()));
    match fs::File::create_new(&probe).and_then(|_| fs::remove_file(&probe)) {
        Ok(()) => ok(subject),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => missing(
            subject,
            format!("cannot write to {}: {error}", parent.display()),
            "run it with sudo: sudo unbroken ...",
            Exit::Rights,
        ),
        Err(error) => missing(
            subject,
            format!("cannot write to {}: {error}", parent.display()),
            "mount a tmpfs there: mount -t tmpfs tmpfs /run",
            Exit::Machine,
        ),
    }
}

fn cores() -> Finding {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        1 => warning(
            "processor cores (2 or more)",
            "there is one, which service and replica must share",
            "allow a second core: pauses and latency grow without one",
        ),
        count => ok(format!("processor cores ({count})")),
    }
}

fn sockets() -> Finding {
    let subject = "reading of all connections at once (BPF iterators)";
    let own_thread = std::process::id().cast_signed();
    let tried = SocketProgram::load()
        .and_then(|program| program.reader(own_thread))
        .and_then(|reader| reader.read(&mut Vec::new()));
    match tried {
        Ok(()) => ok(subject),
        Err(error) => warning(
            subject,
            error.to_string(),
            "works without, with longer pauses when many connections are active",
        ),
    }
}

fn waits() -> Finding {
    let subject = "seeing when waits end (BPF tracepoints)";
    let tried = DeadlineProgram::load(std::process::id().cast_signed())
        .and_then(|program| program.for_sockets().load().map(drop));
    match tried {
        Ok(()) => ok(subject),
        Err(error) => warning(
            subject,
            error.to_string(),
            "works without, but a wait that an epoch interrupts can take up to twice its timeout",
        ),
    }
}

fn writes() -> Finding {
    let subject = "hearing of writes to memory (software events)";
    let tried = FaultRing::open(0, 1).and_then(|ring| ring.follow(0));
    match tried {
        Ok(_) => ok(subject),
        Err(error) => warning(
            subject,
            error.to_string(),
            "works without, with pauses that are longer by 1 ms for each GB of the service's memory",
        ),
    }
}

fn nft() -> Finding {
    let subject = "ports on the host's addresses (--publish: nft)";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join("nft").is_file());
    if found {
        return ok(subject);
    }
    warning(
        subject,
        "the program nft is not installed",
        "only --publish needs it: apt-get install nftables",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases() {
        assert_eq!(version("6.18.5-amd64"), Some((6, 18)));
        assert_eq!(version("6.7-rc1"), Some((6, 7)));
        assert_eq!(version("5.10.0"), Some((5, 10)));
        assert_eq!(version(""), None);
        assert!(version("6.18.0") >= Some(OLDEST_KERNEL));
        assert!(version("6.6.99") < Some(OLDEST_KERNEL));
    }

    #[test]
    fn capabilities_by_bit() {
        assert!(lacking(u64::MAX).is_empty());
        assert_eq!(lacking(0).len(), CAPABILITIES.len());
        assert_eq!(lacking(!(1 << 21)), ["CAP_SYS_ADMIN"]);
    }

    #[test]
    fn a_probe_that_fails_names_the_fix() {
        let probe: Probe = (
            "thing",
            "do this",
            || Err(io::ErrorKind::Unsupported.into()),
        );
        let finding = try_probe(probe, false);
        assert!(matches!(&finding.verdict, Verdict::Missing { fix, .. } if fix == "do this"));
        let denied: Probe = ("thing", "do this", || {
            Err(io::ErrorKind::PermissionDenied.into())
        });
        let finding = try_probe(denied, true);
        assert!(matches!(
            finding.verdict,
            Verdict::Missing {
                exit: Exit::Rights,
                ..
            }
        ));
    }

    #[test]
    fn fuzz_kernel_releases() {
        let samples = ["6.18.44-fc-v782", "6.7.0", "5.10.0-28-amd64"];
        unbroken_fuzz::text("kernel-release", &samples, |text| {
            let _ = version(text);
        });
    }
}
