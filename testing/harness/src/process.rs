//! Child processes that end with the test, and waiting with a deadline.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Between two looks at a condition that nothing announces.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Looks until `condition` gives a value; fails with `what` after `patience`.
pub fn wait_until<T>(
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            bail!("waited {} s in vain for {what}", patience.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exit(i32),
    Signal(i32),
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Exit(code),
            (None, signal) => Self::Signal(signal.unwrap_or_default()),
        }
    }
}

/// Waits for a child's end.
pub(crate) fn wait_for_end(child: &mut Child, what: &str, patience: Duration) -> Result<Ended> {
    wait_until(&format!("the end of {what}"), patience, || {
        let ended = child
            .try_wait()
            .with_context(|| format!("cannot wait for {what}"))?;
        Ok(ended.map(Ended::from))
    })
}

/// Sends a signal; `Ok(false)` when there is no such process any more.
pub fn send(pid: i32, signal: Signal) -> Result<bool> {
    if pid <= 1 {
        bail!("refusing to send {signal} to pid {pid}");
    }
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(errno) => bail!("cannot send {signal} to {pid}: {errno}"),
    }
}
