//! What a node is to its service, and what it may therefore do with output.
//!
//! ```text
//!  primary                                              standby
//!  -------                                              -------
//!  Starting                                             Filling <---------------+
//!     | Launched                                        |  | StandbyReady       |
//!     v                                                 |  v                    |
//!  Unprotected <--------------------+      PrimaryDied, | Warm                  |
//!     | FillBegun                   |     service alive: |  | PrimaryDied,       |
//!     v                             |              adopt |  | TakeoverOrdered    |
//!  Syncing ---> StandbyDied --------+                   v  v                    |
//!     | FillMarked                  |   TakeoverDone  TakingOver                |
//!     v                             +<------------------+  | ServiceDied        |
//!  Sealing ---> StandbyDied --------+                      v                    |
//!     | StandbyReady                |                    Failed                 |
//!     v                             |                                           |
//!  Protected -> StandbyDied, Forked +       (a primary that took over starts a  |
//!     | ServiceDied                          standby, which begins here) -------+
//!     v                                                (a Forked primary fills none, yet has one)
//!  Retired  (the standby goes on)        any state: HigherTermSeen -> Retired
//!                                        any primary state: ServiceEnded -> Ended
//! ```
//!
//! A service that dies while it is not `Protected` is `Failed`: there is nothing to go on from.
//! Only `Unprotected`, `Syncing` and an end give a [`PassPermit`]; only `Protected` gives a
//! [`ReleasePermit`]. Both borrow the role, so no permit outlives the state that gave it (I3).

use crate::give_up::{Death, GiveUp};
use std::marker::PhantomData;

/// Why a service goes on without a standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It has just been started, or just taken over, and no standby is there yet.
    NoStandbyYet,
    StandbyDied,
    /// Its tree has grown to something that cannot be replicated; `SingleAgain` ends that.
    Forked,
    /// It holds something that cannot be replicated; tried again from time to time.
    Unfit,
    /// Its primary died while it was unprotected, and this node holds it now.
    Adopted,
}

/// Why a service is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It died while no complete standby existed.
    DiedUnprotected,
    /// Replica after replica died soon after going live.
    GaveUp,
    /// The replica could not be brought to life.
    TakeoverFailed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Starting,
    Unprotected(Reason),
    /// A standby is being filled while the service runs and its output passes.
    Syncing,
    /// The mark of the epoch that completes the fill is taken, the epoch not yet committed.
    Sealing,
    Protected,
    /// A standby that has no complete state yet.
    Filling,
    /// A standby that has.
    Warm,
    TakingOver,
    /// The service ended by itself.
    Ended,
    Failed(Failure),
    /// Another node is the primary now.
    Retired,
}

impl State {
    /// The word that `unbroken status` shows.
    pub fn name(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Syncing | State::Sealing | State::Filling => "syncing",
            State::Protected | State::Warm => "protected",
            State::Unprotected(_) => "unprotected",
            State::TakingOver => "taking-over",
            State::Ended | State::Retired => "stopped",
            State::Failed(_) => "failed",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The service runs.
    Launched,
    /// The primary has begun to fill a standby.
    FillBegun,
    /// The primary has stopped the service for the epoch that completes the fill: output read from
    /// now on belongs to later epochs.
    FillMarked,
    /// The epoch that completes the fill is committed (primary) or applied (standby).
    StandbyReady,
    StandbyDied,
    /// The service died without being asked to.
    ServiceDied(Death),
    /// The service ended: it exited by itself, or was stopped on demand.
    ServiceEnded,
    /// The primary process is gone. `service_alive` when the service survived it, as an
    /// unprotected one does.
    PrimaryDied {
        service_alive: bool,
    },
    /// The primary is alive and hands over: its service died, or the user asked for a switchover.
    TakeoverOrdered(Option<Death>),
    /// The replica runs.
    TakeoverDone,
    /// The replica could not be brought to life.
    TakeoverFailed,
    /// The tree is no longer one that can be replicated.
    Forked,
    /// The tree can be replicated again.
    SingleAgain,
    /// The tree holds something that no replica can have.
    Unfit,
    /// Somebody acts under this term.
    TermSeen(u64),
}

/// What the node is to do now, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Have a standby that nothing has been sent to, and no other: start one unless there is one.
    StartStandby,
    StopStandby,
    /// Bring the replica to life under this term.
    GoLive {
        term: u64,
    },
    /// Take hold of the running service under this term.
    Adopt {
        term: u64,
    },
    /// Let all output go that is held, and what comes ([`Role::pass_permit`]).
    PassOutput,
    /// From now on output waits for its epoch's commit.
    HoldOutput,
    /// Tell the standby to take over, and why.
    OrderTakeover(Death),
    /// End this process; another one is the primary.
    Retire,
    /// End the service and say why.
    Fail(Failure),
    /// End this process with the service's exit code.
    End,
}

/// Leave to let output go without a commit. Only [`Role::pass_permit`] makes one.
#[derive(Debug)]
pub struct PassPermit<'role>(PhantomData<&'role Role>);

/// Leave to let output go by commits of one term. Only [`Role::release_permit`] makes one.
#[derive(Debug)]
pub struct ReleasePermit<'role> {
    term: u64,
    role: PhantomData<&'role Role>,
}

impl ReleasePermit<'_> {
    pub fn term(&self) -> u64 {
        self.term
    }
}

/// The state machine of one node.
#[derive(Debug)]
pub struct Role {
    state: State,
    term: u64,
    give_up: GiveUp,
}

impl Role {
    /// The node that starts a service. Its term is 1.
    pub fn primary(give_up: GiveUp) -> Self {
        Self {
            state: State::Starting,
            term: 1,
            give_up,
        }
    }

    /// A node that will follow the primary of `term`.
    pub fn standby(term: u64, give_up: GiveUp) -> Self {
        Self {
            state: State::Filling,
            term,
            give_up,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// The term under which this node acts or follows; it never falls.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// What a new standby must be told ([`GiveUp::continued`]).
    pub fn give_up(&self) -> GiveUp {
        self.give_up
    }

    /// Leave to pass output unprotected, while that is what this node is to do. The last words of
    /// a service that is over need no commit either: nobody will go on in its place.
    pub fn pass_permit(&self) -> Option<PassPermit<'_>> {
        let over = matches!(self.state, State::Ended | State::Failed(_));
        let alone = matches!(self.state, State::Unprotected(_) | State::Syncing);
        (over || alone).then_some(PassPermit(PhantomData))
    }

    /// Leave to release output by commits, while this node is a protected primary.
    pub fn release_permit(&self) -> Option<ReleasePermit<'_>> {
        (self.state == State::Protected).then_some(ReleasePermit {
            term: self.term,
            role: PhantomData,
        })
    }

    /// Takes one event at `now_ns`; an event that means nothing in this state changes nothing.
    pub fn apply(&mut self, event: Event, now_ns: u64) -> Vec<Action> {
        if self.is_over() {
            return Vec::new();
        }
        match event {
            Event::TermSeen(term) if term > self.term => {
                self.term = term;
                self.become_(State::Retired, [Action::HoldOutput, Action::Retire])
            }
            Event::ServiceEnded if self.is_primary() => {
                self.become_(State::Ended, [Action::StopStandby, Action::End])
            }
            Event::ServiceDied(death) => self.service_died(death, now_ns),
            _ if self.is_primary() => self.as_primary(event, now_ns),
            _ => self.as_standby(event, now_ns),
        }
    }

    fn as_primary(&mut self, event: Event, now_ns: u64) -> Vec<Action> {
        use State::{Protected, Sealing, Starting, Syncing, Unprotected};
        match (self.state, event) {
            (Starting, Event::Launched) => {
                self.give_up.went_live(now_ns);
                self.unprotected(Reason::NoStandbyYet, [Action::StartStandby])
            }
            (Unprotected(reason), Event::FillBegun) if reason != Reason::Forked => {
                self.become_(Syncing, [])
            }
            (Syncing, Event::FillMarked) => self.become_(Sealing, [Action::HoldOutput]),
            (Sealing, Event::StandbyReady) => self.become_(Protected, []),
            (Syncing | Sealing | Protected, Event::StandbyDied) => {
                self.unprotected(Reason::StandbyDied, [Action::StartStandby])
            }
            // One that died before its fill began is simply replaced.
            (Unprotected(reason), Event::StandbyDied) if reason != Reason::Forked => {
                self.unprotected(Reason::StandbyDied, [Action::StartStandby])
            }
            // A standby there must be all the same: it holds on to the service when this node dies.
            (Unprotected(Reason::Forked), Event::StandbyDied) => {
                self.become_(self.state, [Action::StartStandby])
            }
            (Unprotected(_) | Syncing | Sealing | Protected, Event::Forked) => {
                self.unprotected(Reason::Forked, [Action::StartStandby])
            }
            (Unprotected(Reason::Forked), Event::SingleAgain) => {
                self.unprotected(Reason::NoStandbyYet, [Action::StartStandby])
            }
            (Unprotected(reason), Event::Unfit) if reason != Reason::Forked => {
                self.unprotected(Reason::Unfit, [Action::StartStandby])
            }
            (Syncing | Sealing | Protected, Event::Unfit) => {
                self.unprotected(Reason::Unfit, [Action::StartStandby])
            }
            (Protected, Event::TakeoverOrdered(None)) => self.become_(
                State::Retired,
                [
                    Action::HoldOutput,
                    Action::OrderTakeover(Death::Killed),
                    Action::Retire,
                ],
            ),
            _ => Vec::new(),
        }
    }

    fn as_standby(&mut self, event: Event, now_ns: u64) -> Vec<Action> {
        use State::{Filling, TakingOver, Warm};
        match (self.state, event) {
            (Filling, Event::StandbyReady) => self.become_(Warm, []),
            // A warm standby takes over instead: of a protected service that outlived its primary
            // for a moment, the tail of standard output may be gone with the primary.
            (
                Filling,
                Event::PrimaryDied {
                    service_alive: true,
                },
            ) => {
                self.term += 1;
                self.give_up.went_live(now_ns);
                let mut actions = vec![Action::Adopt { term: self.term }];
                actions.extend(self.unprotected(Reason::Adopted, [Action::StartStandby]));
                actions
            }
            (Filling, Event::PrimaryDied { .. } | Event::TakeoverOrdered(_)) => {
                self.fail(Failure::DiedUnprotected)
            }
            (Warm, Event::PrimaryDied { .. }) => self.take_over(Death::Killed, now_ns),
            (Warm, Event::TakeoverOrdered(death)) => {
                self.take_over(death.unwrap_or(Death::Killed), now_ns)
            }
            (TakingOver, Event::TakeoverDone) => {
                self.give_up.went_live(now_ns);
                self.unprotected(Reason::NoStandbyYet, [Action::StartStandby])
            }
            (TakingOver, Event::TakeoverFailed) => self.fail(Failure::TakeoverFailed),
            _ => Vec::new(),
        }
    }

    fn service_died(&mut self, death: Death, now_ns: u64) -> Vec<Action> {
        match self.state {
            // The standby counts the death, and decides whether to give up.
            State::Protected => self.become_(
                State::Retired,
                [
                    Action::HoldOutput,
                    Action::OrderTakeover(death),
                    Action::Retire,
                ],
            ),
            State::Filling | State::Warm => Vec::new(),
            _ => {
                let too_often = self.give_up.died(death, now_ns);
                self.fail(if too_often {
                    Failure::GaveUp
                } else {
                    Failure::DiedUnprotected
                })
            }
        }
    }

    fn take_over(&mut self, death: Death, now_ns: u64) -> Vec<Action> {
        if self.give_up.died(death, now_ns) {
            return self.fail(Failure::GaveUp);
        }
        self.term += 1;
        let term = self.term;
        self.become_(State::TakingOver, [Action::GoLive { term }])
    }

    /// Output passes last: by then no standby is left that could go on from an older state (I3).
    fn unprotected<const N: usize>(&mut self, reason: Reason, first: [Action; N]) -> Vec<Action> {
        let mut actions = self.become_(State::Unprotected(reason), first);
        actions.push(Action::PassOutput);
        actions
    }

    fn fail(&mut self, failure: Failure) -> Vec<Action> {
        self.become_(
            State::Failed(failure),
            [Action::StopStandby, Action::Fail(failure)],
        )
    }

    fn become_<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }

    fn is_over(&self) -> bool {
        matches!(self.state, State::Ended | State::Failed(_) | State::Retired)
    }

    fn is_primary(&self) -> bool {
        use State::{Protected, Sealing, Starting, Syncing, Unprotected};
        matches!(
            self.state,
            Starting | Unprotected(_) | Syncing | Sealing | Protected
        )
    }
}

#[cfg(test)]
mod tests;
