//! A directory of the test's own, gone when the test ends.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A directory under the system's temporary one.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// `purpose` becomes part of the name.
    pub fn new(purpose: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(unique(purpose));
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A leftover in the temporary directory is no reason to fail a test.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A name that no other test on this machine has now: `t-PURPOSE-PID-COUNT`.
pub fn unique(purpose: &str) -> String {
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("t-{purpose}-{}-{count}", std::process::id())
}
