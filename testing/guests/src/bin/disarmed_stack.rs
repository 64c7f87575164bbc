//! An alternate stack with SS_AUTODISARM: the kernel switches it off when a handler begins and on
//! again when it returns, without a call. The thread is moved in a handler and out of one.

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, ensure};
use unbroken_guests::area::{Area, PAGE};
use unbroken_guests::signals::{self, LAST_STACK, Stay};
use unbroken_guests::{Guest, PATIENCE, Place, eventually, main as run, same};

const STACK_PAGES: usize = 16;
const SIGNAL: i32 = libc::SIGUSR1;

struct Disarmed {
    stack: (usize, usize),
    enter: Sender<()>,
    left: Receiver<Result<()>>,
    inside: bool,
}

impl Guest for Disarmed {
    fn set_up(_: &Place) -> Result<Self> {
        signals::stay_in_handler(SIGNAL, libc::SA_ONSTACK)?;
        let stack = Area::private(STACK_PAGES)?;
        let place = (stack.address(), STACK_PAGES * PAGE);
        let (enter, entered) = channel();
        let (leave, left) = channel();
        std::thread::spawn(move || live(&stack, &entered, &leave));
        left.recv_timeout(PATIENCE)??;
        Ok(Self {
            stack: place,
            enter,
            left,
            inside: false,
        })
    }

    fn check(&mut self) -> Result<()> {
        if self.inside {
            self.look_inside()?;
            Stay::end();
            let outside = self.left.recv_timeout(PATIENCE)?;
            self.inside = false;
            return outside.context("after the return of a handler that was moved");
        }
        self.enter.send(())?;
        self.inside = true;
        self.look_inside()
    }
}

impl Disarmed {
    /// The handler runs where it should, and what another one would do to its stack is nothing.
    fn look_inside(&self) -> Result<()> {
        let looks = Stay::looks();
        eventually("a look of the handler", || Ok(Stay::looks() > looks))?;
        same("flags in the handler", Stay::flags(), libc::SS_DISABLE)?;
        let used = LAST_STACK.load(Ordering::SeqCst);
        let (start, length) = self.stack;
        ensure!(
            (start..start + length).contains(&used),
            "the handler runs on {used:#x}, not in {start:#x}"
        );
        Ok(())
    }
}

/// The thread: goes into its handler when it is told to, and says what it finds when it is out.
fn live(stack: &Area, enter: &Receiver<()>, leave: &Sender<Result<()>>) {
    let looked = || {
        let expected = (stack.address(), signals::SS_AUTODISARM, STACK_PAGES * PAGE);
        same("alternate stack", signals::alternate_stack()?, expected)
    };
    let set = signals::set_alternate_stack(stack, signals::SS_AUTODISARM);
    let mut result = set.map_err(anyhow::Error::from).and_then(|()| looked());
    while leave.send(result).is_ok() && enter.recv().is_ok() {
        result = looked().context("before a handler");
        if let Err(cause) = signals::raise(SIGNAL) {
            result = Err(cause.into());
        }
        result = result.and_then(|()| looked());
    }
}

fn main() -> ExitCode {
    run::<Disarmed>()
}
