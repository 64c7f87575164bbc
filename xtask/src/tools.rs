//! Running other programs, and what must be so before anything is run.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The root of the workspace.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where cargo puts what it builds, and we what we write.
pub fn target() -> PathBuf {
    let given = std::env::var_os("CARGO_TARGET_DIR");
    // cargo, which we start in the root, takes a path that is not absolute from there too.
    root().join(given.unwrap_or_else(|| OsString::from("target")))
}

/// Fails unless we are root: namespaces, ptrace and TUN devices need it.
pub fn require_root(task: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("protecting a service needs root: run `sudo -E env PATH=$PATH cargo xtask {task}`");
    }
    Ok(())
}

/// cargo, in the workspace.
pub fn cargo(arguments: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(program);
    command.current_dir(root()).args(arguments);
    command
}

/// Runs a command with our own standard streams; `Ok(false)` when it fails.
pub fn succeeds(command: &mut Command) -> Result<bool> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    Ok(status.success())
}
