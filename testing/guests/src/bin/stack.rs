//! A deep recursion: the stack of the first thread grows while the service is protected, and every
//! frame is unwound after the moves.

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::{Result, bail};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, pattern, same, same_bytes};

const DEPTH: u64 = 500;
const FRAME_BYTES: usize = 1024;

/// A thread at the bottom of its recursion, and the channels that let it come up and say what it
/// saw. The deep frames of the main thread are touched too.
struct Stacks {
    come_up: SyncSender<()>,
    found: Receiver<Result<u64>>,
}

impl Guest for Stacks {
    fn set_up(_: &Place) -> Result<Self> {
        same(
            "depth of the first thread",
            descend(DEPTH, &|| Ok(()))?,
            DEPTH,
        )?;
        let (come_up, told) = sync_channel::<()>(0);
        let (tell, found) = sync_channel(1);
        let deep = move || {
            let bottom = || Ok(told.recv()?);
            tell.send(descend(DEPTH, &bottom))
        };
        let size = 3 * DEPTH as usize * FRAME_BYTES + (1 << 20);
        std::thread::Builder::new().stack_size(size).spawn(deep)?;
        Ok(Self { come_up, found })
    }

    fn check(&mut self) -> Result<()> {
        self.come_up.send(())?;
        same("frames", self.found.recv_timeout(PATIENCE)??, DEPTH)?;
        // Deeper than ever before on this stack: it must still be able to grow.
        same(
            "depth of the first thread",
            descend(2 * DEPTH, &|| Ok(()))?,
            2 * DEPTH,
        )?;
        let place = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
        *self = Self::set_up(&Place {
            port: 0,
            directory: "/".into(),
            host: place,
            own: place.ip(),
        })?;
        Ok(())
    }
}

/// Calls `bottom` under so many frames; each keeps bytes on the stack and looks at them after.
fn descend(depth: u64, bottom: &dyn Fn() -> Result<()>) -> Result<u64> {
    if depth == 0 {
        bottom()?;
        return Ok(0);
    }
    let mut frame = [0; FRAME_BYTES];
    frame.copy_from_slice(&pattern(depth, FRAME_BYTES));
    let frame = black_box(frame);
    let below = descend(depth - 1, bottom)?;
    same_bytes("a frame", &frame, &pattern(depth, FRAME_BYTES))?;
    if below != depth - 1 {
        bail!("{below} frames below number {depth}");
    }
    Ok(depth)
}

fn main() -> ExitCode {
    run::<Stacks>()
}
