//! Whether the service waits, so that stopping it costs it nothing.

use crate::kernel_program::KernelProgram;
use std::io;
use unbroken_sys::bpf::{ThreadProgram, ThreadReader};

/// After a look that met the service at work the next one comes no sooner, and no sooner than a
/// part of the last pause: a look takes some microseconds of the spare core.
const INTERVAL_NS: u64 = 20_000;
const PAUSE_PART: u64 = 8;

pub(super) struct Idleness {
    program: KernelProgram<ThreadProgram>,
    spare_core: usize,
    /// The process that is looked at, by its number in our namespace.
    reader: Option<(i32, ThreadReader)>,
    next_look_ns: u64,
    interval_ns: u64,
}

impl Idleness {
    pub fn new(spare_core: usize) -> Idleness {
        Idleness {
            program: KernelProgram::Unasked,
            spare_core,
            reader: None,
            next_look_ns: 0,
            interval_ns: INTERVAL_NS,
        }
    }

    /// When it is worth while to look again; never while that cannot be done.
    pub fn next_look_ns(&self) -> Option<u64> {
        match self.program {
            KernelProgram::Absent => None,
            _ => Some(self.next_look_ns),
        }
    }

    /// An epoch's pause is over: whoever asks next is answered at once.
    pub fn paused(&mut self, pause_ns: u64) {
        self.next_look_ns = 0;
        self.interval_ns = INTERVAL_NS.max(pause_ns / PAUSE_PART);
    }

    /// Looks whether all threads of process `pid` wait. False when that is not known.
    pub fn waits(&mut self, pid: i32, now_ns: u64) -> bool {
        self.next_look_ns = now_ns.saturating_add(self.interval_ns);
        self.program.ask_for(self.spare_core, ThreadProgram::load);
        self.look(pid).unwrap_or_else(|error| {
            crate::log!("it is not known from now on when the service waits: {error}");
            self.reader = None;
            self.program = KernelProgram::Absent;
            false
        })
    }

    fn look(&mut self, pid: i32) -> io::Result<bool> {
        let Some(program) = self.program.ready()? else {
            return Ok(false);
        };
        if self.reader.as_ref().is_none_or(|(known, _)| *known != pid) {
            self.reader = Some((pid, program.reader(pid)?));
        }
        match &self.reader {
            Some((_, reader)) => Ok(!reader.any_runs()?),
            None => Ok(false),
        }
    }
}
