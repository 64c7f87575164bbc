//! Carries a fault out.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use unbroken_harness::{PATIENCE, Service, Signal, Status, send, wait_until};

use crate::disk::{Disks, Full};
use crate::fault::{Blow, Death, Fault, Victim};
use crate::memory;

/// A service as it stood when a fault began.
pub struct Scene<'a> {
    pub service: &'a Service,
    pub disks: &'a Disks,
    pub before: &'a Status,
    /// The server can live with a full disk of its own.
    pub own_disk_too: bool,
    /// The kernel can be made to kill for want of memory; else a signal does.
    pub can_run_out: bool,
}

impl Scene<'_> {
    /// Does it; returns the pids that must be gone from now on.
    pub fn strike(&self, fault: Fault) -> Result<Vec<i32>> {
        let (service, init) = (self.pid(Victim::Service)?, self.pid(Victim::Init)?);
        let mut gone = self.carry_out(fault)?;
        if gone.contains(&init) {
            // It takes its namespace with it, and it is the service that status shows.
            gone.push(service);
        }
        Ok(gone)
    }

    fn carry_out(&self, fault: Fault) -> Result<Vec<i32>> {
        match fault {
            Fault::Death(death) => Ok(vec![self.deal(death)?]),
            Fault::Deaths(first, gap, second) => {
                let pids = [self.pid(first.victim)?, self.pid(second.victim)?];
                self.blow(pids[0], first)?;
                pause(gap);
                self.blow(pids[1], second)?;
                Ok(pids.to_vec())
            }
            Fault::DeathThenExposed(first, after, second) => {
                let gone = self.deal(first)?;
                pause(after);
                Ok(vec![gone, self.kill_exposed(second)?])
            }
            Fault::Pause(victim, duration) => {
                let stopped = Stopped::new(self.pid(victim)?)?;
                pause(duration);
                drop(stopped);
                Ok(Vec::new())
            }
            Fault::PauseAndDeath {
                stopped,
                before,
                death,
                after,
            } => {
                let dies = self.pid(death.victim)?;
                let stopped = Stopped::new(self.pid(stopped)?)?;
                pause(before);
                self.blow(dies, death)?;
                pause(after);
                drop(stopped);
                Ok(vec![dies])
            }
            Fault::FullDisk(duration) => {
                let full = self.fill()?;
                pause(duration);
                drop(full);
                Ok(Vec::new())
            }
            Fault::FullDiskAndDeath(before, death, after) => {
                let full = self.fill()?;
                pause(before);
                let gone = self.deal(death)?;
                pause(after);
                drop(full);
                Ok(vec![gone])
            }
            Fault::Switchover => {
                let outcome = self
                    .service
                    .ask(&["switchover", self.service.name()], PATIENCE)?;
                ensure!(outcome.code() == Some(0), "switchover: {outcome:?}");
                Ok(self.before.primary_pid.into_iter().collect())
            }
        }
    }

    fn fill(&self) -> Result<Full> {
        self.disks.fill(self.own_disk_too)
    }

    fn deal(&self, death: Death) -> Result<i32> {
        let pid = self.pid(death.victim)?;
        self.blow(pid, death)?;
        Ok(pid)
    }

    fn blow(&self, pid: i32, death: Death) -> Result<()> {
        match death.blow {
            // One that is gone already died of the first blow.
            Blow::Signal(signal) => send(pid, deadly(pid, signal)).map(drop),
            Blow::OutOfMemory if self.can_run_out => memory::run_out(pid, self.service.name()),
            Blow::OutOfMemory => send(pid, Signal::SIGKILL).map(drop),
        }
    }

    fn pid(&self, victim: Victim) -> Result<i32> {
        let before = self.before;
        let service = before.service_pids.first().copied();
        let pid = match victim {
            Victim::Service => service,
            Victim::Init => service.and_then(parent_of),
            Victim::Primary => before.primary_pid,
            Victim::Standby => before.standby_pid,
            Victim::Front => Some(self.service.front_pid()),
        };
        pid.with_context(|| format!("no {} to meet: {}", victim.name(), before.whole))
    }

    /// Waits until the loss has been made good by a process that stands where the lost one stood,
    /// and kills `victim` of those that are there now.
    fn kill_exposed(&self, victim: Victim) -> Result<i32> {
        let before = self.before;
        let pid = wait_until("another standby", PATIENCE, || {
            let Ok(status) = self.service.status() else {
                return Ok(None);
            };
            let is_new =
                |pid: &i32| Some(*pid) != before.standby_pid && Some(*pid) != before.primary_pid;
            let standby = status.standby_pid.filter(is_new);
            Ok(match victim {
                Victim::Primary => standby.and(status.primary_pid),
                _ => standby,
            })
        })?;
        send(pid, Signal::SIGKILL)?;
        Ok(pid)
    }
}

/// A process that is stopped until this is dropped.
struct Stopped(i32);

impl Stopped {
    fn new(pid: i32) -> Result<Self> {
        send(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It fails only when somebody has killed it meanwhile.
        let _ = send(self.0, Signal::SIGCONT);
    }
}

/// Microseconds matter here, and a sleep is late by more.
fn pause(duration: Duration) {
    const SPUN: Duration = Duration::from_millis(1);
    let until = Instant::now() + duration;
    if let Some(slept) = duration.checked_sub(SPUN) {
        std::thread::sleep(slept);
    }
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

fn parent_of(pid: i32) -> Option<i32> {
    field(pid, "PPid:")?.parse().ok()
}

/// The signal, or the one that nobody can refuse when the process blocks, ignores or handles it.
fn deadly(pid: i32, signal: Signal) -> Signal {
    let bit = 1u64 << (signal as i32 - 1);
    let survives = ["SigBlk:", "SigIgn:", "SigCgt:"].into_iter().any(|set| {
        let mask = field(pid, set).and_then(|mask| u64::from_str_radix(&mask, 16).ok());
        mask.is_some_and(|mask| mask & bit != 0)
    });
    if survives { Signal::SIGKILL } else { signal }
}

fn field(pid: i32, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().to_string())
}
