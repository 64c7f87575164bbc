//! Committed epochs: which connections stand, which are gone, which input is in the state.

use super::connection::{Connection, Flow, Phase};
use super::{Flows, NamedConnection};
use crate::Tuple;
use std::collections::HashSet;

/// How the descriptor table of an epoch differs from that of the epoch before, in connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableChange<'a> {
    /// Connections whose last descriptor is gone; by object, so a connection that still stands is
    /// not among them, and one whose client has come back from the same port is.
    pub gone: &'a [Tuple],
    /// Connections that now have one.
    pub stood: &'a [NamedConnection],
    /// What the primary's [`Flows::take_accepted`] gave at the epoch's mark. Those that are not in
    /// `stood` came and went between two epochs.
    pub accepted: &'a [NamedConnection],
    /// [`unbroken_image::Mark::input_position`] of the epoch.
    pub input_position: u64,
}

impl Flows {
    /// Takes in a committed epoch: drops the recent input that it contains, and the packets kept
    /// for connections that now stand in the table.
    pub fn commit(&mut self, change: TableChange<'_>, now_ns: u64) {
        for tuple in change.gone {
            self.close(*tuple, now_ns);
        }
        for named in change.accepted {
            self.close_accepted(*named, now_ns);
        }
        for named in change.stood {
            self.stand(*named);
        }
        self.advance_to(change.input_position, now_ns);
    }

    /// Takes in the committed epoch that completes a fill, whose table is complete: a connection
    /// that is not in it has been closed, or waits.
    pub fn commit_survey(
        &mut self,
        standing: &[NamedConnection],
        accepted: &[NamedConnection],
        input_position: u64,
        now_ns: u64,
    ) {
        let listed: HashSet<Tuple> = standing.iter().map(|named| named.tuple).collect();
        let gone: Vec<Tuple> = self
            .flows
            .iter()
            .filter(|(tuple, flow)| {
                let known = flow.current.phase == Phase::Standing || flow.current.accepted;
                known && !listed.contains(*tuple)
            })
            .map(|(tuple, _)| *tuple)
            .collect();
        let change = TableChange {
            gone: &gone,
            stood: standing,
            accepted,
            input_position,
        };
        self.commit(change, now_ns);
    }

    fn advance_to(&mut self, input_position: u64, now_ns: u64) {
        self.input_position = input_position;
        if let Some(recent) = &mut self.recent {
            while recent
                .front()
                .is_some_and(|frame| frame.stamp < input_position)
            {
                recent.pop();
            }
        }
        self.fade(now_ns);
    }

    /// A connection that left no descriptor, unless it turns out to stand in the table.
    fn close_accepted(&mut self, named: NamedConnection, now_ns: u64) {
        let Some(flow) = self.flows.get_mut(&named.tuple) else {
            return;
        };
        let replaced = flow
            .next
            .as_ref()
            .is_some_and(|next| next.may_own(named.client_sequence));
        let waits = |phase| matches!(phase, Phase::Waiting | Phase::Unkept);
        if replaced {
            self.close(named.tuple, now_ns);
            self.close(named.tuple, now_ns);
        } else if waits(flow.current.phase) && flow.current.may_own(named.client_sequence) {
            self.close(named.tuple, now_ns);
        }
    }

    fn stand(&mut self, named: NamedConnection) {
        let new = || Flow::new(Connection::new(Phase::Standing, None));
        let flow = self.flows.entry(named.tuple).or_insert_with(new);
        self.kept_bytes -= flow.turn_to(named.client_sequence);
        self.kept_bytes -= flow.current.drop_kept();
        flow.current.phase = Phase::Standing;
        flow.current.service_acknowledged = Some(named.client_sequence);
    }

    pub(super) fn close(&mut self, tuple: Tuple, now_ns: u64) {
        let Some(flow) = self.flows.get_mut(&tuple) else {
            return;
        };
        self.kept_bytes -= flow.current.drop_kept();
        if !flow.promote_next() {
            flow.current.phase = Phase::Closed {
                since_ns: now_ns,
                inherited: false,
            };
            self.fading.push_back((now_ns, tuple));
        }
    }
}
