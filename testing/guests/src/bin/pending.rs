//! Signals that are blocked and pending: for one thread, for the process, several of a kind in
//! their order, with their values and senders.

use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result};
use unbroken_guests::signals::{self, Taken};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, same};

struct Pending {
    round: usize,
    /// What `raise` says where it comes from: kernels differ.
    raised_code: i32,
    /// A thread with a signal of its own.
    other: (Sender<usize>, Receiver<Result<()>>),
}

impl Guest for Pending {
    fn set_up(_: &Place) -> Result<Self> {
        // Inherited by the other thread.
        let (first, second) = (libc::SIGRTMIN(), libc::SIGRTMIN() + 1);
        signals::mask(
            libc::SIG_BLOCK,
            &[first, second, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM],
        )?;
        signals::raise(libc::SIGUSR2)?;
        let raised = signals::take(&[libc::SIGUSR2])?.context("no SIGUSR2")?;
        let pending = Self {
            round: 0,
            raised_code: raised.code,
            other: other_thread(),
        };
        pending.other.1.recv_timeout(PATIENCE)??;
        pending.arm()?;
        Ok(pending)
    }

    fn check(&mut self) -> Result<()> {
        let (first, second) = (libc::SIGRTMIN(), libc::SIGRTMIN() + 1);
        let expected = vec![libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM, first, second];
        let mut found = signals::pending();
        found.sort_unstable_by_key(|signal| expected.iter().position(|other| other == signal));
        same("pending", found, expected)?;
        for count in 0..5 {
            self.taken(first, libc::SI_QUEUE, 100 + count)
                .context("queued to the process")?;
        }
        for count in 0..3 {
            self.taken(second, libc::SI_QUEUE, 200 + count)
                .context("queued to the thread")?;
        }
        self.taken(libc::SIGUSR1, libc::SI_QUEUE, 300)
            .context("a classic signal")?;
        same("again", signals::take(&[libc::SIGUSR1])?, None)?;
        let killed = signals::take(&[libc::SIGTERM])?.context("no SIGTERM")?;
        same(
            "code of kill",
            (killed.code, killed.pid),
            (libc::SI_USER, std::process::id() as i32),
        )?;
        let raised = signals::take(&[libc::SIGUSR2])?.context("no SIGUSR2")?;
        same("code of tgkill", raised.code, self.raised_code)?;
        same("pending after all", signals::pending(), vec![])?;
        self.round += 1000;
        self.other.0.send(self.round)?;
        self.other
            .1
            .recv_timeout(PATIENCE)?
            .context("the other thread")?;
        self.arm()
    }
}

impl Pending {
    fn arm(&self) -> Result<()> {
        for count in 0..5 {
            signals::queue_to_process(libc::SIGRTMIN(), self.round + 100 + count)?;
        }
        for count in 0..3 {
            signals::queue_to_thread(libc::SIGRTMIN() + 1, self.round + 200 + count)?;
        }
        // A classic signal is queued once, the first.
        for count in 0..2 {
            signals::queue_to_process(libc::SIGUSR1, self.round + 300 + count)?;
        }
        signals::raise(libc::SIGUSR2)?;
        nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGTERM)?;
        Ok(())
    }

    fn taken(&self, signal: i32, code: i32, value: usize) -> Result<()> {
        let pid = std::process::id() as i32;
        let expected = Taken {
            signal,
            code,
            value: self.round + value,
            pid,
        };
        same("a signal", signals::take(&[signal])?, Some(expected))
    }
}

/// Queues one to itself and takes it when told, again and again.
fn other_thread() -> (Sender<usize>, Receiver<Result<()>>) {
    let (ask, asked) = channel::<usize>();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let signal = libc::SIGRTMIN() + 1;
        let mut value = 0;
        loop {
            let armed = signals::queue_to_thread(signal, value).map_err(Into::into);
            if tell.send(armed).is_err() {
                return;
            }
            let Ok(next) = asked.recv() else { return };
            let found = signals::take(&[signal])
                .ok()
                .flatten()
                .map(|taken| taken.value);
            if found != Some(value) {
                let wrong = format!("it found {found:?} instead of {value}");
                let _ = tell.send(Err(anyhow::Error::msg(wrong)));
                return;
            }
            value = next;
        }
    });
    (ask, told)
}

fn main() -> ExitCode {
    run::<Pending>()
}
