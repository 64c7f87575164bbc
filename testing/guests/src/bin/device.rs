//! The character devices that have no state: they still are what they were, with their flags.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use unbroken_guests::raw::fcntl;
use unbroken_guests::{Guest, Place, main as run, refused, same};

const DEVICES: [&str; 5] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
];

struct Devices(Vec<(File, u64, i32)>);

impl Guest for Devices {
    fn set_up(_: &Place) -> Result<Self> {
        let opened = DEVICES.iter().map(|path| {
            let flags = libc::O_NONBLOCK;
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(path)?;
            let (device, status) = (file.metadata()?.rdev(), fcntl(&file, libc::F_GETFL, 0)?);
            Ok((file, device, status))
        });
        Ok(Self(opened.collect::<Result<_>>()?))
    }

    fn check(&mut self) -> Result<()> {
        for ((file, device, status), path) in self.0.iter().zip(DEVICES) {
            same(
                &format!("number of {path}"),
                file.metadata()?.rdev(),
                *device,
            )?;
            same(
                &format!("flags of {path}"),
                fcntl(file, libc::F_GETFL, 0)?,
                *status,
            )?;
            let mut bytes = [7; 32];
            let read = (&*file)
                .read(&mut bytes)
                .with_context(|| format!("read {path}"))?;
            let written = (&*file).write(b"gone");
            match path {
                "/dev/null" => same("bytes from null", read, 0)?,
                "/dev/zero" | "/dev/full" => same("bytes from zero", bytes, [0; 32])?,
                _ => ensure!(read == 32 && bytes != [7; 32], "{path} gave nothing random"),
            }
            match path {
                "/dev/full" => refused("a write to full", written, libc::ENOSPC)?,
                "/dev/null" | "/dev/zero" => same("bytes to the device", written?, 4)?,
                // Whoever may add to the pool may, nobody else; both are as before.
                _ => {}
            }
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Devices>()
}
