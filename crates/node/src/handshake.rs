//! One capture, step by step, between the main thread (the wire) and the tracer thread.
//!
//! | step        | left by | to          | when |
//! |-------------|---------|-------------|------|
//! | `Idle`      | main    | `Requested` | a capture is due |
//! | `Requested` | tracer  | `Stopped`   | every thread of the service stands |
//! | `Stopped`   | main    | `Drained`   | the output of the epoch has been read |
//! | `Drained`   | tracer  | `Resumed`   | the service runs again |
//! | `Resumed`   | tracer  | `Published` | the epoch is committed |
//! | `Published` | main    | `Idle`      | the result has been taken |
//! | `Requested`, `Stopped`, `Drained`, `Resumed` | tracer | `Failed` | there is no epoch this time |
//! | `Failed`    | main    | `Idle`      | what the capture had taken is given back |
//!
//! From `Requested` to `Resumed` the main thread writes no input to the service: what the sockets
//! hold at the capture is exactly the input before `input_position`. Output that it reads up to
//! `Drained` was made before the stop and belongs to this epoch.
//!
//! Every step but one is left by one side alone, which moves it by a plain store. `Stopped` both
//! may leave: the tracer reads the service while main drains it, and may find that there can be no
//! epoch. `Failed` stands then, whoever was first, or main would wait for a tracer that waits for
//! nothing: `Drained` is stored only over `Stopped`, `Failed` over `Drained`, too.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    Idle = 0,
    Requested = 1,
    Stopped = 2,
    Drained = 3,
    Resumed = 4,
    Published = 5,
    /// The capture did not take place; the tracer has said why in an event.
    Failed = 6,
}

impl Step {
    fn from_word(word: u32) -> Step {
        match word {
            1 => Step::Requested,
            2 => Step::Stopped,
            3 => Step::Drained,
            4 => Step::Resumed,
            5 => Step::Published,
            6 => Step::Failed,
            _ => Step::Idle,
        }
    }
}

/// Shared by the two threads of one primary.
#[derive(Default)]
pub struct Handshake {
    step: AtomicU32,
    input_position: AtomicU64,
    pause_ns: AtomicU64,
    was_working: AtomicBool,
    /// `u64::MAX` for never.
    stop_due_ns: AtomicU64,
    requested_at_ns: AtomicU64,
    main_sleeps: AtomicBool,
}

impl Handshake {
    pub fn step(&self) -> Step {
        Step::from_word(self.step.load(Ordering::Acquire))
    }

    fn set(&self, step: Step) {
        // SeqCst pairs with `main_falls_asleep`: either main sees the new step before it sleeps
        // or the tracer sees that main sleeps and rings.
        self.step.store(step as u32, Ordering::SeqCst);
    }

    /// Main: asks for a capture. Ring the tracer's bell after this.
    pub fn request(&self, now_ns: u64) {
        self.requested_at_ns.store(now_ns, Ordering::Relaxed);
        self.set(Step::Requested);
    }

    /// Main: the output of the epoch has been read; input before `input_position` has been given.
    /// A capture that has failed meanwhile stays so.
    pub fn drained(&self, input_position: u64) {
        self.input_position.store(input_position, Ordering::Relaxed);
        let (from, to) = (Step::Stopped as u32, Step::Drained as u32);
        let _ = self
            .step
            .compare_exchange(from, to, Ordering::SeqCst, Ordering::Relaxed);
    }

    /// Main: the result has been taken; the next capture may be requested.
    pub fn finish(&self) {
        self.set(Step::Idle);
    }

    /// Tracer: when main asked for the capture under way.
    pub fn requested_at_ns(&self) -> u64 {
        self.requested_at_ns.load(Ordering::Relaxed)
    }

    /// Tracer: every thread of the service stands.
    #[must_use = "when it is true the main thread sleeps and must be woken"]
    pub fn stopped(&self) -> bool {
        self.set(Step::Stopped);
        self.main_sleeps.load(Ordering::SeqCst)
    }

    /// Tracer: waits until the main thread has drained the output; gives the input position.
    /// The main thread was woken by the step before this one.
    pub fn wait_drained(&self) -> u64 {
        while self.step() != Step::Drained {
            std::hint::spin_loop();
        }
        self.input_position.load(Ordering::Relaxed)
    }

    /// Tracer: the service runs again after a pause of `pause_ns`, which found it working or
    /// waiting; when it must be stopped next, if it must.
    #[must_use = "when it is true the main thread sleeps and must be woken"]
    pub fn resumed(&self, pause_ns: u64, was_working: bool, stop_due_ns: Option<u64>) -> bool {
        self.pause_ns.store(pause_ns, Ordering::Relaxed);
        self.was_working.store(was_working, Ordering::Relaxed);
        self.stop_due_ns
            .store(stop_due_ns.unwrap_or(u64::MAX), Ordering::Relaxed);
        self.set(Step::Resumed);
        self.main_sleeps.load(Ordering::SeqCst)
    }

    /// Tracer: the epoch is published.
    #[must_use = "when it is true the main thread sleeps and must be woken"]
    pub fn published(&self) -> bool {
        self.set(Step::Published);
        self.main_sleeps.load(Ordering::SeqCst)
    }

    /// Tracer: there is no epoch this time.
    #[must_use = "when it is true the main thread sleeps and must be woken"]
    pub fn failed(&self) -> bool {
        self.set(Step::Failed);
        self.main_sleeps.load(Ordering::SeqCst)
    }

    /// Main, after `Resumed`: how long the service stood.
    pub fn pause_ns(&self) -> u64 {
        self.pause_ns.load(Ordering::Relaxed)
    }

    /// Main, after `Resumed`: whether the service was stopped in its work.
    pub fn was_working(&self) -> bool {
        self.was_working.load(Ordering::Relaxed)
    }

    /// Main, after `Resumed`: when the service must be stopped next.
    pub fn stop_due_ns(&self) -> Option<u64> {
        let due_ns = self.stop_due_ns.load(Ordering::Relaxed);
        (due_ns != u64::MAX).then_some(due_ns)
    }

    /// Main: about to sleep while the step is `seen`. False when the step moved meanwhile: do not
    /// sleep.
    #[must_use]
    pub fn main_falls_asleep(&self, seen: Step) -> bool {
        self.main_sleeps.store(true, Ordering::SeqCst);
        if self.step.load(Ordering::SeqCst) == seen as u32 {
            return true;
        }
        self.main_sleeps.store(false, Ordering::Relaxed);
        false
    }

    /// Main: woke up.
    pub fn main_is_awake(&self) {
        self.main_sleeps.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    /// A capture that the tracer has got as far as `Stopped`.
    fn stopped() -> Handshake {
        let handshake = Handshake::default();
        handshake.request(1);
        let _ = handshake.stopped();
        handshake
    }

    #[test]
    fn a_capture_that_fails_before_the_drain_has_failed_after_it() {
        let handshake = stopped();
        let _ = handshake.failed();
        handshake.drained(7);
        assert_eq!(handshake.step(), Step::Failed);
        // Main has dealt with `Drained`, and must not go to sleep over what came instead.
        assert!(!handshake.main_falls_asleep(Step::Drained));
        handshake.finish();
        assert_eq!(handshake.step(), Step::Idle);
    }

    #[test]
    fn a_capture_that_fails_after_the_drain_has_failed() {
        let handshake = stopped();
        handshake.drained(7);
        assert_eq!(
            (handshake.step(), handshake.wait_drained()),
            (Step::Drained, 7)
        );
        let _ = handshake.failed();
        assert_eq!(handshake.step(), Step::Failed);
    }

    #[test]
    fn a_capture_that_fails_during_the_drain_has_failed() {
        const ROUNDS: usize = 10_000;
        let (handshake, start) = (Handshake::default(), Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    start.wait();
                    let _ = handshake.failed();
                    start.wait();
                }
            });
            let mut lost = 0;
            for _ in 0..ROUNDS {
                handshake.request(1);
                let _ = handshake.stopped();
                start.wait();
                handshake.drained(7);
                start.wait();
                lost += usize::from(handshake.step() != Step::Failed);
                handshake.finish();
            }
            assert_eq!(lost, 0);
        });
    }
}
