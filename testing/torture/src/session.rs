//! The life of one service under torture: started, loaded, met by fault after fault, stopped.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use unbroken_harness::{Launch, Random, Scratch, Service, Status, namespace};

use crate::disk::Disks;
use crate::evidence::{self, Case};
use crate::fault::{Fault, Planned, Victim, mix, plan};
use crate::hygiene::Ledger;
use crate::load::{Load, Server};
use crate::options::Options;
use crate::strike::Scene;

/// Longer than any fault lasts, and than any step of making it good.
const SLOW: Duration = Duration::from_secs(5);

/// A row of faults that meet one service.
#[derive(Debug, Clone, Copy)]
pub struct Session<'a> {
    pub seed: u64,
    /// The first fault, and the one after the last.
    pub first: u64,
    pub end: u64,
    pub server: Server,
    /// What the kind of every fault must have in its name.
    pub only: &'a str,
    /// See [`Scene`].
    pub can_run_out: bool,
}

impl<'a> Session<'a> {
    /// The server is drawn by lot unless it is given.
    pub fn new(options: &'a Options, first: u64, end: u64, can_run_out: bool) -> Self {
        let mut random = Random::from_seed(mix(!options.seed, first));
        let drawn = Server::draw(&mut random);
        Self {
            seed: options.seed,
            first,
            end,
            server: options.server.unwrap_or(drawn),
            only: &options.only,
            can_run_out,
        }
    }
}

/// A fault that was survived.
#[derive(Debug, Clone)]
pub struct Survived {
    pub kind: String,
    /// From the fault's first blow until `status` said protected again.
    pub protected_again: Duration,
    /// What the product measured, if the fault led to a takeover.
    pub takeover_ms: Option<f64>,
    /// The longest that a client heard nothing, where it should hear all the time.
    pub longest_gap_ms: Option<f64>,
}

/// Something that must be looked at.
#[derive(Debug)]
pub struct Incident {
    pub number: u64,
    pub kind: String,
    pub server: &'static str,
    pub why: String,
    /// Where what is known of it is kept.
    pub kept: String,
}

/// What a session tells while it goes on.
#[derive(Debug)]
pub enum News {
    Survived(Survived),
    /// It was survived, but protection was long in coming back.
    Slow(Incident),
    Failed(Incident),
    /// How much the service's processes held early and late.
    Trends(String),
}

/// Plays a session in a host of the calling thread's own, which must do nothing else afterwards,
/// until its end or its first failure. Returns the fault to go on with.
pub fn play(
    session: Session<'_>,
    evidence: &Path,
    tell: &mut dyn FnMut(News),
    stopped: &dyn Fn() -> bool,
) -> Result<u64> {
    namespace::enter_new()?;
    let files = Scratch::new("torture")?;
    let disks = Disks::mount(files.path())?;
    let mut next = session.first;
    let mut life = Life::begin(session, &disks, files.path())
        .with_context(|| format!("before fault {next}, {}", session.server.name()))?;
    let endured = life.endure(&mut next, evidence, tell, stopped);
    if let Some(trends) = life.ledger.report() {
        tell(News::Trends(trends));
    }
    if let Err(cause) = endured.and_then(|()| life.end()) {
        tell(News::Failed(life.incident(format!("{cause:#}"), evidence)));
    }
    Ok(next)
}

/// One service and what has happened to it so far.
struct Life<'a> {
    session: Session<'a>,
    disks: &'a Disks,
    service: Option<Service>,
    load: Option<Load>,
    faults: Vec<(u64, Planned)>,
    before: Option<Status>,
    ledger: Ledger,
}

impl<'a> Life<'a> {
    fn begin(session: Session<'a>, disks: &'a Disks, files: &Path) -> Result<Self> {
        let (command, port) = session.server.command(files)?;
        let service = Service::start(&Launch::new(session.server.name(), command))?;
        let load = session.server.load(service.listening(port)?)?;
        Ok(Self {
            session,
            disks,
            service: Some(service),
            load: Some(load),
            faults: Vec::new(),
            before: None,
            ledger: Ledger::default(),
        })
    }

    fn service(&self) -> Result<&Service> {
        self.service
            .as_ref()
            .context("the service has been stopped")
    }

    /// All faults from `next` on, each of which moves it.
    fn endure(
        &mut self,
        next: &mut u64,
        evidence: &Path,
        tell: &mut dyn FnMut(News),
        stopped: &dyn Fn() -> bool,
    ) -> Result<()> {
        let mut front = true;
        while *next < self.session.end && !stopped() {
            let planned = plan(self.session.seed, *next, front, self.session.only);
            front &= !kills_front(planned.fault);
            self.faults.push((*next, planned));
            *next += 1;
            let survived = self.survive(planned)?;
            let took = survived.protected_again;
            tell(News::Survived(survived));
            if took > SLOW {
                let why = format!("protected again only after {:.1} s", took.as_secs_f64());
                tell(News::Slow(self.incident(why, evidence)));
            }
        }
        Ok(())
    }

    fn survive(&mut self, planned: Planned) -> Result<Survived> {
        std::thread::sleep(planned.wait);
        if let Some(load) = &self.load {
            // What was before this fault is not its doing.
            load.take_longest_gap_ms();
        }
        let service = self.service()?;
        let before = service.wait_protected()?;
        let at = Instant::now();
        let scene = Scene {
            service,
            disks: self.disks,
            before: &before,
            own_disk_too: self.session.server.lives_with_a_full_disk(),
            can_run_out: self.session.can_run_out,
        };
        let struck = scene.strike(planned.fault);
        self.before = Some(before.clone());
        let gone = struck?;
        let service = self.service()?;
        let after = service.wait_for("recovery from the fault", |status| {
            status.is_protected() && !gone.iter().any(|pid| shows(status, *pid))
        })?;
        let protected_again = at.elapsed();
        let moment = Instant::now();
        let load = self.load.as_mut().context("no load")?;
        load.verify(moment)?;
        let longest_gap_ms = load.take_longest_gap_ms();
        let service = self.service()?;
        service.assert_consistent()?;
        let sample = crate::hygiene::sample(service, &after);
        self.ledger.add(sample);
        let took_over = after.takeovers > before.takeovers;
        Ok(Survived {
            kind: planned.fault.kind(),
            protected_again,
            takeover_ms: after.last_takeover_ms.filter(|_| took_over),
            longest_gap_ms,
        })
    }

    /// Everything that was under way has arrived, nothing is left behind, nothing has grown.
    fn end(&mut self) -> Result<()> {
        if let Some(load) = self.load.take() {
            load.finish()?;
        }
        self.ledger.assert_no_growth()?;
        self.service()?.assert_consistent()?;
        if let Some(service) = self.service.take() {
            service.stop()?;
        }
        Ok(())
    }

    /// What happened in the end, with all that is known of it kept. What shows only at the end is
    /// counted with the last fault.
    fn incident(&self, why: String, evidence: &Path) -> Incident {
        let (number, kind) = match self.faults.last() {
            Some((number, planned)) => (*number, planned.fault.kind()),
            None => (self.session.first, "none".into()),
        };
        let seen = self.load.as_ref().map(Load::seen);
        let before = self.before.as_ref();
        let case = Case {
            seed: self.session.seed,
            number,
            server: self.session.server.name(),
            faults: &self.faults,
            cause: why,
            seen: seen.unwrap_or_default(),
            before: before.map_or_else(String::new, |status| format!("{:#}", status.whole)),
        };
        let kept = match &self.service {
            Some(service) => match evidence::keep(evidence, &case, service) {
                Ok(place) => place.display().to_string(),
                Err(cause) => format!("nothing could be kept: {cause:#}"),
            },
            None => "nothing: the service had ended".into(),
        };
        Incident {
            number,
            kind,
            server: self.session.server.name(),
            why: case.cause,
            kept,
        }
    }
}

fn kills_front(fault: Fault) -> bool {
    match fault {
        Fault::Death(death) | Fault::Deaths(death, ..) => death.victim == Victim::Front,
        _ => false,
    }
}

/// Whether the status still counts on that process.
fn shows(status: &Status, pid: i32) -> bool {
    status.service_pids.contains(&pid)
        || status.primary_pid == Some(pid)
        || status.standby_pid == Some(pid)
}
