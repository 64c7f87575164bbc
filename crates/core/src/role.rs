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
//!  Syncing ---> StandbyDied --------+                   |  v                    |
//!     | FillMarked                  |                   | AskingToTakeOver      |
//!     v                             |                   v  | LeaveGranted        |
//!  Sealing ---> StandbyDied ---+    +<------------------+  v                    |
//!     | StandbyReady           |    |   TakeoverDone  TakingOver                |
//!     v                        |    +<------------------+  | ServiceDied        |
//!  Protected -> StandbyDied,   |    | LeaveGranted          v                    |
//!     |         Forked, Unfit -+--> AskingToGoAlone     Failed                  |
//!     | ServiceDied                                                             |
//!     v                                 (a primary that took over starts a      |
//!  Retired  (the standby goes on)        standby, which begins here) -----------+
//!                               (a Forked primary fills none, yet has one)
//!
//!  either state that asks: LeaveRefused -> Retired;  any primary state: ServiceEnded -> Ended
//! ```
//!
//! A service that dies while it is not `Protected` is `Failed`: there is nothing to go on from.
//! Only `Unprotected`, `Syncing` and an end give a [`PassPermit`]; only `Protected` gives a
//! [`ReleasePermit`]. Both borrow the role, so no permit outlives the state that gave it (I3).
//!
//! From `Sealing` on there are two nodes that could speak for the service, so neither goes on alone
//! before an arbiter has said that the other does not: [`Action::AskLeave`]. Its answer may come
//! later, and output waits for it. On one machine the kernel is the arbiter, and answers at once: a
//! standby is killed and has ended, a primary's pidfd says that it has, or it has said itself that it
//! releases nothing more.

use crate::give_up::{Fault, GiveUp};
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
pub enum RoleState {
    Starting,
    Unprotected(Reason),
    /// A standby is being filled while the service runs and its output passes.
    Syncing,
    /// The mark of the epoch that completes the fill is taken, the epoch not yet committed.
    Sealing,
    Protected,
    /// A primary without a standby that it knows of, before it may go on alone, for this reason.
    AskingToGoAlone(Reason),
    /// A standby that has no complete state yet.
    Filling,
    /// A standby that has.
    Warm,
    /// A standby whose primary is gone, before it may take over.
    AskingToTakeOver,
    TakingOver,
    /// The service ended by itself.
    Ended,
    Failed(Failure),
    /// Another node is the primary now.
    Retired,
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
    ServiceDied(Fault),
    /// The service ended: it exited by itself, or was stopped on demand.
    ServiceEnded,
    /// The primary process is gone. `service_alive` when the service survived it, as an
    /// unprotected one does.
    PrimaryDied {
        service_alive: bool,
    },
    /// The primary is alive and hands over: its service died, or the user asked for a switchover.
    TakeoverOrdered(Option<Fault>),
    /// The replica runs.
    TakeoverDone,
    /// The tree is no longer one that can be replicated.
    Forked,
    /// The tree can be replicated again.
    SingleAgain,
    /// The tree holds something that no replica can have.
    Unfit,
    /// The arbiter has seen to it that no other node goes on with the service.
    LeaveGranted,
    /// Another node goes on with the service, under this term.
    LeaveRefused {
        term: u64,
    },
}

/// What the node is to do now, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Have a standby that nothing has been sent to, and no other: start one unless there is one.
    StartStandby,
    StopStandby,
    /// Ask the arbiter for leave to go on with the service alone: the answer is an event. Whoever
    /// answers for it sees to it that the other node releases nothing more, and never will.
    AskLeave,
    /// Let all output go that is held, and what comes ([`Role::pass_permit`]).
    PassOutput,
    /// Have the standby take over, and end this process.
    HandOver,
    /// Another node is the primary: end this process, and what it holds of the service.
    Retire,
    /// End the service and say why.
    Fail(Failure),
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
    state: RoleState,
    term: u64,
    give_up: GiveUp,
}

impl Role {
    /// The node that starts a service. Its term is 1.
    pub fn primary(give_up: GiveUp) -> Self {
        Self {
            state: RoleState::Starting,
            term: 1,
            give_up,
        }
    }

    /// A node that will follow the primary of `term`.
    pub fn standby(term: u64, give_up: GiveUp) -> Self {
        Self {
            state: RoleState::Filling,
            term,
            give_up,
        }
    }

    pub fn state(&self) -> RoleState {
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
        let over = matches!(self.state, RoleState::Ended | RoleState::Failed(_));
        let alone = matches!(self.state, RoleState::Unprotected(_) | RoleState::Syncing);
        (over || alone).then_some(PassPermit(PhantomData))
    }

    /// Leave to release output by commits, while this node is a protected primary.
    pub fn release_permit(&self) -> Option<ReleasePermit<'_>> {
        (self.state == RoleState::Protected).then_some(ReleasePermit {
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
            Event::ServiceEnded if self.is_primary() => {
                self.become_(RoleState::Ended, [Action::StopStandby])
            }
            Event::ServiceDied(fault) => self.service_died(fault, now_ns),
            _ if self.is_primary() => self.as_primary(event, now_ns),
            _ => self.as_standby(event, now_ns),
        }
    }

    fn as_primary(&mut self, event: Event, now_ns: u64) -> Vec<Action> {
        use RoleState::{AskingToGoAlone, Protected, Sealing, Starting, Syncing, Unprotected};
        match (self.state, event) {
            (Starting, Event::Launched) => {
                self.give_up.went_live(now_ns);
                self.unprotected(Reason::NoStandbyYet)
            }
            (Unprotected(reason), Event::FillBegun) if reason != Reason::Forked => {
                self.become_(Syncing, [])
            }
            (Syncing, Event::FillMarked) => self.become_(Sealing, []),
            (Sealing, Event::StandbyReady) => self.become_(Protected, []),
            // A standby there must be all the same: it holds on to the service when this node dies.
            (Unprotected(Reason::Forked), Event::StandbyDied) => {
                self.become_(self.state, [Action::StartStandby])
            }
            (Unprotected(Reason::Forked), Event::Unfit) => Vec::new(),
            (Unprotected(Reason::Forked), Event::SingleAgain) => {
                self.unprotected(Reason::NoStandbyYet)
            }
            (AskingToGoAlone(reason), Event::LeaveGranted) => self.unprotected(reason),
            (AskingToGoAlone(_), Event::LeaveRefused { term }) => self.retire(term),
            (AskingToGoAlone(Reason::Forked), Event::SingleAgain) => {
                self.become_(AskingToGoAlone(Reason::NoStandbyYet), [])
            }
            (Protected, Event::TakeoverOrdered(None)) => {
                self.become_(RoleState::Retired, [Action::HandOver])
            }
            (_, Event::StandbyDied) => self.go_on_alone(Reason::StandbyDied),
            (_, Event::Forked) => self.go_on_alone(Reason::Forked),
            (_, Event::Unfit) => self.go_on_alone(Reason::Unfit),
            _ => Vec::new(),
        }
    }

    /// Protection ends. A standby whose fill was not marked has nothing to go on from: it is simply
    /// replaced.
    fn go_on_alone(&mut self, reason: Reason) -> Vec<Action> {
        use RoleState::{AskingToGoAlone, Protected, Sealing, Syncing, Unprotected};
        match self.state {
            Unprotected(_) | Syncing => self.unprotected(reason),
            Sealing | Protected => self.become_(AskingToGoAlone(reason), [Action::AskLeave]),
            AskingToGoAlone(before) if before != Reason::Forked => {
                self.become_(AskingToGoAlone(reason), [])
            }
            _ => Vec::new(),
        }
    }

    fn as_standby(&mut self, event: Event, now_ns: u64) -> Vec<Action> {
        use RoleState::{AskingToTakeOver, Filling, TakingOver, Warm};
        match (self.state, event) {
            (Filling, Event::StandbyReady) => self.become_(Warm, []),
            // A warm standby takes over instead: of a protected service that outlived its primary
            // for a moment, the tail of standard output may be gone with the primary. Nobody else
            // could have gone on, so no leave is needed.
            (
                Filling,
                Event::PrimaryDied {
                    service_alive: true,
                },
            ) => {
                self.term += 1;
                self.give_up.went_live(now_ns);
                self.unprotected(Reason::Adopted)
            }
            (Filling, Event::PrimaryDied { .. } | Event::TakeoverOrdered(_)) => {
                self.fail(Failure::DiedUnprotected)
            }
            (Warm, Event::PrimaryDied { .. }) => self.ask_to_take_over(Fault::External, now_ns),
            (Warm, Event::TakeoverOrdered(fault)) => {
                self.ask_to_take_over(fault.unwrap_or(Fault::External), now_ns)
            }
            (AskingToTakeOver, Event::LeaveGranted) => {
                self.term += 1;
                self.become_(TakingOver, [])
            }
            (AskingToTakeOver, Event::LeaveRefused { term }) => self.retire(term),
            (TakingOver, Event::TakeoverDone) => {
                self.give_up.went_live(now_ns);
                self.unprotected(Reason::NoStandbyYet)
            }
            _ => Vec::new(),
        }
    }

    fn service_died(&mut self, fault: Fault, now_ns: u64) -> Vec<Action> {
        match self.state {
            // The standby counts the death, and decides whether to give up.
            RoleState::Protected => self.become_(RoleState::Retired, [Action::HandOver]),
            RoleState::Filling | RoleState::Warm | RoleState::AskingToTakeOver => Vec::new(),
            _ => {
                let too_often = self.give_up.died(fault, now_ns);
                self.fail(if too_often {
                    Failure::GaveUp
                } else {
                    Failure::DiedUnprotected
                })
            }
        }
    }

    fn ask_to_take_over(&mut self, fault: Fault, now_ns: u64) -> Vec<Action> {
        if self.give_up.died(fault, now_ns) {
            return self.fail(Failure::GaveUp);
        }
        self.become_(RoleState::AskingToTakeOver, [Action::AskLeave])
    }

    /// Another node has gone on under `term`.
    fn retire(&mut self, term: u64) -> Vec<Action> {
        self.term = self.term.max(term);
        self.become_(RoleState::Retired, [Action::Retire])
    }

    /// Output passes last: by then no standby is left that could go on from an older state (I3).
    fn unprotected(&mut self, reason: Reason) -> Vec<Action> {
        self.become_(
            RoleState::Unprotected(reason),
            [Action::StartStandby, Action::PassOutput],
        )
    }

    fn fail(&mut self, failure: Failure) -> Vec<Action> {
        self.become_(
            RoleState::Failed(failure),
            [Action::StopStandby, Action::Fail(failure)],
        )
    }

    fn become_<const N: usize>(&mut self, state: RoleState, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }

    fn is_over(&self) -> bool {
        matches!(
            self.state,
            RoleState::Ended | RoleState::Failed(_) | RoleState::Retired
        )
    }

    fn is_primary(&self) -> bool {
        use RoleState::{AskingToGoAlone, Protected, Sealing, Starting, Syncing, Unprotected};
        matches!(
            self.state,
            Starting | Unprotected(_) | Syncing | Sealing | Protected | AskingToGoAlone(_)
        )
    }
}

#[cfg(test)]
mod tests;
