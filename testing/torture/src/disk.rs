//! A small file system of the service's own, for its files and for /run/unbroken, that can be
//! filled without harm to the machine.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const OPTIONS: &str = "size=16m,mode=755";
/// Stays while the machine runs.
const RUN: &str = "/run";
/// Comes with the first service and goes with the last; where it is a place to mount on, a mount
/// in any other namespace goes with it (fs/namespace.c, detach_mounts).
const RUN_DIRECTORY: &str = "/run/unbroken";
const FILLER: &str = "filler";

/// The small disks of one session; the mount namespace, and they with it, ends with its thread
/// and with the service.
#[derive(Debug)]
pub struct Disks {
    own_files: PathBuf,
}

impl Disks {
    /// Moves the calling thread into a mount namespace of its own, where /run, and /run/unbroken in
    /// it, and `own_files` are small.
    pub fn mount(own_files: &Path) -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .context("cannot make mounts our own")?;
        for place in [Path::new(RUN), own_files] {
            mount(
                Some("torture"),
                place,
                Some("tmpfs"),
                MsFlags::empty(),
                Some(OPTIONS),
            )
            .with_context(|| format!("cannot mount a small disk on {}", place.display()))?;
        }
        fs::create_dir_all(RUN_DIRECTORY)?;
        Ok(Self {
            own_files: own_files.to_path_buf(),
        })
    }

    /// Fills /run/unbroken, and the other one too if `own_files`, to the last byte, until the
    /// result is dropped.
    pub fn fill(&self, own_files: bool) -> Result<Full> {
        let mut full = Full(vec![Path::new(RUN_DIRECTORY).join(FILLER)]);
        if own_files {
            full.0.push(self.own_files.join(FILLER));
        }
        for path in &full.0 {
            let mut file = File::create(path)?;
            let mut piece = vec![0u8; 1 << 20];
            while !piece.is_empty() {
                if file.write_all(&piece).is_err() {
                    // Whatever is left is less than that.
                    piece.truncate(piece.len() / 2);
                }
            }
        }
        Ok(full)
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        // Else whoever made the directory cannot remove it.
        let _ = umount2(&self.own_files, MntFlags::MNT_DETACH);
    }
}

/// While it lives, the disks are full.
#[derive(Debug)]
pub struct Full(Vec<PathBuf>);

impl Drop for Full {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}
