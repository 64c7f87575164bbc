//! What a capture and the wire say to each other in the course of an epoch.

use std::sync::MutexGuard;
use unbroken_wire::flows::{Activity, Connections};
use unbroken_wire::sent::SentBytes;

/// How long a service stood for an epoch, and how it was found.
#[derive(Clone, Copy, Debug)]
pub struct Pause {
    pub lasted_ns: u64,
    /// A thread was at work.
    pub was_working: bool,
    /// When it has to be stopped next, if it has to.
    pub next_due_ns: Option<u64>,
}

/// The wire as a capture needs it, whichever thread carries the packets.
pub trait Wire {
    /// The service stands: what it has said until now is this epoch's.
    fn stopped(&self);

    /// Waits until all that has been taken in, and leaves in `activity` where packets went since the
    /// epoch before. The position of the first input that the service has not got.
    fn wait_drained(&self, activity: &mut Activity) -> u64;

    /// What the service has sent.
    fn sent(&self) -> MutexGuard<'_, SentBytes>;

    /// The service runs on.
    fn resumed(&self, pause: Pause);

    /// What is known of connections and no descriptor table tells, as of this epoch.
    fn take_connections(&self) -> Connections;
}
