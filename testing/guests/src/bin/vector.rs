//! Vector and floating-point registers, with values that nothing else holds: threads spin with
//! them loaded and compare, so that stops and moves fall in between.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};
use unbroken_guests::registers::{self, Kept};
use unbroken_guests::{Guest, Place, eventually, main as run, same};

const THREADS: usize = 3;

struct Vectors {
    seen: Vec<Arc<Kept>>,
    rounds: Arc<AtomicU64>,
}

impl Guest for Vectors {
    fn set_up(_: &Place) -> Result<Self> {
        let seen = (0..THREADS)
            .map(|number| registers::spin(number as u64 + 1))
            .collect();
        registers::set_control(registers::CONTROL)?;
        Ok(Self {
            seen,
            rounds: Arc::new(AtomicU64::new(0)),
        })
    }

    fn check(&mut self) -> Result<()> {
        for (number, kept) in self.seen.iter().enumerate() {
            let before = kept.turns.load(Ordering::SeqCst);
            // Two more whole turns: one that began before may have been compared already.
            eventually("a thread that goes on", || {
                Ok(kept.turns.load(Ordering::SeqCst) > before + 2)
            })?;
            let lost = kept.lost.load(Ordering::SeqCst);
            same(&format!("registers that thread {number} lost"), lost, 0)?;
        }
        // The first thread has rounding modes of its own, which arithmetic obeys.
        same("control words", registers::control(), registers::CONTROL)?;
        let third = registers::third();
        ensure!(
            third == registers::THIRD_ROUNDED_UP,
            "1/3 is {third:#x}: another rounding mode"
        );
        self.rounds.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

fn main() -> ExitCode {
    run::<Vectors>()
}
