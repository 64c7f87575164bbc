//! The few lines of `/proc/PID` that finding threads needs.

use crate::TraceError;
use std::{fs, io};
use unbroken_image::{Pid, Tid};

/// What `/proc/TID/status` says about who a thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The number in the innermost pid namespace.
    pub tid: Tid,
    /// The process, in the tracer's namespace and in the innermost.
    pub host_pid: i32,
    pub pid: Pid,
    pub host_parent: i32,
    /// In the innermost namespace.
    pub session: Pid,
    pub process_group: Pid,
    pub tracer: i32,
    /// A zombie, or already past it.
    pub is_dead: bool,
}

/// `None` when the thread is gone.
pub(crate) fn identity(host_tid: i32) -> Result<Option<Identity>, TraceError> {
    let path = format!("/proc/{host_tid}/status");
    let Some(text) = read_if_alive(&path)? else {
        return Ok(None);
    };
    parse_identity(&text)
        .map(Some)
        .ok_or(TraceError::ProcFormat {
            path,
            what: "Tgid, PPid, TracerPid, NStgid, NSpid, NSpgid or NSsid",
        })
}

fn parse_identity(status: &str) -> Option<Identity> {
    let last = |name: &str| -> Option<i32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().last()?.parse().ok()
    };
    let state = status
        .lines()
        .find_map(|line| line.strip_prefix("State:"))?;
    Some(Identity {
        tid: Tid(last("NSpid:")?),
        pid: Pid(last("NStgid:")?),
        host_pid: last("Tgid:")?,
        host_parent: last("PPid:")?,
        session: Pid(last("NSsid:")?),
        process_group: Pid(last("NSpgid:")?),
        tracer: last("TracerPid:")?,
        is_dead: state.contains(['Z', 'X']),
    })
}

/// What a process does with its signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SignalSets {
    ignored: u64,
    caught: u64,
}

impl SignalSets {
    /// Whether a handler runs for `signal`.
    pub fn caught(self, signal: i32) -> bool {
        self.caught & bit(signal) != 0
    }

    /// Whether nothing at all comes of `signal`: by the program's choice, or by default. (SIGCONT
    /// and the stop signals do end calls, traced or not; signal(7).)
    pub fn is_ignored(self, signal: i32) -> bool {
        let by_default = matches!(signal, libc::SIGCHLD | libc::SIGURG | libc::SIGWINCH);
        !self.caught(signal) && (self.ignored & bit(signal) != 0 || by_default)
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The signal actions of process `host_pid`, in short.
pub(crate) fn signal_sets(host_pid: i32) -> io::Result<SignalSets> {
    let text = fs::read_to_string(format!("/proc/{host_pid}/status"))?;
    parse_signal_sets(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse_signal_sets(status: &str) -> Option<SignalSets> {
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    Some(SignalSets {
        ignored: set("SigIgn:")?,
        caught: set("SigCgt:")?,
    })
}

/// The threads of a process that exist now; empty when it is gone.
pub(crate) fn threads(host_pid: i32) -> Result<Vec<i32>, TraceError> {
    let path = format!("/proc/{host_pid}/task");
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(source) => return Err(TraceError::Proc { path, source }),
    };
    let mut tids = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => tids.extend(number(&entry.file_name().to_string_lossy())),
            Err(error) if is_gone(&error) => break,
            Err(source) => return Err(TraceError::Proc { path, source }),
        }
    }
    Ok(tids)
}

/// The children of a process that exist now, in the tracer's namespace.
pub(crate) fn children(host_pid: i32) -> Result<Vec<i32>, TraceError> {
    let mut children = Vec::new();
    for tid in threads(host_pid)? {
        // Needs CONFIG_PROC_CHILDREN, which every kernel with CHECKPOINT_RESTORE selects.
        let path = format!("/proc/{host_pid}/task/{tid}/children");
        if let Some(text) = read_if_alive(&path)? {
            children.extend(text.split_ascii_whitespace().filter_map(number));
        }
    }
    Ok(children)
}

/// A file of `/proc/PID`, or `None` when the process is gone.
pub(crate) fn read_if_alive(path: &str) -> Result<Option<String>, TraceError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(TraceError::Proc {
            path: path.into(),
            source,
        }),
    }
}

/// ENOENT before the file is open, ESRCH after.
pub(crate) fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

fn number(text: &str) -> Option<i32> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_takes_the_innermost_namespace() {
        let status = "Name:\tx\nState:\tS (sleeping)\nTgid:\t900\nNgid:\t0\nPid:\t901\nPPid:\t7\nTracerPid:\t5\n\
                      NStgid:\t900\t2\nNSpid:\t901\t3\nNSpgid:\t890\t5\nNSsid:\t880\t4\n";
        let identity = parse_identity(status).unwrap();
        assert_eq!(identity.tid, Tid(3));
        assert_eq!(identity.pid, Pid(2));
        assert_eq!(identity.host_pid, 900);
        assert_eq!(identity.host_parent, 7);
        assert_eq!(identity.process_group, Pid(5));
        assert_eq!(identity.session, Pid(4));
        assert_eq!(identity.tracer, 5);
        assert_eq!(parse_identity("Name:\tx\n"), None);
    }

    #[test]
    fn a_signal_without_action_is_ignored_where_that_is_the_default() {
        let sets = parse_signal_sets("SigIgn:\t0000000000001000\nSigCgt:\t0000000000010000\n");
        let sets = sets.unwrap();
        assert!(sets.is_ignored(libc::SIGPIPE));
        assert!(sets.caught(libc::SIGCHLD) && !sets.is_ignored(libc::SIGCHLD));
        assert!(sets.is_ignored(libc::SIGWINCH));
        assert!(!sets.is_ignored(libc::SIGTERM) && !sets.is_ignored(libc::SIGCONT));
    }

    #[test]
    fn a_process_that_is_gone_has_no_identity() {
        assert_eq!(identity(i32::MAX).unwrap(), None);
        assert!(threads(i32::MAX).unwrap().is_empty());
        assert!(children(i32::MAX).unwrap().is_empty());
    }

    #[test]
    fn fuzz_proc_status() {
        let status = "State:\tS\nTgid:\t9\nPPid:\t7\nTracerPid:\t5\nNStgid:\t9\t2\n\
                      NSpid:\t9\t3\nNSpgid:\t9\t3\nNSsid:\t9\t3\nSigIgn:\t0000000000001000\nSigCgt:\t0000000000010000\n";
        unbroken_fuzz::text("proc-status", &[status], |text| {
            let _ = parse_identity(text);
            if let Some(sets) = parse_signal_sets(text) {
                for signal in 1..=64 {
                    let _ = sets.is_ignored(signal);
                }
            }
        });
    }
}
