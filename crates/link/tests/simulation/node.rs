//! A primary and a standby, one small step at a time, so that a kill can come between any two.

use crate::Random;
use crate::service::{Service, State};
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use unbroken_core::epoch::Publication;
use unbroken_core::give_up::{Fault, GiveUp, GiveUpLimits};
use unbroken_core::pacing::{Pacing, PacingLimits};
use unbroken_core::role::{Action, Event, Role, RoleState};
use unbroken_link::{
    Commits, InputLogReader, InputLogWriter, JournalReader, JournalWriter, LocalLink,
};
use unbroken_wire::Tuple;
use unbroken_wire::exchange::{Arrival, Exchange, Input};
use unbroken_wire::flows::{
    Activity, ConnectionChange, Connections, FlowLimits, Flows, LatePacket, NamedConnection,
    TableChange,
};
use unbroken_wire::packet::{FRAME_BYTES_MAX, Packet};

/// Output that may wait for one commit.
const GATE_BYTES: usize = 1 << 20;
/// With commits that come late: how many epochs may be on their way.
const EPOCHS_UNDER_WAY: u32 = 4;

/// What goes on more slowly, or less well, than on one machine on a good day.
#[derive(Clone, Debug)]
pub struct Troubles {
    pub random: Random,
    /// Epochs are committed some time after they are published.
    pub late_commits: bool,
    /// A capture may come to nothing after its mark.
    pub failing_captures: bool,
    /// The arbiter takes its time before it lets a primary go on alone.
    pub late_leave: bool,
}

impl Troubles {
    pub fn none(random: Random) -> Self {
        Self {
            random,
            late_commits: false,
            failing_captures: false,
            late_leave: false,
        }
    }

    fn hold_commit(&mut self) -> bool {
        self.late_commits && !self.random.one_in(4)
    }

    fn hold_leave(&mut self) -> bool {
        self.late_leave && !self.random.one_in(4)
    }

    fn fail_capture(&mut self) -> bool {
        self.failing_captures && self.random.one_in(8)
    }
}

/// An epoch as captured; the journal carries its index here.
#[derive(Clone, Debug)]
pub struct Captured {
    pub state: State,
    pub gone: Vec<Tuple>,
    pub stood: Vec<NamedConnection>,
    pub connections: Connections,
    pub input_position: u64,
}

/// Every epoch that was ever captured.
pub type Archive = Vec<Captured>;

/// Connections by object.
type Table = BTreeMap<u64, NamedConnection>;

pub struct Primary {
    pub role: Role,
    pub service: Service,
    exchange: Exchange<InputLogWriter>,
    pacing: Pacing,
    journal: Option<JournalWriter>,
    /// Of a standby whose fill is not marked.
    input_log: Option<InputLogWriter>,
    /// The epoch whose mark is taken and that is not published.
    captured: Option<usize>,
    /// Epochs that are published, and of whose commit this node has not heard.
    published: VecDeque<(usize, Publication)>,
    commits: Commits,
    /// The table of the last published epoch.
    table: Table,
    /// The newest committed epoch of the present standby.
    committed: Option<usize>,
    troubles: Troubles,
}

impl Primary {
    pub fn first(troubles: Troubles) -> Self {
        let mut role = Role::primary(GiveUp::new(GiveUpLimits::default()));
        role.apply(Event::Launched, 0);
        let input = Input {
            flows: Flows::of_primary(FlowLimits::default()),
            position: 0,
        };
        Self::of(role, Service::default(), input, troubles)
    }

    fn of(role: Role, service: Service, input: Input, troubles: Troubles) -> Self {
        let limits = PacingLimits::default();
        let under_way = match troubles.late_commits {
            true => EPOCHS_UNDER_WAY,
            false => limits.under_way,
        };
        Self {
            exchange: Exchange::new(input, Default::default(), GATE_BYTES, role.term()),
            role,
            service,
            pacing: Pacing::new(PacingLimits {
                under_way,
                ..limits
            }),
            journal: None,
            input_log: None,
            captured: None,
            published: VecDeque::new(),
            commits: Commits::default(),
            table: BTreeMap::new(),
            committed: None,
            troubles,
        }
    }

    pub fn epochs_under_way(&self) -> usize {
        self.published.len()
    }

    pub fn is_protected(&self) -> bool {
        self.role.state() == RoleState::Protected
    }

    /// A client's packet reaches this node.
    pub fn input(&mut self, frame: &[u8], now_ns: u64) {
        let service = &mut self.service;
        let give = |frame: &[u8]| -> Result<(), Infallible> {
            service.input(frame);
            Ok(())
        };
        let Ok(arrival) = self.exchange.input(frame, now_ns, give);
        match arrival {
            Arrival::Given => self.pacing.input_arrived(now_ns),
            Arrival::Answered if self.exchange.output_waits() => self.pacing.output_waits(now_ns),
            Arrival::Answered | Arrival::Unlogged => {}
        }
    }

    /// Reads one frame of output.
    pub fn read_output(&mut self, now_ns: u64) {
        let Some(frame) = self.service.output.pop_front() else {
            return;
        };
        let take = |room: &mut [u8]| -> Result<_, Infallible> {
            room[..frame.len()].copy_from_slice(&frame);
            Ok(Some(frame.len()))
        };
        assert_eq!(
            self.exchange.output(now_ns, FRAME_BYTES_MAX, take),
            Ok(true)
        );
        if self.is_protected() {
            self.pacing.output_waits(now_ns);
        }
    }

    /// Begins to fill a standby, and makes it.
    pub fn fill(&mut self, now_ns: u64) -> Standby {
        let link = LocalLink::with_capacity(1 << 16, 1 << 20).unwrap();
        let term = self.role.term();
        self.journal = Some(link.journal_writer(term).unwrap());
        self.input_log = Some(link.input_log_writer().unwrap());
        self.role.apply(Event::FillBegun, now_ns);
        Standby {
            role: Role::standby(term, self.role.give_up()),
            flows: Flows::of_standby(FlowLimits::default()),
            journal: link.journal_reader(term).unwrap(),
            input_log: link.input_log_reader().unwrap(),
            applied: None,
            position: 0,
            troubles: self.troubles.clone(),
        }
    }

    /// The standby is gone. Whoever may have been able to take over is certain not to before this
    /// node has leave to go on alone.
    pub fn standby_died(&mut self, now_ns: u64) {
        let asks = self.role.apply(Event::StandbyDied, now_ns) == [Action::AskLeave];
        assert_eq!(asks, self.role.pass_permit().is_none());
        if asks && !self.troubles.late_leave {
            self.role.apply(Event::LeaveGranted, now_ns);
        }
        (self.journal, self.input_log, self.committed) = (None, None, None);
        (self.captured, self.commits) = (None, Commits::default());
        self.published.clear();
        self.pacing.reset();
        self.exchange.end_log();
    }

    /// Whether this node waits for leave to go on alone, and has not got it now.
    pub fn asks_in_vain(&mut self, now_ns: u64) -> bool {
        if !matches!(self.role.state(), RoleState::AskingToGoAlone(_)) {
            return false;
        }
        if self.troubles.hold_leave() {
            return true;
        }
        self.role.apply(Event::LeaveGranted, now_ns);
        false
    }

    /// One step towards the next commit; false when it failed and another standby is wanted.
    #[must_use]
    pub fn step_epoch(&mut self, archive: &mut Archive, now_ns: u64) -> bool {
        if let Some(index) = self.captured.take() {
            if self.troubles.fail_capture() {
                self.exchange.unmark();
                self.pacing.abandoned(now_ns);
                // The role waits for the epoch that completes the fill.
                return self.is_protected() && self.troubles.random.one_in(2);
            }
            self.table = archive[index].state.named();
            self.publish(index, &archive[index]);
        } else if !self.published.is_empty() && !self.troubles.hold_commit() {
            self.commit(now_ns);
        } else {
            match self.role.state() {
                RoleState::Syncing => self.capture(archive, now_ns, true),
                RoleState::Protected if self.pacing.next_start().is_some_and(|at| at <= now_ns) => {
                    self.capture(archive, now_ns, false);
                }
                _ => {}
            }
        }
        true
    }

    fn capture(&mut self, archive: &mut Archive, now_ns: u64, fills: bool) {
        self.pacing.epoch_started(now_ns);
        while !self.service.output.is_empty() {
            self.read_output(now_ns);
        }
        let mut activity = Activity::default();
        let mark = if fills {
            self.table.clear();
            let (log, term) = (self.input_log.take(), self.role.term());
            let mark = self.exchange.mark_fill(log, term, &mut activity);
            self.role.apply(Event::FillMarked, now_ns);
            mark
        } else {
            self.exchange.mark(&mut activity)
        };
        assert!(mark.is_logged);
        let state = self.service.state.clone();
        let table = state.named();
        let left = |from: &Table, to: &Table| {
            let missing = from.iter().filter(|(object, _)| !to.contains_key(object));
            missing.map(|(_, named)| *named).collect::<Vec<_>>()
        };
        let gone = left(&self.table, &table)
            .iter()
            .map(|named| named.tuple)
            .collect();
        let stood = left(&table, &self.table);
        archive.push(Captured {
            state,
            gone,
            stood,
            connections: mark.connections,
            input_position: mark.input_position,
        });
        self.pacing.resumed(now_ns, 50_000, true);
        self.captured = Some(archive.len() - 1);
    }

    fn publish(&mut self, index: usize, epoch: &Captured) {
        let mut room = self.journal.as_mut().unwrap().reserve(8).unwrap();
        room[..8].copy_from_slice(&(index as u64).to_le_bytes());
        let publication = room.publish_epoch(0, 8);
        let change = ConnectionChange {
            stood: epoch.stood.clone(),
            gone: epoch.gone.clone(),
        };
        self.exchange.published(publication.epoch(), change);
        self.published.push_back((index, publication));
    }

    /// Hears of the commit of the oldest published epoch, or of several at once.
    fn commit(&mut self, now_ns: u64) {
        let count = 1 + match self.troubles.late_commits {
            true => self.troubles.random.below(self.published.len()),
            false => 0,
        };
        for (index, publication) in self.published.drain(..count) {
            self.commits.published(publication);
            self.committed = Some(index);
            self.pacing.committed();
        }
        self.role.apply(Event::StandbyReady, now_ns);
        while let Some(committed) = self.commits.next_commit() {
            self.exchange.commit(committed, now_ns);
        }
        let permit = self
            .role
            .release_permit()
            .expect("only a protected primary commits");
        self.exchange
            .release(permit)
            .expect("every epoch was marked");
        if self.exchange.output_waits() {
            self.pacing.output_waits(now_ns);
        }
    }

    /// Takes one frame that may leave, if there is one.
    pub fn send(&mut self, archive: &Archive, now_ns: u64) -> Option<Vec<u8>> {
        if let Some(permit) = self.role.pass_permit() {
            self.exchange.pass(permit);
        }
        let waits = matches!(self.role.state(), RoleState::AskingToGoAlone(_));
        let protected = self.role.pass_permit().is_none();
        let mut released = self.exchange.released();
        let frame = released.peek()?.bytes().to_vec();
        released.pop(now_ns);
        // Asking: what leaves was released before.
        if protected
            && !waits
            && let Some(index) = self.committed
        {
            check_output(&frame, &archive[index].state);
        }
        Some(frame)
    }

    /// The service dies under a protected primary.
    pub fn service_dies(&mut self, fault: Fault, now_ns: u64) {
        let actions = self.role.apply(Event::ServiceDied(fault), now_ns);
        assert_eq!(actions, [Action::HandOver]);
        assert!(self.role.pass_permit().is_none() && self.role.release_permit().is_none());
    }
}

/// I1 and I4: what leaves a protected primary says nothing that the committed state does not hold.
fn check_output(frame: &[u8], committed: &State) {
    let Packet::Tcp(segment) = Packet::parse(frame) else {
        panic!("not a segment")
    };
    for value in segment.payload.chunks_exact(8) {
        let value = value
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte));
        assert!(
            value <= committed.counter,
            "answer {value} left before its epoch"
        );
    }
    let tuple = Tuple::new(segment.source, segment.destination);
    if let Some(expected) = committed.expected(&tuple) {
        let ahead = segment.acknowledgement.wrapping_sub(expected) as i32;
        // Far ahead: a later connection from the same port, still in the listener's queue.
        assert!(
            ahead <= 0 || ahead > 900,
            "an acknowledgement left before its epoch"
        );
    }
}

/// Tells flows of a committed epoch.
fn follow(flows: &mut Flows, epoch: &Captured, first: bool, now_ns: u64) {
    let Captured {
        gone,
        stood,
        connections: Connections { accepted, .. },
        ..
    } = epoch;
    let input_position = epoch.input_position;
    if first {
        flows.commit_survey(stood, accepted, input_position, now_ns);
    } else {
        flows.commit(
            TableChange {
                gone,
                stood,
                accepted,
                input_position,
            },
            now_ns,
        );
    }
}

pub struct Standby {
    pub role: Role,
    flows: Flows,
    journal: JournalReader,
    input_log: InputLogReader,
    applied: Option<usize>,
    position: u64,
    troubles: Troubles,
}

impl Standby {
    /// Whether a takeover would find a whole state.
    pub fn has_an_epoch(&self) -> bool {
        self.applied.is_some() || self.journal.is_ready()
    }

    /// Takes one record of input; false when there is none.
    pub fn step_input(&mut self, now_ns: u64) -> bool {
        let Some((position, frame)) = self.input_log.peek().unwrap() else {
            return false;
        };
        self.flows.input(position, frame, now_ns);
        self.position = position + 1;
        self.input_log.consume().unwrap();
        true
    }

    /// Applies one epoch, after the input before its mark; false when there is none.
    pub fn step_epoch(&mut self, archive: &Archive, now_ns: u64) -> bool {
        if !self.journal.is_ready() {
            return false;
        }
        // What was published with or before the epoch is in the input log by now.
        while self.step_input(now_ns) {}
        let entry = self.journal.peek().unwrap().unwrap();
        let index = entry
            .structure
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | *byte as usize);
        let first = self.applied.is_none();
        self.flows
            .adopt_known(&archive[index].connections.known, now_ns);
        assert_eq!(entry.epoch.unwrap().sequence == 1, first);
        follow(&mut self.flows, &archive[index], first, now_ns);
        self.applied = Some(index);
        self.journal.consume().unwrap();
        if first {
            self.role.apply(Event::StandbyReady, now_ns);
        }
        true
    }

    /// Everything that the dead primary left is read, and the service goes on here.
    pub fn take_over(mut self, event: Event, archive: &Archive, now_ns: u64) -> Primary {
        while self.step_epoch(archive, now_ns) {}
        while self.step_input(now_ns) {}
        assert_eq!(self.role.apply(event, now_ns), [Action::AskLeave]);
        self.role.apply(Event::LeaveGranted, now_ns);
        assert_eq!(self.role.state(), RoleState::TakingOver);
        let committed = &archive[self.applied.expect("killed without a standby")];
        let mut service =
            Service::restored(committed.state.clone(), |tuple| self.flows.client(tuple));
        let replay: Vec<(u64, Vec<u8>)> = self
            .flows
            .replay_after_takeover()
            .iter()
            .map(|(position, frame)| (*position, frame.to_vec()))
            .collect();
        self.flows.became_primary(&[]);
        for (position, frame) in replay {
            match self.flows.answer_for_closed(&frame) {
                LatePacket::ForTheKernel => service.input(&frame),
                LatePacket::Reopens(reset) => {
                    service.input(reset.frame());
                    service.input(&frame);
                }
                LatePacket::Swallow => {}
                LatePacket::Answer(answer) => service.output.push_back(answer.frame().to_vec()),
            }
            // What is kept from before the mark is of connections that have not ended.
            assert!(position >= committed.input_position || service.ghosts == 0);
        }
        assert!(self.role.pass_permit().is_none() && self.role.release_permit().is_none());
        self.role.apply(Event::TakeoverDone, now_ns);
        let input = Input {
            position: self.position.max(committed.input_position),
            flows: self.flows,
        };
        Primary::of(self.role, service, input, self.troubles)
    }
}
