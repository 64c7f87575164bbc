//! Why there was no epoch.

use std::io;
use unbroken_tracee::TraceError;

#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error(transparent)]
    Object(unbroken_objects::Error),
    #[error("the service's process ended during a capture")]
    ProcessGone,
    /// Only SIGKILL moves a thread out of a tracer's stop.
    #[error("the service was killed during a capture")]
    Killed,
    /// A signal that will kill it waits for it: a replica with that signal would only die again.
    #[error("a signal is about to kill the service")]
    Doomed,
    #[error("the service is about to be heard to die")]
    Waiting,
    #[error("a capture found the service about to die, and it did not")]
    Interrupted,
    #[error("it has {0} processes; one can be protected in this version")]
    Forked(usize),
    /// A new program has nothing of the old one's memory, blob or tracking.
    #[error("it executed another program")]
    Executed,
    /// What the service has cannot be replicated; why.
    #[error("{0}")]
    Unfit(String),
    #[error("the standby has not taken its epochs for {0} s")]
    StandbyStuck(u64),
    #[error("the standby died while its journal was full")]
    StandbyGone,
    #[error("the mirror differs from the kernel: {0}")]
    Mirror(String),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl CaptureError {
    /// Whether it means that the service, or a part of it, died meanwhile.
    pub fn is_death(&self) -> bool {
        match self {
            CaptureError::Trace(error) => error.is_death(),
            CaptureError::ProcessGone
            | CaptureError::Killed
            | CaptureError::Doomed
            | CaptureError::Waiting => true,
            CaptureError::Io(error) => error.raw_os_error() == Some(libc::ESRCH),
            _ => false,
        }
    }
}

impl From<unbroken_objects::Error> for CaptureError {
    fn from(error: unbroken_objects::Error) -> CaptureError {
        match error {
            unbroken_objects::Error::Refused { .. } => CaptureError::Unfit(error.to_string()),
            other => CaptureError::Object(other),
        }
    }
}
