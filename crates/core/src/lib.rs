//! Pure decisions: when the next epoch starts, who may let output go, when to give up.
//!
//! Events in, actions out: no clock, no thread, no I/O. Times are nanoseconds of the caller's
//! monotonic clock.
#![forbid(unsafe_code)]

pub mod epoch;
pub mod give_up;
pub mod pacing;
pub mod retry;
pub mod role;
