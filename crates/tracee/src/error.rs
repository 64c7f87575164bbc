//! What can go wrong while a tree is held.

use crate::host::HostTid;
use std::io;
use unbroken_sys::ptrace;

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A thread ended while something was done to it; the next [`crate::Tree::wait`] says how.
    #[error("thread {tid} of the service died during {operation}")]
    Died {
        tid: HostTid,
        operation: &'static str,
    },

    /// No process of the tree is alive, or all of them are on their way out.
    #[error("every process of the service has ended or is ending")]
    Ended,

    #[error("{operation} of thread {tid}: {source}")]
    Thread {
        operation: &'static str,
        tid: HostTid,
        source: io::Error,
    },

    #[error("{operation}: {source}")]
    Tracer {
        operation: &'static str,
        source: io::Error,
    },

    #[error("read {path}: {source}")]
    Proc { path: String, source: io::Error },

    #[error("read {path}: {what} is not as this program knows it; kernel older than 6.7?")]
    ProcFormat { path: String, what: &'static str },

    #[error(
        "trace process {pid}: process {tracer} traces it already; end that debugger (or other \
         unbroken) first"
    )]
    TracedAlready { pid: i32, tracer: i32 },

    #[error("process {pid}: no such process in the tree")]
    NoSuchProcess { pid: i32 },

    #[error("batch of system calls: {what} is full; run it and start another")]
    BatchFull { what: &'static str },

    #[error("thread {tid} of the service is ending or in vfork and can make no calls")]
    CannotRunCalls { tid: HostTid },

    #[error("the process of thread {tid} has no blob yet; install it first")]
    NoBlob { tid: HostTid },

    #[error("replicate the mapping {start:x}-{end:x} {name}: {reason}")]
    UnsupportedMapping {
        start: u64,
        end: u64,
        name: String,
        reason: &'static str,
    },

    #[error("{call} in thread {tid} of the service: {source}")]
    RemoteCall {
        call: &'static str,
        tid: HostTid,
        source: io::Error,
    },

    #[error(
        "thread {tid} of the service has no blob: the address {address:#x} is taken by another \
         mapping"
    )]
    BlobAddressTaken { tid: HostTid, address: u64 },
}

impl TraceError {
    /// Whether it means that (part of) the service died, and not that something is wrong with us
    /// or the machine.
    pub fn is_death(&self) -> bool {
        matches!(self, TraceError::Died { .. } | TraceError::Ended)
    }

    /// The tree does not know the thread (any more).
    pub(crate) fn gone(tid: HostTid) -> TraceError {
        TraceError::Died {
            tid,
            operation: "the search for it",
        }
    }

    /// The mapper for a ptrace request on `tid`.
    pub(crate) fn of_thread(
        operation: &'static str,
        tid: HostTid,
    ) -> impl FnOnce(io::Error) -> TraceError {
        move |source| {
            if ptrace::is_gone(&source) {
                TraceError::Died { tid, operation }
            } else {
                TraceError::Thread {
                    operation,
                    tid,
                    source,
                }
            }
        }
    }

    /// The mapper for a result of `call`, made by the thread itself.
    pub(crate) fn of_call(
        call: &'static str,
        tid: HostTid,
    ) -> impl Fn(io::Error) -> TraceError + Copy {
        move |source| TraceError::RemoteCall { call, tid, source }
    }

    pub(crate) fn of_tracer(operation: &'static str) -> impl FnOnce(io::Error) -> TraceError {
        move |source| TraceError::Tracer { operation, source }
    }
}
