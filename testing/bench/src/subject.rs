//! A server to be measured, unprotected or protected, with the same pin.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use unbroken_harness::{Launch, Plain, Scratch, Service};

use crate::cores::Cores;
use crate::model::{Profile, Times};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Unprotected,
    Protected,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Protected => "protected",
        }
    }
}

/// Writes what a server needs into a directory and says how it is started.
pub type MakeCommand<'a> = dyn Fn(&Path) -> Result<Vec<String>> + 'a;

/// A server under measurement.
#[derive(Debug)]
pub struct Subject {
    address: SocketAddr,
    running: Running,
    /// What the protected service said of itself in each window.
    profiles: RefCell<Vec<Profile>>,
    /// Its files; gone after it.
    _scratch: Scratch,
}

#[derive(Debug)]
enum Running {
    Unprotected(Plain),
    Protected(Service),
}

impl Subject {
    /// Starts the server on the service's core and waits until it listens, and, on the protected
    /// side, until it is protected.
    pub fn start(
        cores: &Cores,
        side: Side,
        name: &str,
        port: u16,
        command: &MakeCommand<'_>,
    ) -> Result<Self> {
        let scratch = Scratch::new(&format!("bench-{name}"))?;
        // Servers give up root and must still reach their files.
        std::fs::set_permissions(
            scratch.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        let command = command(scratch.path())?;
        let running = match side {
            Side::Unprotected => {
                cores.only_service()?;
                Plain::start(&command, port, &scratch).map(Running::Unprotected)
            }
            Side::Protected => {
                cores.everywhere()?;
                let launch = Launch::new(&format!("bench-{name}"), command).unverified();
                Service::start(&launch).map(Running::Protected)
            }
        };
        cores.only_others()?;
        let running = running.with_context(|| format!("starting {name} {}", side.name()))?;
        let address = match &running {
            Running::Unprotected(plain) => plain.address(),
            Running::Protected(service) => service.listening(port)?,
        };
        Ok(Self {
            address,
            running,
            profiles: RefCell::default(),
            _scratch: scratch,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The service, when it is protected.
    pub fn service(&self) -> Option<&Service> {
        match &self.running {
            Running::Unprotected(_) => None,
            Running::Protected(service) => Some(service),
        }
    }

    /// The number of the newest epoch; 0 on the unprotected side.
    pub fn epoch(&self) -> Result<u64> {
        let Some(service) = self.service() else {
            return Ok(0);
        };
        Ok(service.status()?.whole["epoch"].as_u64().unwrap_or(0))
    }

    /// What was noted so far.
    pub fn take_profiles(&self) -> Vec<Profile> {
        self.profiles.take()
    }

    /// Notes what the protected service says of itself now, at the end of a window that began
    /// `seconds` ago with `epoch`.
    pub fn note_profile(&self, window: &str, epoch: u64, seconds: f64) -> Result<()> {
        let Some(service) = self.service() else {
            return Ok(());
        };
        let status = service.status()?;
        if !status.is_protected() {
            bail!(
                "{window}: the service is {} ({})",
                status.state,
                status.whole["reason"].as_str().unwrap_or_default()
            );
        }
        let number = |key: &str| status.whole[key].as_f64().unwrap_or(0.0);
        let epochs = status.whole["epoch"]
            .as_u64()
            .unwrap_or(0)
            .saturating_sub(epoch);
        self.profiles.borrow_mut().push(Profile {
            case: window.into(),
            pause_us: times(&status.whole["pause_us"]),
            hold_us: times(&status.whole["hold_us"]),
            steps_us: status
                .steps_us
                .iter()
                .map(|(name, value)| (name.clone(), times(value)))
                .collect(),
            epochs_per_s: epochs as f64 / seconds,
            dirty_pages_per_epoch: number("dirty_pages_per_epoch"),
            bytes_per_epoch: number("bytes_per_epoch"),
            connections: number("connections") as u64,
            resident_bytes: number("resident_bytes") as u64,
        });
        Ok(())
    }

    /// Ends the server; on the protected side nothing may be left of it.
    pub fn stop(self) -> Result<()> {
        match self.running {
            Running::Unprotected(mut plain) => plain.kill(),
            Running::Protected(service) => service.stop().map(drop),
        }
    }
}

fn times(value: &Value) -> Times {
    let at = |key: &str| value[key].as_f64().unwrap_or(0.0);
    Times {
        p50: at("p50"),
        p99: at("p99"),
        max: at("max"),
    }
}
