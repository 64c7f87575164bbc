//! How `unbroken` ends when it is not the service that ended.

use std::fmt;
use std::process::ExitCode;

macro_rules! exits {
    ($($(#[doc = $doc:literal])* $name:ident = $code:literal,)*) => {
        /// Exit codes of our own; docs/ERRORS.md lists exactly these. Codes below 70 are the
        /// service's, and 128 + n stands for a service that signal n ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Exit {
            $($(#[doc = $doc])* $name = $code,)*
        }

        impl Exit {
            /// Every code with its description, in order.
            #[cfg(test)]
            pub const ALL: &'static [(Exit, &'static str)] = &[
                $((Exit::$name, concat!($($doc),*)),)*
            ];
        }
    };
}

exits! {
    /// A fault of unbroken itself, or of the machine at a point where none was expected.
    Internal = 70,
    /// Not root, or a capability is missing.
    Rights = 71,
    /// The kernel or the machine lacks something; `unbroken check` says what.
    Machine = 72,
    /// The command line is wrong.
    Usage = 73,
    /// The service's command does not exist or cannot be executed.
    Command = 74,
    /// A service of that name is already running.
    NameTaken = 75,
    /// No service of that name is running.
    NoService = 76,
    /// The service's processes refused the request.
    Refused = 77,
    /// The service was given up or lost; the message says why.
    Failed = 78,
    /// This version does not have it.
    NotAvailable = 79,
    /// An address or a port cannot be had.
    Network = 80,
    /// The service's processes did not answer.
    NoAnswer = 81,
    /// With `--detach`: the service runs on and is not protected; the message says why.
    Unprotected = 82,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why `unbroken` ends, for the user: one line that says what was done to what, what went wrong,
/// and where possible what to do.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
}

impl Failure {
    pub fn new(exit: Exit, message: impl fmt::Display) -> Failure {
        // An error from elsewhere may be longer; its first line breaks must not break ours.
        let message = message.to_string().trim().replace('\n', " ");
        Failure { exit, message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unbroken: {}", self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_lists_exactly_these() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/ERRORS.md");
        let document = std::fs::read_to_string(path).expect("docs/ERRORS.md");
        let listed: Vec<&str> = document
            .lines()
            .filter(|line| line.starts_with("| 7") || line.starts_with("| 8"))
            .collect();
        let expected: Vec<String> = Exit::ALL
            .iter()
            .map(|(exit, text)| format!("| {} | {exit:?} | {} |", *exit as u8, text.trim()))
            .collect();
        assert_eq!(listed, expected);
    }

    #[test]
    fn codes_are_ours_and_in_order() {
        let codes: Vec<u8> = Exit::ALL.iter().map(|(exit, _)| *exit as u8).collect();
        assert!(codes.is_sorted_by(|left, right| left < right));
        assert!(codes.iter().all(|code| (70..128).contains(code)));
    }

    #[test]
    fn a_message_is_one_line() {
        let failure = Failure::new(Exit::Internal, "first\nsecond\n");
        assert_eq!(failure.to_string(), "unbroken: first second");
    }
}
