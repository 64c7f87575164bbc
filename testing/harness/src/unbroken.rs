//! The program under test, run as a user runs it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::leftovers::Marker;
use crate::process::{Ended, wait_for_end};
use crate::{PATIENCE, Scratch};

/// The program: `UNBROKEN_BIN`, or the release build of this workspace.
pub fn program() -> Result<PathBuf> {
    if let Some(given) = std::env::var_os("UNBROKEN_BIN") {
        return Ok(given.into());
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(workspace.join("target"), Into::into);
    let built = target.join("release/unbroken");
    if !built.exists() {
        bail!(
            "{} does not exist: run `cargo build --release`, or set UNBROKEN_BIN",
            built.display()
        );
    }
    Ok(built)
}

/// What a run of the program that ends by itself printed and gave back.
#[derive(Debug)]
pub struct Outcome {
    pub ended: Ended,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The exit code; death by a signal is none.
    pub fn code(&self) -> Option<i32> {
        match self.ended {
            Ended::Exit(code) => Some(code),
            Ended::Signal(_) => None,
        }
    }
}

/// Runs the program with `arguments` until it ends, at most [`PATIENCE`]; kills it then.
pub fn run_to_end<A: AsRef<OsStr>>(arguments: &[A], marker: Option<&Marker>) -> Result<Outcome> {
    run_to_end_within(arguments, marker, PATIENCE)
}

pub(crate) fn run_to_end_within<A: AsRef<OsStr>>(
    arguments: &[A],
    marker: Option<&Marker>,
    patience: Duration,
) -> Result<Outcome> {
    let program = program()?;
    // Files, not pipes: a process that outlives the program must not keep us reading.
    let scratch = Scratch::new("run")?;
    let (out, err) = (scratch.path().join("out"), scratch.path().join("err"));
    let mut command = Command::new(&program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&out)?)
        .stderr(std::fs::File::create(&err)?);
    if let Some(marker) = marker {
        let (variable, value) = marker.variable();
        command.env(variable, value);
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let words: Vec<_> = arguments
        .iter()
        .map(|word| word.as_ref().to_string_lossy())
        .collect();
    let ended = wait_for_end(
        &mut child,
        &format!("unbroken {}", words.join(" ")),
        patience,
    );
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let read = |path| std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(Outcome {
        ended: ended?,
        stdout: read(&out)?,
        stderr: read(&err)?,
    })
}
