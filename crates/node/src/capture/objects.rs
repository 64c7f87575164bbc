//! The kernel objects of an epoch: what the announcements name, and what must be looked at in
//! every epoch. How each kind is captured is [`unbroken_objects`]' matter; here are the order of
//! things and what concerns the wire.

use super::CaptureError;
use super::announcements::PendingObjectChanges;
use super::delta::ObjectsDelta;
use super::orphans::{self, Orphans};
use super::references::References;
use super::sockets::{Pass, Sockets};
use crate::stage::closings::Closings;
use crate::steps::{EpochStep, StepClock};
use std::collections::{BTreeMap, HashMap};
use std::io;
use unbroken_image::object::{TcpConnection, TcpPhase};
use unbroken_image::{Object, ObjectId};
use unbroken_objects::table::{Changes, Mirror, Source};
use unbroken_objects::tcp::{Ends, Known};
use unbroken_objects::{Event, Kind};
use unbroken_wire::Tuple;
use unbroken_wire::flows::Activity;
use unbroken_wire::sent::SentBytes;

pub(super) struct Objects {
    mirror: Mirror,
    changes: Changes,
    /// The connections that stand, as the wire names them.
    by_tuple: HashMap<Tuple, ObjectId>,
    /// Every connection that a standby knows of.
    tuples: BTreeMap<ObjectId, Tuple>,
    /// Connections that left the table in this capture.
    left: Vec<(ObjectId, Tuple)>,
    orphans: Orphans,
    sockets: Sockets,
    volatile: Vec<(ObjectId, Kind)>,
}

impl Objects {
    /// `outputs`: inodes of the pipes whose read ends are ours, with the stream each carries. What
    /// can be done aside is done on `spare_core`.
    pub fn new(outputs: &[(u64, u8)], spare_core: usize) -> Result<Objects, CaptureError> {
        Ok(Objects {
            mirror: Mirror::new(outputs, ObjectId(1))?,
            changes: Changes::default(),
            by_tuple: HashMap::new(),
            tuples: BTreeMap::new(),
            left: Vec::new(),
            orphans: Orphans::default(),
            sockets: Sockets::new(spare_core),
            volatile: Vec::new(),
        })
    }

    /// What has to be known before a survey, and may take milliseconds: the service runs meanwhile.
    pub fn prepare(&mut self) {
        self.sockets.settle();
    }

    /// Reads everything anew. The caller holds `closings`' sockets.
    pub fn survey(
        &mut self,
        sources: Vec<Source>,
        sent: &SentBytes,
        closings: &Closings,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        self.tuples.clear();
        self.by_tuple.clear();
        self.changes.clear();
        self.sockets.follow(&sources);
        self.mirror.survey(sources, &mut self.changes)?;
        // Until an epoch of this is committed the service is what there is: no socket of it may be
        // left in repair mode by a kill.
        self.collect(Pass::Always, sent, delta)?;
        self.follow_orphans(closings, true, delta)
    }

    /// Reads what may have changed since the last capture. The caller holds `closings`' sockets.
    pub fn update(
        &mut self,
        pending: &PendingObjectChanges,
        activity: &Activity,
        sent: &SentBytes,
        closings: &Closings,
        delta: &mut ObjectsDelta,
        clock: &mut StepClock,
    ) -> Result<(), CaptureError> {
        self.changes.clear();
        self.mirror
            .update(&pending.descriptors, &mut self.changes)?;
        clock.done(EpochStep::Descriptors);
        if pending.map {
            let event = Event::MemoryMapChanged;
            self.mirror.touch_stale(event, &mut self.changes);
        }
        if pending.threads_ended {
            let event = Event::ThreadEnded;
            self.mirror.touch_stale(event, &mut self.changes);
        }
        self.wake(activity);
        self.collect(Pass::IfCheaper, sent, delta)?;
        self.follow_orphans(closings, false, delta)
    }

    /// Looks again at connections at rest that packets concern.
    fn wake(&mut self, activity: &Activity) {
        if activity.anywhere {
            self.by_tuple.values().for_each(|id| self.mirror.wake(*id));
            return;
        }
        for tuple in &activity.connections {
            if let Some(id) = self.by_tuple.get(tuple) {
                self.mirror.wake(*id);
            }
        }
    }

    fn follow_orphans(
        &mut self,
        closings: &Closings,
        is_new: bool,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        self.orphans.hear(closings);
        let context = orphans::Context {
            gone: &self.left,
            is_new,
        };
        let standing = &self.by_tuple;
        let stands = |connection: &TcpConnection| standing.contains_key(&Tuple::from(connection));
        let mirror = &mut self.mirror;
        self.orphans
            .update(&context, stands, || mirror.number_unlisted(), delta)
    }

    /// Completes the delta, and the references that it needs, with what need not be done while the
    /// service stands.
    pub fn describe(
        &mut self,
        delta: &mut ObjectsDelta,
        references: &mut References,
    ) -> io::Result<()> {
        for id in delta.changed.drain(..) {
            let state = self.mirror.state(id).cloned();
            delta.objects.extend(state.map(|state| (id, state)));
        }
        for (id, object) in &delta.objects {
            if let (Some(file), Some(reference)) = (object.file(), self.mirror.reference(*id)) {
                references.need(file, || Ok(reference.clone()))?;
                references.take_object(*id, object);
            }
            if let Object::TcpConnection(connection) = object {
                delta.connections.take(connection);
                self.tuples.insert(*id, connection.into());
            }
        }
        for id in &delta.gone {
            delta.connections.gone.extend(self.tuples.remove(id));
            references.object_gone(*id);
        }
        Ok(())
    }

    /// I7: compares the mirror with the kernel.
    pub fn verify(&mut self) -> Result<(), CaptureError> {
        let differences = self.mirror.verify()?;
        if differences.is_empty() {
            return Ok(());
        }
        Err(CaptureError::Mirror(differences.join("; ")))
    }

    fn collect(
        &mut self,
        pass: Pass,
        sent: &SentBytes,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        delta.slots.append(&mut self.changes.slots);
        delta.interests.append(&mut self.changes.interests);
        let mut named = std::mem::take(&mut self.changes.appeared);
        named.append(&mut self.changes.touched);
        named.sort_unstable();
        let (volatile, mirror) = (&mut self.volatile, &self.mirror);
        volatile.clear();
        volatile.extend(mirror.volatile());
        volatile.retain(|(id, _)| named.binary_search(id).is_err());
        let active = volatile.iter().filter(|(_, kind)| *kind == Kind::Tcp);
        self.sockets.read(mirror, active.count(), pass);
        let copy = |(local, remote): Ends, first, length, into: &mut Vec<u8>| {
            sent.copy(Tuple::new(local, remote), first, length, into)
        };
        for &id in &named {
            let known = Known::new(self.sockets.record(id), &copy);
            if let Some(state) = self.mirror.capture(id, &known)? {
                delta.change(id, state);
                if let Object::TcpConnection(connection) = state
                    && connection.phase != TcpPhase::Closed
                {
                    self.by_tuple.insert(connection.into(), id);
                }
            }
        }
        self.forget_gone();
        delta.gone.append(&mut self.changes.gone);
        for &(id, _) in &self.volatile {
            let known = Known::new(self.sockets.record(id), &copy);
            if let Some(state) = self.mirror.look(id, &known)? {
                delta.change(id, state);
            }
        }
        named.clear();
        self.changes.appeared = named;
        Ok(())
    }

    fn forget_gone(&mut self) {
        self.left.clear();
        for id in &self.changes.gone {
            let Some(&tuple) = self.tuples.get(id) else {
                continue;
            };
            if self.by_tuple.get(&tuple) == Some(id) {
                self.by_tuple.remove(&tuple);
            }
            self.left.push((*id, tuple));
        }
    }
}
