//! What all kinds of sockets share: the error of their capture and restore.

use std::io;

/// Why a socket could not be captured or restored.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A system call failed.
    #[error("{operation} on a {subject}: {source}")]
    Call {
        operation: &'static str,
        subject: &'static str,
        source: io::Error,
    },
    /// A setting could not be put back.
    #[error(
        "set option {name} of level {level} on a restored {subject}: {source}; the replica's \
         kernel or namespace lacks what the service's has"
    )]
    Option {
        level: i32,
        name: i32,
        subject: &'static str,
        source: io::Error,
    },
    /// The socket uses something that cannot be replicated.
    #[error("{what} cannot be replicated: {why}")]
    Refused {
        what: &'static str,
        why: &'static str,
    },
    /// The socket moved while it was read; the service was not stopped.
    #[error(
        "the {what} changed while it was captured (expected {expected_bytes} bytes, found \
         {found_bytes}); the service must be stopped and its input held during a capture"
    )]
    Changed {
        what: &'static str,
        expected_bytes: usize,
        found_bytes: usize,
    },
}

/// Adds operation and subject to a failed system call.
pub(crate) trait Context<T> {
    fn context(self, operation: &'static str, subject: &'static str) -> Result<T, SocketError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, operation: &'static str, subject: &'static str) -> Result<T, SocketError> {
        self.map_err(|source| SocketError::Call {
            operation,
            subject,
            source,
        })
    }
}
