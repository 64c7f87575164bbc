//! A server to be measured, unprotected or protected, with the same pin.

use std::cell::RefCell;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use unbroken_harness::{Launch, Plain, Scratch, Service, Status, wait_until};

use crate::cores::Cores;
use crate::model::{Profile, Times};
use crate::totals::Totals;

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

/// How long a server may take until it listens and is protected: one that first writes gigabytes
/// has to be followed all the while.
const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until the service listens and, with all that it did before, is protected.
fn ready(service: &Service, port: u16) -> Result<SocketAddr> {
    let address = SocketAddr::new(service.status()?.address, port);
    wait_until(&format!("a listener on {address}"), PATIENCE, || {
        let tried = TcpStream::connect_timeout(&address, Duration::from_secs(5));
        Ok(tried.ok().map(drop))
    })?;
    wait_until("protection of a server that listens", PATIENCE, || {
        Ok(service.status()?.is_protected().then_some(()))
    })?;
    Ok(address)
}

fn require_protection(status: &Status) -> Result<()> {
    let reason = status.whole["reason"].as_str().unwrap_or_default();
    ensure!(
        status.is_protected(),
        "the service is {} ({reason})",
        status.state
    );
    Ok(())
}

/// A count of the status; one that is missing is no zero.
fn number(status: &Status, key: &str) -> Result<u64> {
    let found = status.whole[key].as_u64();
    found.with_context(|| format!("status has no number {key}: {}", status.whole))
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
            Running::Protected(service) => ready(service, port)?,
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

    /// The number of the newest epoch; an error where nothing protects the server now.
    pub fn epoch(&self) -> Result<u64> {
        let service = self.service().context("nothing protects it")?;
        let status = service.status()?;
        require_protection(&status)?;
        number(&status, "epoch")
    }

    /// What was noted so far.
    pub fn take_profiles(&self) -> Vec<Profile> {
        self.profiles.take()
    }

    /// What the protected service has counted so far; `None` on the unprotected side.
    pub fn totals(&self) -> Result<Option<Totals>> {
        self.service().map(Totals::read).transpose()
    }

    /// Notes what the protected service counted in a window that began `seconds` ago with `before`.
    pub fn note_profile(&self, window: &str, before: Option<&Totals>, seconds: f64) -> Result<()> {
        let (Some(service), Some(before)) = (self.service(), before) else {
            return Ok(());
        };
        let counted = Totals::read(service)?.since(before);
        let status = service.status()?;
        require_protection(&status).with_context(|| format!("window {window:?}"))?;
        let pause_us = counted.times("pause");
        // Zeros would keep every promise and meet every target.
        ensure!(
            counted.epochs > 0 && pause_us != Times::default(),
            "window {window:?}: the service counted {} epochs, the longest pause {} us",
            counted.epochs,
            pause_us.max
        );
        let each = |sum: u64| sum as f64 / counted.epochs as f64;
        self.profiles.borrow_mut().push(Profile {
            case: window.into(),
            pause_us,
            hold_us: counted.times("hold"),
            steps_us: counted.steps(),
            pause_bars: counted.bars("pause"),
            hold_bars: counted.bars("hold"),
            epochs_per_s: counted.epochs as f64 / seconds,
            dirty_pages_per_epoch: each(counted.dirty_pages),
            bytes_per_epoch: each(counted.bytes),
            connections: number(&status, "connections")?,
            resident_bytes: number(&status, "resident_bytes")?,
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
