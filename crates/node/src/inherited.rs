//! What `run` was started with and the service is to have: limits, ignored signals, signal mask.
//!
//! Processes of ours have needs of their own: more descriptors than the service, shared memory of
//! a size, an end of a child that can be waited for. So what came is noted first, ours are set, and
//! the service is given what came at its exec.

use serde::{Deserialize, Serialize};
use std::io;
use std::process::Command;
use unbroken_sys::{inherited, process};

/// Of the kernel's 16 (getrlimit(2)), all.
const LIMITS: std::ops::Range<u32> = 0..16;

/// Beside what the service has open, which a standby opens for it at a takeover.
const OWN_DESCRIPTORS: u64 = 512;

/// The largest files of ours, which are shared memory, and those of the service that a standby
/// makes for it; of address space a node has the same again.
const FILE_BYTES: u64 = 1 << 30;
const SPACE_BYTES: u64 = 4 << 30;

/// Limits of which a process of ours needs a least amount, with their names as `ulimit -a` of most
/// shells and /proc/PID/limits have them. The others of [`OURS`] only have to be as large as may be.
const NEEDS: [(u32, &str, u64); 4] = [
    (libc::RLIMIT_FSIZE, "file size (ulimit -f)", FILE_BYTES),
    (libc::RLIMIT_AS, "address space (ulimit -v)", SPACE_BYTES),
    (libc::RLIMIT_DATA, "data size (ulimit -d)", SPACE_BYTES),
    (libc::RLIMIT_CPU, "processor time (ulimit -t)", u64::MAX),
];

/// Limits that are the service's alone and hold our processes up: soft ones become hard ones.
const OURS: [u32; 9] = [
    libc::RLIMIT_FSIZE,
    libc::RLIMIT_AS,
    libc::RLIMIT_DATA,
    libc::RLIMIT_CPU,
    libc::RLIMIT_NOFILE,
    libc::RLIMIT_MEMLOCK,
    libc::RLIMIT_NPROC,
    libc::RLIMIT_SIGPENDING,
    libc::RLIMIT_RTTIME,
];

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inherited {
    /// Resource, soft, hard.
    limits: Vec<(u32, u64, u64)>,
    /// Bit n - 1 is signal n.
    ignored: u64,
    blocked: u64,
}

/// A hard limit that our own processes cannot live with.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the hard limit of {name} is {hard}, and unbroken needs {needed}")]
pub struct TooLow {
    name: &'static str,
    hard: u64,
    needed: String,
}

impl Inherited {
    /// What this process was started with; to be read before any of it is changed.
    pub fn read() -> io::Result<Inherited> {
        let mut limits = Vec::with_capacity(LIMITS.len());
        for resource in LIMITS {
            let (soft, hard) = process::limit(0, resource)?;
            limits.push((resource, soft, hard));
        }
        Ok(Inherited {
            limits,
            ignored: inherited::ignored_signals(),
            blocked: inherited::blocked_signals()?,
        })
    }

    /// Looks whether our processes can have what they need.
    ///
    /// # Errors
    /// The first hard limit that is too low.
    pub fn check(&self) -> Result<(), TooLow> {
        let descriptors = (
            libc::RLIMIT_NOFILE,
            "open files (ulimit -n)",
            2 * OWN_DESCRIPTORS,
        );
        for (resource, name, needed) in NEEDS.into_iter().chain([descriptors]) {
            let mut limits = self.limits.iter();
            if let Some(&(_, _, hard)) = limits.find(|(of, ..)| *of == resource)
                && hard < needed
            {
                let needed = match needed {
                    u64::MAX => "none".to_owned(),
                    amount => amount.to_string(),
                };
                return Err(TooLow { name, hard, needed });
            }
        }
        Ok(())
    }

    /// Gives the calling process, and all that it starts, what ours need: each limit as high as it
    /// may be, every signal heeded.
    pub fn set_ours(&self) -> io::Result<()> {
        for &(resource, soft, hard) in &self.limits {
            if !OURS.contains(&resource) {
                continue;
            }
            let wanted = match resource {
                // At a takeover a standby has the service's descriptors, and a reference to each
                // file among them, beside its own.
                libc::RLIMIT_NOFILE => {
                    let twice = soft.saturating_mul(2);
                    hard.max(twice.saturating_add(OWN_DESCRIPTORS))
                }
                _ => hard,
            };
            // Whoever may not raise a hard limit goes as far as it allows.
            if process::set_limit(0, resource, (wanted, wanted.max(hard))).is_err() {
                process::set_limit(0, resource, (hard, hard))?;
            }
        }
        inherited::heed_all_signals()
    }

    /// Has `command` begin with what came.
    pub fn give(&self, command: &mut Command) {
        inherited::give(command, self.limits.clone(), self.ignored, self.blocked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_hard(resource: u32, hard: u64) -> Inherited {
        let limits = LIMITS.map(|of| (of, 0, if of == resource { hard } else { u64::MAX }));
        Inherited {
            limits: limits.collect(),
            ..Inherited::default()
        }
    }

    #[test]
    fn a_limit_that_is_too_low_is_named() {
        assert_eq!(with_hard(libc::RLIMIT_CORE, 0).check(), Ok(()));
        assert_eq!(with_hard(libc::RLIMIT_NOFILE, 1024).check(), Ok(()));
        for (resource, hard, name) in [
            (libc::RLIMIT_NOFILE, 1023, "ulimit -n"),
            (libc::RLIMIT_FSIZE, 4096, "ulimit -f"),
            (libc::RLIMIT_CPU, 3600, "ulimit -t"),
        ] {
            let refused = with_hard(resource, hard).check().unwrap_err().to_string();
            assert!(refused.contains(name), "{refused}");
        }
    }

    #[test]
    fn a_program_begins_with_what_came() {
        let mut inherited = Inherited::read().unwrap();
        for limit in &mut inherited.limits {
            if limit.0 == libc::RLIMIT_NOFILE {
                (limit.1, limit.2) = (77, 88);
            }
        }
        // SIGPIPE and SIGHUP ignored; SIGUSR1 blocked.
        (inherited.ignored, inherited.blocked) = (1 << 12 | 1, 1 << 9);
        let mut command = Command::new("/bin/cat");
        command.args(["/proc/self/limits", "/proc/self/status"]);
        inherited.give(&mut command);
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let has = |name: &str, wanted: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            assert!(line.contains(wanted), "{line}");
        };
        has("Max open files", "77                   88");
        has("SigIgn:", "0000000000001001");
        has("SigBlk:", "0000000000000200");
    }
}
