//! Signalfds: their masks, and signals that wait to be read from them.

use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use unbroken_guests::raw::fcntl;
use unbroken_guests::signals::{mask, queue_to_process, queue_to_thread};
use unbroken_guests::{Guest, Place, main as run, same};

struct Signals {
    users: SignalFd,
    realtime: SignalFd,
    round: usize,
}

impl Guest for Signals {
    fn set_up(_: &Place) -> Result<Self> {
        let realtime = libc::SIGRTMIN() + 3;
        mask(libc::SIG_BLOCK, &[libc::SIGUSR1, libc::SIGUSR2, realtime])?;
        let users: SigSet = [Signal::SIGUSR1, Signal::SIGUSR2].into_iter().collect();
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = Self {
            users: SignalFd::with_flags(&users, flags)?,
            realtime: unbroken_guests::signals::descriptor(&[realtime], libc::SFD_NONBLOCK)?,
            round: 0,
        };
        signals.arm()?;
        Ok(signals)
    }

    fn check(&mut self) -> Result<()> {
        let first = self.users.read_signal()?.context("no pending SIGUSR1")?;
        same("signal", first.ssi_signo as i32, libc::SIGUSR1)?;
        same("value", first.ssi_ptr, self.round as u64 + 1000)?;
        same("sender", first.ssi_pid, std::process::id())?;
        same("code", first.ssi_code, libc::SI_QUEUE)?;
        same(
            "more",
            self.users.read_signal()?.map(|info| info.ssi_signo),
            None,
        )?;
        for count in 0..3 {
            let info = self
                .realtime
                .read_signal()?
                .context("a queued signal is lost")?;
            same(
                "value in the queue",
                info.ssi_ptr,
                (self.round + count) as u64,
            )?;
        }
        same(
            "more",
            self.realtime.read_signal()?.map(|info| info.ssi_signo),
            None,
        )?;
        let flags = fcntl(&self.users, libc::F_GETFL, 0)?;
        same("flags", flags & libc::O_NONBLOCK, libc::O_NONBLOCK)?;
        same(
            "close-on-exec",
            fcntl(&self.users, libc::F_GETFD, 0)?,
            libc::FD_CLOEXEC,
        )?;
        same(
            "close-on-exec of the other",
            fcntl(&self.realtime, libc::F_GETFD, 0)?,
            0,
        )?;
        self.round += 1;
        self.arm()
    }
}

impl Signals {
    fn arm(&self) -> Result<()> {
        queue_to_thread(libc::SIGUSR1, self.round + 1000)?;
        for count in 0..3 {
            queue_to_process(libc::SIGRTMIN() + 3, self.round + count)?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Signals>()
}
