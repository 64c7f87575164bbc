//! Everything that the kernel tells a process about itself and that a program can set, asked for
//! whole and not by a list of what is known to be carried: /proc/self, every prctl that reads, I/O
//! priority, scheduling, memory policy, the flags of every mapping. Two threads, of which one has
//! everything set and the other nothing.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Result, ensure};
use unbroken_guests::area::{Area, PAGE};
use unbroken_guests::raw::{
    call, memory_policy, prctl_get, prctl_get_by_pointer, prctl_set, prctl_set_with,
    set_memory_policy,
};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, same, signals};

/// What was found, by where.
type Found = BTreeMap<String, String>;

/// Lines of /proc/self/status about how the process fares, which changes by itself.
const FARES: &[&str] = &[
    "State",
    "Vm",
    "Rss",
    "FDSize",
    "SigQ",
    "Cpus_allowed",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];

/// Flags of mappings by which written pages are found: not the program's.
const TRACKING: &[&str] = &["sd", "uw", "um", "ui"];

/// The options of prctl that read, those of other processors too (linux/prctl.h): by the value that
/// is returned, and through a pointer.
const READ_BY_VALUE: &[i32] = &[
    3, 7, 13, 21, 27, 30, 34, 39, 42, 46, 56, 58, 61, 64, 66, 68, 70,
];
const READ_BY_POINTER: &[i32] = &[2, 5, 9, 11, 16, 19, 25, 37, 40, 74];
const PR_SET_IO_FLUSHER: i32 = 57;
/// How many arguments an option asks about, where it is not one.
const KINDS: &[(i32, u64)] = &[
    (libc::PR_CAPBSET_READ, 41),
    (libc::PR_GET_SPECULATION_CTRL, 3),
];

struct Attributes {
    areas: Vec<Area>,
    memfd: std::os::fd::OwnedFd,
    other: (Sender<()>, Receiver<Result<Found>>),
    expected: Option<[Found; 2]>,
    round: u64,
}

impl Guest for Attributes {
    fn set_up(_: &Place) -> Result<Self> {
        let other = other_thread();
        let mut attributes = Self {
            areas: Vec::new(),
            memfd: rustix::fs::memfd_create("attributes", rustix::fs::MemfdFlags::empty())?,
            other,
            expected: None,
            round: 0,
        };
        attributes.arm()?;
        Ok(attributes)
    }

    fn check(&mut self) -> Result<()> {
        let found = self.look()?;
        let expected = self.expected.take().unwrap_or_default();
        let mut differences = Vec::new();
        for (found, expected) in found.iter().zip(&expected) {
            differences.extend(differences_of(found, expected));
        }
        ensure!(differences.is_empty(), "{}", differences.join("; "));
        ensure!(
            found[0].len() > 80,
            "only {} things were asked",
            found[0].len()
        );
        self.round += 1;
        self.arm()
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words {
            "inherited" => inherited(),
            _ => anyhow::bail!("this guest does not know {words:?}"),
        }
    }
}

/// As [`Guest::step`] is told by the test that starts it so.
fn inherited() -> Result<()> {
    same(
        "action of SIGHUP",
        signals::action(libc::SIGHUP)?.0,
        libc::SIG_IGN,
    )?;
    same("mask", signals::masked(), vec![libc::SIGUSR2])
}

impl Attributes {
    /// Sets all there is to something that is no default, and differs by round where it can.
    fn arm(&mut self) -> Result<()> {
        let odd = self.round % 2;
        const CLASS_BEST_EFFORT: u64 = 2 << 13;
        call(
            libc::SYS_ioprio_set,
            [1, 0, CLASS_BEST_EFFORT | (5 + odd), 0],
        )?;
        set_memory_policy(
            if odd == 0 {
                libc::MPOL_INTERLEAVE
            } else {
                libc::MPOL_PREFERRED
            },
            1,
        )?;
        prctl_set_with(libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET as u64, odd])?;
        prctl_set(libc::PR_SET_TIMERSLACK, 60_000 + odd)?;
        prctl_set_with(libc::PR_SET_THP_DISABLE, [1 - odd, 0])?;
        // Since Linux 6.18, and the processor decides whether it can be had.
        let _ = prctl_set_with(libc::PR_SET_THP_DISABLE, [1 - odd, 2]);
        let _ = prctl_set_with(
            libc::PR_SET_SPECULATION_CTRL,
            [0, libc::PR_SPEC_DISABLE as u64],
        );
        // Needs a capability that root may lack.
        let _ = prctl_set(libc::PR_SET_MEMORY_MERGE, 1);
        let _ = prctl_set(PR_SET_IO_FLUSHER, 1);
        prctl_set(libc::PR_SET_KEEPCAPS, 1 - odd)?;
        // Of this thread alone, as a server of files does it.
        call(libc::SYS_setfsgid, [70 + odd, 0, 0, 0])?;
        prctl_set(libc::PR_SET_PDEATHSIG, libc::SIGURG as u64)?;
        prctl_set(libc::PR_SET_CHILD_SUBREAPER, odd)?;
        std::fs::write("/proc/self/coredump_filter", format!("{:#x}", 0x21 + odd))?;
        std::fs::write("/proc/self/oom_score_adj", format!("{}", 100 + odd))?;
        rustix::fs::fchmod(
            &self.memfd,
            rustix::fs::Mode::from_raw_mode(0o640 + 2 * odd as u32),
        )?;
        self.areas.clear();
        for advice in [
            libc::MADV_SEQUENTIAL,
            libc::MADV_RANDOM,
            libc::MADV_DONTFORK,
            libc::MADV_DONTDUMP,
            libc::MADV_WIPEONFORK,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_MERGEABLE,
        ] {
            // Apart from each other, so that each is a mapping.
            let area = Area::private(4)?;
            area.protect(3, 1, libc::PROT_NONE)?;
            area.write(0, &[1; PAGE]);
            area.advise(0, 3, advice)?;
            self.areas.push(area);
        }
        self.expected = Some(self.look()?);
        Ok(())
    }

    fn look(&mut self) -> Result<[Found; 2]> {
        let mut own = Found::new();
        look_at_process(&mut own)?;
        look_at_thread(&mut own)?;
        own.insert(
            "mode of a memfd".into(),
            format!("{:o}", rustix::fs::fstat(&self.memfd)?.st_mode),
        );
        for (index, area) in self.areas.iter().enumerate() {
            for page in [0, 3] {
                let flags = area.smaps(page, "VmFlags")?;
                let flags: Vec<&str> = flags
                    .split(' ')
                    .filter(|flag| !TRACKING.contains(flag))
                    .collect();
                own.insert(
                    format!("flags of area {index}, page {page}"),
                    flags.join(" "),
                );
            }
        }
        self.other.0.send(())?;
        let other = self.other.1.recv_timeout(PATIENCE)??;
        Ok([own, other])
    }
}

fn differences_of(found: &Found, expected: &Found) -> Vec<String> {
    let names = found.keys().chain(expected.keys());
    let mut names: Vec<&String> = names.collect();
    names.sort();
    names.dedup();
    names.retain(|name| found.get(*name) != expected.get(*name));
    let text = |found: Option<&String>| found.map_or("nothing".to_owned(), String::clone);
    names
        .into_iter()
        .map(|name| {
            let (found, expected) = (text(found.get(name)), text(expected.get(name)));
            format!("{name}: {found} instead of {expected}")
        })
        .collect()
}

fn look_at_process(found: &mut Found) -> Result<()> {
    for name in [
        "limits",
        "coredump_filter",
        "oom_score_adj",
        "personality",
        "cmdline",
        "auxv",
    ] {
        let content = std::fs::read(format!("/proc/self/{name}"))?;
        found.insert(
            name.to_owned(),
            String::from_utf8_lossy(&content).into_owned(),
        );
    }
    found.insert(
        "timer slack".into(),
        std::fs::read_to_string("/proc/self/timerslack_ns")?,
    );
    Ok(())
}

fn look_at_thread(found: &mut Found) -> Result<()> {
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    for line in status.lines() {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        if !FARES.iter().any(|fares| name.starts_with(fares)) {
            found.insert(format!("status: {name}"), value.trim().to_owned());
        }
    }
    for &option in READ_BY_VALUE {
        found.insert(
            format!("prctl {option}"),
            format!("{:?}", prctl_get(option)),
        );
    }
    for &option in READ_BY_POINTER {
        let value = prctl_get_by_pointer(option);
        found.insert(format!("prctl {option}"), format!("{value:?}"));
    }
    for &(option, kinds) in KINDS {
        for kind in 0..kinds {
            let value = call(libc::SYS_prctl, [option as u64, kind, 0, 0]);
            found.insert(format!("prctl {option}, {kind}"), format!("{value:?}"));
        }
    }
    found.insert(
        "I/O priority".into(),
        format!("{:?}", call(libc::SYS_ioprio_get, [1, 0, 0, 0])),
    );
    found.insert(
        "nice".into(),
        format!("{:?}", call(libc::SYS_getpriority, [0; 4])),
    );
    found.insert(
        "scheduler".into(),
        format!("{:?}", call(libc::SYS_sched_getscheduler, [0; 4])),
    );
    found.insert("memory policy".into(), format!("{:?}", memory_policy()));
    Ok(())
}

/// A thread for which nothing was set.
fn other_thread() -> (Sender<()>, Receiver<Result<Found>>) {
    let (ask, asked) = channel::<()>();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        while asked.recv().is_ok() {
            let mut found = Found::new();
            let looked = look_at_thread(&mut found).map(|()| found);
            if tell.send(looked).is_err() {
                return;
            }
        }
    });
    (ask, told)
}

fn main() -> ExitCode {
    run::<Attributes>()
}
