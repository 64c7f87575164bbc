//! A primary and a standby, one small step at a time, so that a kill can come between any two.

use crate::service::{Service, State};
use std::collections::BTreeMap;
use unbroken_core::epoch::Publication;
use unbroken_core::give_up::{GiveUp, GiveUpLimits};
use unbroken_core::pacing::{Pacing, PacingLimits};
use unbroken_core::role::{Action, Event, Role, State as RoleState};
use unbroken_link::{InputLogReader, InputLogWriter, JournalReader, JournalWriter, LocalLink};
use unbroken_wire::Tuple;
use unbroken_wire::craft::answers_primer;
use unbroken_wire::flows::{
    FlowLimits, Flows, KnownConnection, LatePacket, NamedConnection, TableChange,
};
use unbroken_wire::gate::{Gate, OutputKind};
use unbroken_wire::packet::{FRAME_BYTES_MAX, Packet};

/// An epoch as captured; the journal carries its index here.
#[derive(Clone, Debug)]
pub struct Captured {
    pub state: State,
    pub gone: Vec<Tuple>,
    pub stood: Vec<NamedConnection>,
    pub accepted: Vec<NamedConnection>,
    /// Of an epoch that completes a fill.
    pub closed: Vec<KnownConnection>,
    pub input_position: u64,
}

/// Every epoch that was ever captured.
pub type Archive = Vec<Captured>;

/// Connections by object.
type Table = BTreeMap<u64, NamedConnection>;

/// What the primary is in the middle of.
enum Stage {
    Idle,
    /// The service is stopped and its mark taken.
    Captured(usize),
    Published(usize, Publication),
}

pub struct Primary {
    pub role: Role,
    pub service: Service,
    gate: Gate,
    pacing: Pacing,
    pub flows: Flows,
    journal: Option<JournalWriter>,
    input_log: Option<InputLogWriter>,
    position: u64,
    stage: Stage,
    /// The table of the last captured epoch.
    table: Table,
    /// The newest committed epoch of the present standby.
    committed: Option<usize>,
    released_term: u64,
}

impl Primary {
    pub fn first() -> Self {
        let mut role = Role::primary(GiveUp::new(GiveUpLimits::default()));
        role.apply(Event::Launched, 0);
        Self::of(
            role,
            Service::default(),
            Flows::of_primary(FlowLimits::default()),
            0,
        )
    }

    fn of(role: Role, service: Service, flows: Flows, position: u64) -> Self {
        let term = role.term();
        Self {
            role,
            service,
            gate: Gate::new(1 << 20, term),
            pacing: Pacing::new(PacingLimits::default()),
            flows,
            journal: None,
            input_log: None,
            position,
            stage: Stage::Idle,
            table: BTreeMap::new(),
            committed: None,
            released_term: term,
        }
    }

    pub fn is_protected(&self) -> bool {
        self.role.state() == RoleState::Protected
    }

    /// A client's packet reaches this node: the log first, then the service.
    pub fn input(&mut self, frame: &[u8], now_ns: u64) {
        let mut reset = None;
        match self.flows.answer_for_closed(frame) {
            LatePacket::ForTheKernel => {}
            LatePacket::Reopens(first) => reset = Some(first),
            LatePacket::Swallow => return,
            LatePacket::Answer(answer) => {
                assert!(self.gate.hold(OutputKind::Packet, now_ns, answer.frame()));
                self.pacing.output_waits(now_ns);
                return;
            }
        }
        let position = self.position;
        if self.logs_input()
            && let Some(log) = &mut self.input_log
            && !log.append(position, frame)
        {
            return;
        }
        self.position += 1;
        self.flows.input(position, frame, now_ns);
        if let Some(reset) = reset {
            self.service.input(reset.frame());
        }
        self.service.input(frame);
        self.pacing.input_arrived(now_ns);
    }

    /// Before the mark of the first epoch, the standby needs none of the input.
    fn logs_input(&self) -> bool {
        matches!(self.role.state(), RoleState::Sealing | RoleState::Protected)
    }

    /// Reads one frame of output.
    pub fn read_output(&mut self, now_ns: u64) {
        let Some(frame) = self.service.output.pop_front() else {
            return;
        };
        self.flows.output(&frame, now_ns);
        let take = |room: &mut [u8]| -> Result<_, std::convert::Infallible> {
            room[..frame.len()].copy_from_slice(&frame);
            Ok(Some(frame.len()))
        };
        let held = self
            .gate
            .hold_with(OutputKind::Packet, now_ns, FRAME_BYTES_MAX, take)
            .unwrap();
        assert!(held.is_some());
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
            position: self.position,
        }
    }

    pub fn standby_died(&mut self, now_ns: u64) {
        self.role.apply(Event::StandbyDied, now_ns);
        (self.journal, self.input_log, self.committed) = (None, None, None);
        self.stage = Stage::Idle;
        self.pacing.reset();
        self.gate.restart(self.role.term());
    }

    /// One step towards the next commit.
    pub fn step_epoch(&mut self, archive: &mut Archive, now_ns: u64) {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Idle => match self.role.state() {
                RoleState::Syncing => {
                    self.role.apply(Event::FillMarked, now_ns);
                    self.capture(archive, now_ns, true)
                }
                RoleState::Protected if self.pacing.next_start().is_some_and(|at| at <= now_ns) => {
                    self.capture(archive, now_ns, false)
                }
                _ => Stage::Idle,
            },
            Stage::Captured(index) => {
                let mut room = self.journal.as_mut().unwrap().reserve(8).unwrap();
                room[..8].copy_from_slice(&(index as u64).to_le_bytes());
                Stage::Published(index, room.publish_epoch(0, 8))
            }
            Stage::Published(index, publication) => {
                self.commit(index, publication, &archive[index], now_ns);
                Stage::Idle
            }
        };
    }

    fn capture(&mut self, archive: &mut Archive, now_ns: u64, fills: bool) -> Stage {
        self.pacing.epoch_started(now_ns);
        while !self.service.output.is_empty() {
            self.read_output(now_ns);
        }
        if fills {
            self.gate.restart(self.role.term());
            self.table.clear();
            let log = self.input_log.as_mut().unwrap();
            for (position, frame) in self.flows.retained() {
                assert!(log.append(position, frame));
            }
        }
        self.gate.close_epoch();
        let mut accepted = Vec::new();
        self.flows.take_accepted(&mut accepted);
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
        let closed = if fills {
            self.flows.known()
        } else {
            Vec::new()
        };
        self.table = table;
        let input_position = self.position;
        archive.push(Captured {
            state,
            gone,
            stood,
            accepted,
            closed,
            input_position,
        });
        self.pacing.resumed(now_ns, 50_000, true);
        Stage::Captured(archive.len() - 1)
    }

    fn commit(&mut self, index: usize, publication: Publication, epoch: &Captured, now_ns: u64) {
        self.role.apply(Event::StandbyReady, now_ns);
        let committed = publication.committed();
        let permit = self
            .role
            .release_permit()
            .expect("only a protected primary commits");
        self.gate
            .release(committed, permit)
            .expect("every epoch was closed");
        self.pacing.committed(now_ns);
        if self.gate.open_epoch_has_output() {
            self.pacing.output_waits(now_ns);
        }
        follow(&mut self.flows, epoch, self.committed.is_none(), now_ns);
        self.committed = Some(index);
    }

    /// Takes one frame that may leave, if there is one.
    pub fn send(&mut self, archive: &Archive, now_ns: u64) -> Option<Vec<u8>> {
        if let Some(permit) = self.role.pass_permit() {
            self.gate.pass(permit);
        }
        let protected = self.role.pass_permit().is_none();
        let mut released = self.gate.released();
        let frame = released.peek()?.bytes().to_vec();
        released.pop(now_ns);
        assert!(self.released_term <= self.role.term());
        if protected && let Some(index) = self.committed {
            check_output(&frame, &archive[index].state);
        }
        Some(frame)
    }

    /// The service dies under a protected primary.
    pub fn service_dies(&mut self, death: unbroken_core::give_up::Death, now_ns: u64) {
        let actions = self.role.apply(Event::ServiceDied(death), now_ns);
        assert!(actions.contains(&Action::Retire));
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
    assert!(!answers_primer(
        frame,
        Tuple::new(segment.destination, segment.source)
    ));
}

/// Tells flows of a committed epoch.
fn follow(flows: &mut Flows, epoch: &Captured, first: bool, now_ns: u64) {
    let Captured {
        gone,
        stood,
        accepted,
        input_position,
        ..
    } = epoch;
    let input_position = *input_position;
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
        self.flows.adopt_known(&archive[index].closed, now_ns);
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
        let actions = self.role.apply(event, now_ns);
        assert_eq!(
            actions,
            [Action::GoLive {
                term: self.role.term()
            }]
        );
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
        let position = self.position.max(committed.input_position);
        Primary::of(self.role, service, self.flows, position)
    }
}
