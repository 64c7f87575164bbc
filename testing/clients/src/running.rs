//! A load that runs in threads of its own until it is told to finish.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::tally::{Report, Tally, Timeline};

/// How long a client waits for an answer, a connection, or the rest of a stream before it counts
/// that as a failure. Far above any pause a takeover may cause, so that only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Why a load could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to {address}: {cause}")]
    Connect {
        address: SocketAddr,
        cause: std::io::Error,
    },
    #[error("{load}: the server at {address} did not let every client in: {why}")]
    Refused {
        load: &'static str,
        address: SocketAddr,
        why: String,
    },
    #[error("cannot start a thread for {load}: {cause}")]
    Thread {
        load: &'static str,
        cause: std::io::Error,
    },
}

/// A load under way.
#[derive(Debug)]
pub struct Running {
    name: &'static str,
    tally: Arc<Tally>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Timeline>>>,
}

impl Running {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            tally: Arc::new(Tally::new()),
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        }
    }

    /// Starts one more thread of this load; it runs until [`Stop::asked`].
    pub(crate) fn spawn(
        &mut self,
        body: impl FnOnce(Arc<Tally>, Stop) -> Vec<Timeline> + Send + 'static,
    ) -> Result<(), ClientError> {
        let (tally, stop) = (Arc::clone(&self.tally), Stop(Arc::clone(&self.stop)));
        let thread = std::thread::Builder::new()
            .name(self.name.to_string())
            .spawn(move || body(tally, stop))
            .map_err(|cause| ClientError::Thread {
                load: self.name,
                cause,
            })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Which load this is.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The live counters.
    pub fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    /// Whether every thread of the load has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Stops sending, waits until what was sent has arrived (or will not), and reports.
    pub fn finish(mut self) -> Report {
        self.stop.store(true, Ordering::Release);
        self.join()
    }

    /// Waits until a load with an end of its own (a transfer, a number of rounds) has ended.
    pub fn wait(mut self) -> Report {
        self.join()
    }

    fn join(&mut self) -> Report {
        let mut timelines = Vec::new();
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(lines) => timelines.extend(lines),
                Err(_) => self
                    .tally
                    .add_reconnect(|| "a client thread panicked".into()),
            }
        }
        Report {
            name: self.name.to_string(),
            totals: self.tally.snapshot(),
            timelines,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// Lets the threads of a load see that it should finish.
#[derive(Debug, Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
