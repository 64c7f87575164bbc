//! Signal actions, masks of each thread, alternate stacks; and handlers that really run where and
//! how they should.

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, ensure};
use unbroken_guests::area::{Area, PAGE};
use unbroken_guests::signals::{self, HANDLED, LAST_SIGNAL, LAST_STACK, LAST_VALUE};
use unbroken_guests::{Guest, PATIENCE, Place, main as run, same};

const STACK_PAGES: usize = 16;

struct Signals {
    stack: Area,
    /// A thread with another mask and no alternate stack: told to look, it says what it found.
    other: (Sender<()>, Receiver<Result<()>>),
    round: usize,
}

impl Guest for Signals {
    fn set_up(_: &Place) -> Result<Self> {
        let stack = Area::private(STACK_PAGES)?;
        signals::set_alternate_stack(&stack, 0)?;
        signals::handle(
            libc::SIGUSR1,
            libc::SA_ONSTACK | libc::SA_RESTART,
            &[libc::SIGUSR2, libc::SIGINT],
        )?;
        signals::handle(libc::SIGRTMIN() + 1, 0, &[])?;
        signals::handle(libc::SIGUSR2, libc::SA_NODEFER, &[])?;
        signals::handle(libc::SIGVTALRM, libc::SA_RESETHAND, &[])?;
        // The traps by which the replica is built must leave its action alone.
        signals::handle(libc::SIGTRAP, libc::SA_ONSTACK, &[libc::SIGHUP])?;
        signals::dispose(libc::SIGHUP, libc::SIG_IGN)?;
        signals::dispose(libc::SIGPIPE, libc::SIG_DFL)?;
        signals::mask(libc::SIG_BLOCK, &[libc::SIGALRM, libc::SIGRTMIN() + 5, 64])?;
        Ok(Self {
            stack,
            other: other_thread(),
            round: 0,
        })
    }

    fn check(&mut self) -> Result<()> {
        let realtime = libc::SIGRTMIN() + 1;
        let ours = signals::action(realtime)?.0;
        ensure!(ours > 1, "no handler of ours");
        for (signal, handler, flags, mask) in [
            (
                libc::SIGUSR1,
                ours,
                libc::SA_ONSTACK | libc::SA_RESTART,
                vec![libc::SIGINT, libc::SIGUSR2],
            ),
            (libc::SIGUSR2, ours, libc::SA_NODEFER, vec![]),
            (libc::SIGTRAP, ours, libc::SA_ONSTACK, vec![libc::SIGHUP]),
            (libc::SIGHUP, libc::SIG_IGN, 0, vec![]),
            (libc::SIGPIPE, libc::SIG_DFL, 0, vec![]),
            (libc::SIGTERM, libc::SIG_DFL, 0, vec![]),
        ] {
            let found = signals::action(signal)?;
            let information = if handler == ours { libc::SA_SIGINFO } else { 0 };
            const SA_RESTORER: i32 = 0x0400_0000;
            let flags_found = found.1 & !SA_RESTORER;
            same(
                &format!("action of {signal}"),
                (found.0, flags_found, found.2),
                (handler, flags | information, mask),
            )?;
        }
        same(
            "mask",
            signals::masked(),
            vec![libc::SIGALRM, libc::SIGRTMIN() + 5, 64],
        )?;
        self.handler_for_one_signal(ours)?;
        let expected = (self.stack.address(), 0, STACK_PAGES * PAGE);
        same("alternate stack", signals::alternate_stack()?, expected)?;
        self.handlers().context("handlers")?;
        self.other.0.send(())?;
        self.other
            .1
            .recv_timeout(PATIENCE)?
            .context("the other thread")?;
        self.round += 1;
        Ok(())
    }
}

impl Signals {
    /// Set in one round and gone, by the kernel, in the next; no call of ours tells of that.
    fn handler_for_one_signal(&self, ours: usize) -> Result<()> {
        let is_set = self.round.is_multiple_of(2);
        let expected = if is_set { ours } else { libc::SIG_DFL };
        let found = signals::action(libc::SIGVTALRM)?.0;
        same("handler for one signal", found, expected)?;
        if is_set {
            let before = HANDLED.load(Ordering::SeqCst);
            signals::raise(libc::SIGVTALRM)?;
            same("handled", HANDLED.load(Ordering::SeqCst), before + 1)
        } else {
            Ok(signals::handle(libc::SIGVTALRM, libc::SA_RESETHAND, &[])?)
        }
    }

    fn handlers(&self) -> Result<()> {
        let before = HANDLED.load(Ordering::SeqCst);
        signals::raise(libc::SIGUSR1)?;
        same("handled", HANDLED.load(Ordering::SeqCst), before + 1)?;
        let used = LAST_STACK.load(Ordering::SeqCst);
        let stack = self.stack.address()..self.stack.address() + STACK_PAGES * PAGE;
        ensure!(
            stack.contains(&used),
            "the handler ran on {used:#x}, not in {stack:x?}"
        );
        signals::queue_to_thread(libc::SIGRTMIN() + 1, 4711 + self.round)?;
        same("handled", HANDLED.load(Ordering::SeqCst), before + 2)?;
        same(
            "value",
            LAST_VALUE.load(Ordering::SeqCst),
            4711 + self.round as i64,
        )?;
        signals::raise(libc::SIGTRAP)?;
        same(
            "last signal",
            LAST_SIGNAL.load(Ordering::SeqCst),
            i64::from(libc::SIGTRAP),
        )?;
        signals::raise(libc::SIGHUP)?;
        same("handled", HANDLED.load(Ordering::SeqCst), before + 3)
    }
}

fn other_thread() -> (Sender<()>, Receiver<Result<()>>) {
    let (ask, asked) = channel::<()>();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let set = signals::mask(libc::SIG_SETMASK, &[libc::SIGUSR1, libc::SIGCHLD]);
        while asked.recv().is_ok() {
            let looked = || {
                if let Err(cause) = &set {
                    anyhow::bail!("its mask could not be set: {cause}");
                }
                same(
                    "mask",
                    signals::masked(),
                    vec![libc::SIGUSR1, libc::SIGCHLD],
                )
            };
            if tell.send(looked()).is_err() {
                return;
            }
        }
    });
    (ask, told)
}

fn main() -> ExitCode {
    run::<Signals>()
}
