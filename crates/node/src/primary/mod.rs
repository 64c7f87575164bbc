//! The primary's main thread: the wire between host and service, and the decisions around it.
//!
//! One owner of state: the loop waits for an event and applies it in one step. The tracer thread
//! captures ([`tracer`]); everything else happens here, on the spare core.

mod ending;
pub mod line;
mod standby;
mod traffic;

use crate::board::{Board, State as BoardState};
use crate::clock::now_ns;
use crate::config::Config;
use crate::control::{Asker, Control, Request};
use crate::directory::{Claim, RunDirectory};
use crate::handshake::Step;
use crate::log;
use line::{Command, Line, Report};
use rustix::event::epoll;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use unbroken_core::pacing::{Pacing, PacingLimits};
use unbroken_core::role::{Action, Event, Role, State};
use unbroken_tracee::{Bell, Death};
use unbroken_wire::gate::Gate;

/// What every node of a service holds, whatever its role.
pub struct Common {
    pub config: Config,
    pub directory: RunDirectory,
    pub board: Board,
    pub claim: Claim,
    pub control: Control,
    pub front_bell: OwnedFd,
    pub host_tun: OwnedFd,
    /// Our standard output and error, in this order.
    pub outputs: [OwnedFd; 2],
}

impl Common {
    /// Tells the front that the board changed.
    pub fn ring_front(&self) {
        let _ = rustix::io::write(&self.front_bell, &1u64.to_ne_bytes());
    }
}

/// The running service's ends in our hands.
pub struct ServiceEnds {
    pub tun: OwnedFd,
    /// Read ends of the service's standard output and error.
    pub outputs: [OwnedFd; 2],
    /// pid 1 of its namespace: killing it kills the whole service.
    pub init: OwnedFd,
    pub notify: Arc<OwnedFd>,
    /// The first process, as the host numbers it.
    pub host_pid: i32,
}

pub struct Primary {
    common: Common,
    service: ServiceEnds,
    role: Role,
    pacing: Pacing,
    gate: Gate,
    traffic: traffic::Traffic,
    line: Arc<Line>,
    bell: Bell,
    standby: Option<standby::Standby>,
    /// The step of the capture that this thread has dealt with.
    seen: Step,
    capture_started_ns: u64,
    /// Whether the capture under way is the one that completes a fill.
    sealing: bool,
    /// A signal that the user sent through us and that may end the service.
    ending: ending::Ending,
    switchover: Option<Asker>,
    epoll: OwnedFd,
}

/// The tags of what the loop sleeps on.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Source {
    HostTun = 1,
    ServiceTun,
    Output,
    ErrorOutput,
    MainBell,
    Control,
    StandbyChannel,
    StandbyEnd,
    StageEnd,
}

/// How long the loop watches a capture before it sleeps: longer than captures usually take.
const WATCH_NS: u64 = 300_000;

impl Primary {
    /// `role` has just entered an unprotected state; its first actions are `actions`.
    pub fn new(
        common: Common,
        service: ServiceEnds,
        role: Role,
        line: Arc<Line>,
        bell: Bell,
    ) -> io::Result<Primary> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |source: &dyn AsFd, tag: Source| {
            let data = epoll::EventData::new_u64(tag as u64);
            epoll::add(&epoll, source.as_fd(), data, epoll::EventFlags::IN)
        };
        watch(&common.host_tun, Source::HostTun)?;
        watch(&service.tun, Source::ServiceTun)?;
        watch(&service.outputs[0], Source::Output)?;
        watch(&service.outputs[1], Source::ErrorOutput)?;
        watch(&line.main_bell(), Source::MainBell)?;
        watch(&common.control.as_fd(), Source::Control)?;
        watch(&service.init, Source::StageEnd)?;
        Ok(Primary {
            traffic: traffic::Traffic::new()?,
            pacing: Pacing::new(PacingLimits::default()),
            gate: traffic::new_gate(),
            standby: None,
            seen: Step::Idle,
            capture_started_ns: 0,
            sealing: false,
            ending: ending::Ending::default(),
            switchover: None,
            common,
            service,
            role,
            line,
            bell,
            epoll,
        })
    }

    /// Carries the service until it ends or another node takes it; gives the exit code of this
    /// process.
    pub fn run(mut self, actions: Vec<Action>) -> io::Result<i32> {
        self.common.board.set_primary_pid(std::process::id().cast_signed());
        self.act(actions)?;
        loop {
            let mut busy = self.follow_capture()?;
            busy |= self.carry()?;
            self.start_capture_if_due();
            while let Some(report) = self.line.next_report() {
                busy = true;
                self.take_report(report)?;
            }
            if let Some(code) = self.finished()? {
                return Ok(code);
            }
            if !busy {
                self.rest()?;
            }
        }
    }

    fn apply(&mut self, event: Event) -> io::Result<()> {
        let before = self.role.state();
        let actions = self.role.apply(event, now_ns());
        if self.role.state() != before {
            log!("{event:?}: {before:?} -> {:?}", self.role.state());
        }
        self.act(actions)
    }

    fn act(&mut self, actions: Vec<Action>) -> io::Result<()> {
        for action in actions {
            match action {
                Action::StartStandby => self.start_standby()?,
                Action::StopStandby => self.stop_standby(),
                Action::PassOutput => self.pass_held()?,
                // The gate holds by itself whenever there is no permit to pass.
                Action::HoldOutput => {}
                Action::OrderTakeover(_) | Action::Retire => {}
                Action::Fail(failure) => self.ending.fail(failure),
                Action::End => {}
                Action::GoLive { .. } | Action::Adopt { .. } => {}
            }
        }
        self.show_state();
        Ok(())
    }

    fn show_state(&self) {
        let (state, reason) = match self.role.state() {
            State::Starting => (BoardState::Starting, String::new()),
            State::Unprotected(reason) => (BoardState::Unprotected, self.reason_text(reason)),
            State::Syncing | State::Sealing => (BoardState::Syncing, String::new()),
            State::Protected => (BoardState::Protected, String::new()),
            _ => return,
        };
        self.common.board.set_term(self.role.term());
        self.common.board.set_state(state, &reason);
        self.common.ring_front();
    }

    fn take_report(&mut self, report: Report) -> io::Result<()> {
        match report {
            Report::ReadyToSeal => self.sealing = true,
            Report::Unfit(why) => {
                log!("unfit: {why}");
                self.traffic.unfit = Some(why);
                self.apply(Event::Forked)?;
                self.show_state();
            }
            Report::Fit => {
                self.traffic.unfit = None;
                self.apply(Event::SingleAgain)?;
            }
            Report::Dying(death) => self.service_dies(death)?,
            Report::Gone(death) => self.service_gone(death)?,
            Report::Pids(pids) => {
                if let Some(&first) = pids.first() {
                    self.service.host_pid = first;
                }
                self.common.board.set_service_pids(&pids);
            }
            Report::Broken(why) => {
                log!("capture: {why}");
                self.replace_standby()?;
            }
            Report::Figures { dirty_pages, bytes, connections, resident_bytes } => {
                let board = &self.common.board;
                board.record_epoch(self.line.handshake.sequence(), dirty_pages, bytes, now_ns());
                board.set_connections(connections);
                board.set_resident_bytes(resident_bytes);
            }
        }
        Ok(())
    }

    fn take_request(&mut self, request: Request, asker: Asker) -> io::Result<()> {
        match request {
            Request::Signal(signal) => {
                let sent = self.send_signal(signal);
                let refusal = sent.as_ref().map_err(|error| error.to_string());
                self.common.control.answer(&asker, refusal.map(|_| ()).map_err(|text| leak_free(&text)).as_ref().map(|_| ()).map_err(|text| text.as_str()));
            }
            Request::Stop => self.stop_service(asker)?,
            Request::Switchover if self.role.state() == State::Protected => {
                self.switchover = Some(asker);
                self.pacing.output_waits(now_ns());
            }
            Request::Switchover => {
                self.common.control.answer(&asker, Err("it has no standby that could take over now"));
            }
        }
        Ok(())
    }
}
