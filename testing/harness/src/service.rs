//! One protected service: started, watched through `status --json`, killed, and stopped.

use std::fs::File;
use std::io::{Read, Seek};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::leftovers::{Marker, assert_gone, assert_none_left, leftovers_of_service};
use crate::process::{Ended, send, wait_for_end, wait_until};
use crate::random::Random;
use crate::scratch::unique;
use crate::status::Status;
use crate::unbroken::{Outcome, program, run_to_end_within};
use crate::{PATIENCE, Scratch, Signal};

/// How a service is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Goes into the service's name.
    pub purpose: String,
    pub command: Vec<String>,
    /// A program with its arguments that starts `unbroken`, such as `env`.
    pub starter: Vec<String>,
    /// More arguments of `unbroken run`, such as `--publish`.
    pub options: Vec<String>,
    /// Compare the product's mirror with the kernel at every epoch (I7). Costs time.
    pub verify: bool,
    /// Have whatever is bounded come to its bound again and again.
    pub small_bounds: bool,
}

impl Launch {
    pub fn new(purpose: &str, command: Vec<String>) -> Self {
        Self {
            purpose: purpose.to_string(),
            command,
            starter: Vec::new(),
            options: Vec::new(),
            verify: true,
            small_bounds: false,
        }
    }

    /// For those who measure: no comparing.
    pub fn unverified(mut self) -> Self {
        self.verify = false;
        self
    }

    pub fn within_small_bounds(mut self) -> Self {
        self.small_bounds = true;
        self
    }

    pub fn started_by(mut self, words: &[&str]) -> Self {
        self.starter = words.iter().map(ToString::to_string).collect();
        self
    }

    pub fn option(mut self, words: &[&str]) -> Self {
        self.options.extend(words.iter().map(ToString::to_string));
        self
    }
}

/// Whom to kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The first process of the service.
    Service,
    Primary,
    Standby,
    /// `unbroken run` itself.
    Front,
}

/// One kill and what followed.
#[derive(Debug, Clone)]
pub struct Kill {
    pub at: Instant,
    /// From the kill until `status` said protected again.
    pub protected_again_ms: f64,
    /// What the product itself measured, if the kill led to a takeover.
    pub takeover_ms: Option<f64>,
}

/// What a row of kills says while it goes on.
#[derive(Debug)]
pub enum KillEvent<'a> {
    Killed,
    Recovered(&'a Kill),
}

/// A row of kills at random moments.
#[derive(Debug, Clone, Copy)]
pub struct KillPlan {
    pub target: Target,
    pub signal: Signal,
    pub times: usize,
    /// The wait before each kill, while the service is protected, lies between these.
    pub wait: (Duration, Duration),
}

impl KillPlan {
    pub fn new(target: Target, times: usize) -> Self {
        let wait = (Duration::from_millis(50), Duration::from_millis(500));
        Self {
            target,
            signal: Signal::SIGKILL,
            times,
            wait,
        }
    }
}

/// A service under `unbroken run` in the calling thread's network namespace.
#[derive(Debug)]
pub struct Service {
    name: String,
    marker: Marker,
    front: Child,
    scratch: Scratch,
    /// The product's own log; open, so that it can be read when the product has cleaned up.
    log: OnceLock<File>,
    stopped: bool,
}

impl Service {
    /// Starts the service and waits until it is protected.
    pub fn start(launch: &Launch) -> Result<Self> {
        let service = Self::spawn(launch)?;
        service.wait_protected()?;
        Ok(service)
    }

    /// Starts the service and waits for nothing.
    pub fn spawn(launch: &Launch) -> Result<Self> {
        let name = unique(&launch.purpose);
        let marker = Marker::new(&name);
        let scratch = Scratch::new(&launch.purpose)?;
        let (variable, value) = marker.variable();
        let program = program()?;
        let mut command = match launch.starter.split_first() {
            None => Command::new(program),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        if launch.verify {
            command.env("UNBROKEN_VERIFY", "1");
        }
        if launch.small_bounds {
            command.env("UNBROKEN_SMALL_BOUNDS", "1");
        }
        let front = command
            .args(["run", "--name", &name])
            .args(&launch.options)
            .arg("--")
            .args(&launch.command)
            .env(variable, value)
            .stdin(Stdio::null())
            .stdout(File::create(scratch.path().join("stdout"))?)
            .stderr(File::create(scratch.path().join("stderr"))?)
            // In our process group: an interrupt from the keyboard reaches `run` too, which then
            // ends the service in order.
            .spawn()
            .context("cannot start unbroken run")?;
        Ok(Self {
            name,
            marker,
            front,
            scratch,
            log: OnceLock::new(),
            stopped: false,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn front_pid(&self) -> i32 {
        self.front.id() as i32
    }

    /// What the service and `run` have printed so far: (stdout, stderr).
    pub fn printed(&self) -> (String, String) {
        let read = |name: &str| {
            let bytes = std::fs::read(self.scratch.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        (read("stdout"), read("stderr"))
    }

    /// What `status NAME --json` says now.
    pub fn status(&self) -> Result<Status> {
        let outcome = self.ask(&["status", &self.name, "--json"], PATIENCE)?;
        if outcome.code() != Some(0) {
            bail!(
                "status of {}: {:?}: {}",
                self.name,
                outcome.ended,
                outcome.stderr.trim()
            );
        }
        Status::parse(&outcome.stdout)
    }

    /// Runs another command of the program about this service.
    pub fn ask(&self, arguments: &[&str], patience: Duration) -> Result<Outcome> {
        run_to_end_within(arguments, None, patience)
    }

    /// Waits until `condition` holds of the status. A status that cannot be had yet (the service
    /// is starting, or a takeover is under way) is asked for again.
    pub fn wait_for(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Result<Status> {
        let mut last = String::from("no status at all");
        self.open_log();
        let waited = wait_until(what, PATIENCE, || match self.status() {
            Ok(status) if condition(&status) => Ok(Some(status)),
            Ok(status) => {
                last = status.whole.to_string();
                Ok(None)
            }
            Err(cause) => {
                last = format!("{cause:#}");
                ensure!(self.is_alive(), "everything of the service has ended");
                Ok(None)
            }
        });
        waited.with_context(|| format!("{}: last seen: {last}\n{}", self.name, self.prints()))
    }

    /// What there is to be read about the service now, for whoever wonders what became of it.
    pub fn story(&self) -> String {
        let status = match self.status() {
            Ok(status) => status.whole.to_string(),
            Err(cause) => format!("{cause:#}"),
        };
        format!("{}: {status}\n{}", self.name, self.prints())
    }

    fn prints(&self) -> String {
        let (out, err) = self.printed();
        let (out, err) = (last_lines(&out), last_lines(&err));
        let log = last_lines(&self.log_text());
        format!("stdout: {out}\nstderr: {err}\nlog: {log}")
    }

    fn open_log(&self) {
        if self.log.get().is_none()
            && let Ok(log) = File::open(format!("/run/unbroken/{}/log", self.name))
        {
            // Another thread may have been faster: the file is the same.
            let _ = self.log.set(log);
        }
    }

    /// What the product's processes noted so far, from when a test first looked at the service.
    pub fn log_text(&self) -> String {
        self.open_log();
        let Some(mut log) = self.log.get() else {
            return String::new();
        };
        let mut bytes = Vec::new();
        match log.rewind().and_then(|()| log.read_to_end(&mut bytes)) {
            Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => format!("the log cannot be read: {error}"),
        }
    }

    /// Every process of the service and of ours for it: pid and command line.
    pub fn processes(&self) -> Vec<(i32, String)> {
        self.marker.processes()
    }

    /// Whether any process of the service or of ours for it is left.
    fn is_alive(&self) -> bool {
        !self.marker.processes().is_empty()
    }

    pub fn wait_protected(&self) -> Result<Status> {
        self.wait_for("state protected", Status::is_protected)
    }

    /// The service's own address with `port`, once something listens there.
    pub fn listening(&self, port: u16) -> Result<SocketAddr> {
        let address = SocketAddr::new(self.status()?.address, port);
        wait_until(&format!("a listener on {address}"), PATIENCE, || {
            Ok(TcpStream::connect_timeout(&address, PATIENCE)
                .ok()
                .map(drop))
        })?;
        Ok(address)
    }

    /// Sends `signal` to `target` as it stands now; returns the status just before.
    pub fn kill(&self, target: Target, signal: Signal) -> Result<Status> {
        let status = self.status()?;
        let pid = match target {
            Target::Service => status.service_pids.first().copied(),
            Target::Primary => status.primary_pid,
            Target::Standby => status.standby_pid,
            Target::Front => Some(self.front_pid()),
        };
        let pid = pid.with_context(|| format!("no {target:?} to kill: {}", status.whole))?;
        send(pid, signal)?;
        Ok(status)
    }

    /// Kills as planned, each time waiting until the service is protected again by others than
    /// before.
    pub fn kill_repeatedly(
        &self,
        plan: &KillPlan,
        random: &mut Random,
        mut tell: impl FnMut(KillEvent<'_>),
    ) -> Result<Vec<Kill>> {
        let mut kills = Vec::new();
        for number in 1..=plan.times {
            std::thread::sleep(random.between(plan.wait.0, plan.wait.1));
            let at = Instant::now();
            let before = self.kill(plan.target, plan.signal)?;
            tell(KillEvent::Killed);
            let after = self.wait_for(&format!("recovery from kill {number}"), |status| {
                status.is_protected() && recovered(plan.target, &before, status)
            })?;
            let took_over = after.takeovers > before.takeovers;
            let kill = Kill {
                at,
                protected_again_ms: at.elapsed().as_secs_f64() * 1e3,
                takeover_ms: after.last_takeover_ms.filter(|_| took_over),
            };
            tell(KillEvent::Recovered(&kill));
            kills.push(kill);
        }
        Ok(kills)
    }

    /// Waits for the end of `unbroken run`.
    pub fn wait_end(&mut self) -> Result<Ended> {
        let ended = wait_for_end(&mut self.front, "unbroken run", PATIENCE)?;
        self.stopped = true;
        Ok(ended)
    }

    /// `unbroken stop`, then the end of `run`, then nothing may be left.
    pub fn stop(mut self) -> Result<Ended> {
        let ended = self.end()?;
        self.assert_gone()?;
        Ok(ended)
    }

    /// As [`Service::stop`], where other services go on in the same namespace: its devices and
    /// routes may be theirs and are not looked at.
    pub fn stop_beside_others(mut self) -> Result<Ended> {
        let ended = self.end()?;
        assert_none_left(&self.name, || {
            Ok(leftovers_of_service(&self.name, &self.marker))
        })?;
        Ok(ended)
    }

    fn end(&mut self) -> Result<Ended> {
        self.assert_consistent()?;
        let outcome = self.ask(&["stop", &self.name], PATIENCE)?;
        if outcome.code() != Some(0) {
            bail!(
                "stop {}: {:?}: {}",
                self.name,
                outcome.ended,
                outcome.stderr.trim()
            );
        }
        self.wait_end()
    }

    /// What the product believed was right all the time (I7). A difference only makes it fill
    /// another standby, which no load need notice.
    pub fn assert_consistent(&self) -> Result<()> {
        let log = self.log_text();
        if self.log.get().is_none() {
            bail!("{}: its log was never there to be looked at", self.name);
        }
        let is_wrong = |line: &&str| {
            line.contains("mirror differs") || line.contains("changed while it was captured")
        };
        match log.lines().find(is_wrong) {
            Some(line) => bail!("{}: {line}", self.name),
            None => Ok(()),
        }
    }

    /// Waits until nothing is left of the service.
    pub fn assert_gone(&self) -> Result<()> {
        assert_gone(&self.name, &self.marker)
    }
}

/// The end of what was printed: enough to see why, short enough to read.
fn last_lines(text: &str) -> String {
    const LINES_SHOWN: usize = 25;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n")
}

/// Whether `after` shows that the loss of `target` has been made good.
fn recovered(target: Target, before: &Status, after: &Status) -> bool {
    match target {
        Target::Service | Target::Primary => after.takeovers > before.takeovers,
        Target::Standby => after.standby_pid.is_some() && after.standby_pid != before.standby_pid,
        Target::Front => true,
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if !self.stopped {
            let _ = run_to_end_within(&["stop", &self.name], None, Duration::from_secs(5));
        }
        // Whatever the product did not clean up must not disturb the next test. The mark makes
        // sure that only processes of this service are met.
        for (pid, _) in self.marker.processes() {
            let _ = send(pid, Signal::SIGKILL);
        }
        let _ = self.front.kill();
        let _ = self.front.wait();
        let _ = std::fs::remove_dir_all(format!("/run/unbroken/{}", self.name));
    }
}
