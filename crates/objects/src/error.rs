//! What can go wrong with an object.

use std::fmt::Display;
use std::io;

/// Why an object was not captured or not restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The object is of a kind, or in a state, that no replica can have. Not a fault: protection
    /// is refused or ends, with these words for the user.
    #[error("{what} cannot be replicated: {why}")]
    Refused { what: String, why: &'static str },
    /// The kernel said no.
    #[error("{operation} {subject}: {source}")]
    Kernel {
        operation: &'static str,
        subject: String,
        source: io::Error,
    },
    /// A setting could not be put back.
    #[error(
        "set option {name} of level {level} {subject}: {source}; the replica's kernel or \
         namespace lacks what the service's has"
    )]
    Option {
        level: i32,
        name: i32,
        subject: &'static str,
        source: io::Error,
    },
    /// A socket moved while it was read; the service was not stopped.
    #[error(
        "the {what} changed while it was captured (expected {expected_bytes} bytes, found \
         {found_bytes}); the service must be stopped and its input held during a capture"
    )]
    Changed {
        what: &'static str,
        expected_bytes: usize,
        found_bytes: usize,
    },
    /// The kernel answered something that this version does not understand.
    #[error("{operation} {subject}: the kernel's answer is not understood: {answer}")]
    Answer {
        operation: &'static str,
        subject: String,
        answer: String,
    },
    /// One of several objects could not be made again.
    #[error("restore {what}: {source}")]
    Restore { what: String, source: Box<Error> },
    /// What stands here is not what the epoch tells of.
    #[error("restore {subject}: {difference}")]
    Differs { subject: String, difference: String },
}

impl Error {
    pub(crate) fn refused(what: impl Into<String>, why: &'static str) -> Error {
        Error::Refused {
            what: what.into(),
            why,
        }
    }

    pub(crate) fn differs(subject: impl Display, difference: impl Into<String>) -> Error {
        Error::Differs {
            subject: subject.to_string(),
            difference: difference.into(),
        }
    }

    /// The same, of an object that is named.
    pub(crate) fn of(self, what: impl Into<String>) -> Error {
        Error::Restore {
            what: what.into(),
            source: Box::new(self),
        }
    }

    /// The kernel's error number, when it is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Adds to a kernel error what was being done, and to what.
pub(crate) trait Context<T> {
    fn during(self, operation: &'static str, subject: impl Display) -> Result<T, Error>;
}

impl<T> Context<T> for io::Result<T> {
    fn during(self, operation: &'static str, subject: impl Display) -> Result<T, Error> {
        self.map_err(|source| Error::Kernel {
            operation,
            subject: subject.to_string(),
            source,
        })
    }
}
