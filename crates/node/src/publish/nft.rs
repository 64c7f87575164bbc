//! The nft program: one script is one transaction, so rules are never half there.

use super::PublishError;
use std::io::{self, Write};
use std::process::{Command, Stdio};

/// Debian puts it where a user's PATH does not look.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// Runs `script`, all of it or nothing.
pub(super) fn run(script: &str) -> Result<(), PublishError> {
    let failed = |operation| {
        move |cause| PublishError::Io {
            operation,
            subject: "nft".into(),
            cause,
        }
    };
    let mut child = start().map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => PublishError::NoProgram,
        _ => failed("cannot start")(cause),
    })?;
    if let Some(mut input) = child.stdin.take() {
        // A program that ends before it has read everything says why on its standard error.
        match input.write_all(script.as_bytes()) {
            Err(cause) if cause.kind() != io::ErrorKind::BrokenPipe => {
                return Err(failed("cannot write to")(cause));
            }
            _ => {}
        }
    }
    let output = child
        .wait_with_output()
        .map_err(failed("cannot wait for"))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let first_line = message.lines().next().unwrap_or("no reason");
    Err(PublishError::Rejected(format!(
        "{first_line} ({})",
        output.status
    )))
}

fn start() -> io::Result<std::process::Child> {
    let mut last = io::ErrorKind::NotFound.into();
    for program in PROGRAMS {
        let started = Command::new(program)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        match started {
            Err(error) if error.kind() == io::ErrorKind::NotFound => last = error,
            other => return other,
        }
    }
    Err(last)
}
