//! Eight threads: numbers, names, thread-local values, nice values, policies, mutexes that are held and
//! waited for, robust ones whose owner dies after the move.

use std::cell::Cell;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Condvar, Mutex};

use anyhow::{Context, Result};
use unbroken_guests::raw::call;
use unbroken_guests::robust::RobustMutex;
use unbroken_guests::{Guest, PATIENCE, Place, eventually, main as run, same};

const THREADS: usize = 8;

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// What a thread says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Portrait {
    thread: i64,
    name: String,
    nice: i64,
    policy: i64,
    own: u64,
}

/// A worker that draws itself when asked.
struct Worker {
    ask: Sender<()>,
    portrait: Receiver<Portrait>,
    last: Portrait,
}

struct Threads {
    workers: Vec<Worker>,
    barrier: Arc<Barrier>,
    /// Held by one worker across the move; another waits for it.
    gate: Arc<(Mutex<bool>, Condvar)>,
    waiter: Receiver<()>,
    robust: Arc<RobustMutex>,
    /// Lets the robust mutex's owner die.
    doom: Sender<()>,
}

impl Guest for Threads {
    fn set_up(_: &Place) -> Result<Self> {
        let barrier = Arc::new(Barrier::new(THREADS + 1));
        let workers = (0..THREADS)
            .map(|number| worker(number, &barrier))
            .collect::<Result<_>>()?;
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let robust = Arc::new(RobustMutex::new()?);
        let (waiter, doom) = (waiter(&gate), owner(&robust)?);
        Ok(Self {
            workers,
            barrier,
            gate,
            waiter,
            robust,
            doom,
        })
    }

    fn check(&mut self) -> Result<()> {
        for worker in &mut self.workers {
            worker.ask.send(())?;
            let now = worker.portrait.recv_timeout(PATIENCE)?;
            worker.last.own += 1;
            same("a thread", now, worker.last.clone())?;
            worker.last.nice = nicer(worker.last.nice);
            worker.last.policy = policy_after(worker.last.policy);
        }
        // All of them and this one meet: futexes that were waited on before are still the same.
        self.barrier.wait();
        *self
            .gate
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = true;
        self.gate.1.notify_all();
        self.waiter
            .recv_timeout(PATIENCE)
            .context("a wait on a condition")?;
        same("the held mutex", self.robust.try_lock()?, Some(libc::EBUSY))?;
        self.doom.send(())?;
        // The kernel walks the robust list of the thread that ends, and tells the next owner.
        same(
            "the next owner",
            self.robust.lock()?,
            Some(libc::EOWNERDEAD),
        )?;
        self.robust.repair()?;
        // The waiter and the owner end; the workers and this thread do not.
        eventually("the end of two threads", || {
            Ok(std::fs::read_dir("/proc/self/task")?.count() == THREADS + 1)
        })?;
        *self
            .gate
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = false;
        self.waiter = waiter(&self.gate);
        self.doom = owner(&self.robust)?;
        Ok(())
    }
}

fn worker(number: usize, barrier: &Arc<Barrier>) -> Result<Worker> {
    let (ask, asked) = channel::<()>();
    let (tell, portrait) = channel();
    let barrier = Arc::clone(barrier);
    let main_loop = move || {
        OWN.set(1000 * number as u64);
        let _ = call(libc::SYS_setpriority, [0, 0, number as u64, 0]);
        if tell.send(draw()).is_err() {
            return;
        }
        while asked.recv().is_ok() {
            OWN.set(OWN.get() + 1);
            let portrait = draw();
            // Of a thread that is not new, and nothing else of which changes.
            let nice = nicer(portrait.nice) as u64;
            let _ = call(libc::SYS_setpriority, [0, 0, nice, 0]);
            let parameters = [0i32; 2];
            let policy = policy_after(portrait.policy) as u64;
            let address = parameters.as_ptr() as u64;
            let _ = call(libc::SYS_sched_setscheduler, [0, policy, address, 0]);
            if tell.send(portrait).is_err() {
                return;
            }
            barrier.wait();
        }
    };
    std::thread::Builder::new()
        .name(format!("worker {number}"))
        .spawn(main_loop)?;
    let last = portrait.recv_timeout(PATIENCE)?;
    same("name", last.name.clone(), format!("worker {number}"))?;
    same("nice", last.nice, number as i64)?;
    Ok(Worker {
        ask,
        portrait,
        last,
    })
}

/// Batch and normal in turn.
fn policy_after(policy: i64) -> i64 {
    match policy as i32 {
        libc::SCHED_OTHER => i64::from(libc::SCHED_BATCH),
        _ => i64::from(libc::SCHED_OTHER),
    }
}

fn draw() -> Portrait {
    let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
    Portrait {
        thread: call(libc::SYS_gettid, [0; 4]).unwrap_or(-1),
        name: name.trim_end().to_string(),
        nice: 20 - call(libc::SYS_getpriority, [0, 0, 0, 0]).unwrap_or(-1),
        policy: call(libc::SYS_sched_getscheduler, [0; 4]).unwrap_or(-1),
        own: OWN.get(),
    }
}

/// A thread in a wait on a condition without a timeout.
fn waiter(gate: &Arc<(Mutex<bool>, Condvar)>) -> Receiver<()> {
    let (tell, told) = channel();
    let gate = Arc::clone(gate);
    std::thread::spawn(move || {
        let held = gate
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let open = gate.1.wait_while(held, |open| !*open);
        drop(open);
        tell.send(())
    });
    told
}

/// A thread that holds the robust mutex until it is told to end, and does not unlock it.
fn owner(robust: &Arc<RobustMutex>) -> Result<Sender<()>> {
    let (doom, doomed) = channel::<()>();
    let (tell, told) = channel();
    let robust = Arc::clone(robust);
    std::thread::spawn(move || {
        let locked = robust.lock().map_err(|cause| cause.to_string());
        let _ = tell.send(locked);
        let _ = doomed.recv();
    });
    match told.recv_timeout(PATIENCE)? {
        Ok(None) => Ok(doom),
        other => anyhow::bail!("the robust mutex: {other:?}"),
    }
}

/// The next nice value; there is none beyond 19.
fn nicer(nice: i64) -> i64 {
    (nice + 1).min(19)
}

fn main() -> ExitCode {
    run::<Threads>()
}
