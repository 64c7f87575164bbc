//! The kernel objects of an epoch: what the announcements name, and what must be looked at in
//! every epoch.

use super::CaptureError;
use super::announcements::DueObjects;
use super::closed::{self, Closed};
use super::sockets::{Pass, Sockets};
use crate::clock::now_ns;
use crate::stage::closings::Closings;
use crate::steps::{EpochStep, StepClock};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use unbroken_image::object::{TcpConnection, TcpPhase, UdpSocket, UnixSocket};
use unbroken_image::{DescriptorChange, InterestChange, Object, ObjectId, Pid};
use unbroken_objects::table::{Changes, Mirror, Source};
use unbroken_objects::tcp::{Known, Seen, Tracker};
use unbroken_objects::{Kind, listener, proc_file, tcp, udp, unix};
use unbroken_sys::socket;
use unbroken_sys::unix::Diag;
use unbroken_wire::Tuple;
use unbroken_wire::flows::{Activity, ConnectionChange};
use unbroken_wire::sent::SentBytes;

/// What the primary remembers of one TCP connection.
struct Connection {
    state: TcpConnection,
    tracker: Tracker,
    /// Since when no look has shown anything new.
    calm_since_ns: u64,
    /// It is not looked at before a packet or a call concerns it.
    quiet: bool,
}

/// A connection that was calm for so long is asked whether it may be quiet: some epochs, lest one
/// that is in use be asked in vain, and no longer, for until then it is looked at in each of them.
const CALM_NS: u64 = 5_000_000;

pub(super) struct Objects {
    mirror: Mirror,
    changes: Changes,
    connections: BTreeMap<ObjectId, Connection>,
    by_tuple: HashMap<Tuple, ObjectId>,
    datagrams: BTreeMap<ObjectId, UdpSocket>,
    local: BTreeMap<ObjectId, UnixSocket>,
    /// Asks the kernel about Unix sockets of the service's network namespace; opened with the
    /// first of them.
    diag: Option<Diag>,
    volatile: Vec<(ObjectId, Kind)>,
    /// Files that name a thread by their path.
    of_threads: Vec<ObjectId>,
    sockets: Sockets,
    closed: Closed,
    /// Connections that left the table in this capture.
    left: Vec<(ObjectId, Tuple)>,
    /// Every connection that a standby knows of.
    tuples: BTreeMap<ObjectId, Tuple>,
    /// Quiet connections that moved in the last capture, and how, until it is known whether a packet
    /// did that (I7).
    moved_quietly: Vec<(ObjectId, String)>,
}

/// A connection's description without its queues: numbers, and some forty options.
const CONNECTION_BYTES_MAX: usize = 2048;
/// So does a changed entry of an epoll instance.
const INTEREST_BYTES_MAX: usize = 48;

/// The objects' part of an epoch. The buffers are used again.
#[derive(Default)]
pub(super) struct ObjectsDelta {
    pub slots: Vec<(Pid, DescriptorChange)>,
    pub objects: Vec<(ObjectId, Object)>,
    pub interests: Vec<InterestChange>,
    /// Connections on which packets, reads or writes moved something, and what their queues hold.
    moved: Vec<ObjectId>,
    moved_bytes: usize,
    pub gone: Vec<ObjectId>,
    /// The connections among `objects` and `gone`, as the wire names them.
    pub connections: ConnectionChange,
}

impl ObjectsDelta {
    pub fn clear(&mut self) {
        self.slots.clear();
        self.objects.clear();
        self.interests.clear();
        self.moved.clear();
        self.moved_bytes = 0;
        self.gone.clear();
        self.connections.stood.clear();
        self.connections.gone.clear();
    }

    /// Whether a file among them is the memory of a process.
    pub fn opens_memory(&self) -> bool {
        self.objects.iter().any(|(_, object)| match object {
            Object::RegularFile(file) => {
                // Wherever proc is mounted; another file of that name costs only time.
                file.path.ends_with("/mem")
            }
            _ => false,
        })
    }

    /// Bytes that it puts into a description, at most: little but what sockets and pipes hold.
    pub fn description_bound(&self) -> usize {
        let whole = self.objects.iter();
        let whole: usize = whole.map(|(_, object)| object.content_bytes() + 512).sum();
        let interests = self.interests.len() * INTEREST_BYTES_MAX;
        whole + interests + self.moved_bytes + self.moved.len() * CONNECTION_BYTES_MAX
    }
}

impl Objects {
    /// `outputs`: inodes of the pipes whose read ends are ours, with the stream each carries. What
    /// can be done aside is done on `spare_core`.
    pub fn new(outputs: &[(u64, u8)], spare_core: usize) -> Result<Objects, CaptureError> {
        Ok(Objects {
            mirror: Mirror::new(outputs, ObjectId(1))?,
            changes: Changes::default(),
            connections: BTreeMap::new(),
            by_tuple: HashMap::new(),
            datagrams: BTreeMap::new(),
            local: BTreeMap::new(),
            diag: None,
            volatile: Vec::new(),
            of_threads: Vec::new(),
            sockets: Sockets::new(spare_core),
            closed: Closed::default(),
            left: Vec::new(),
            tuples: BTreeMap::new(),
            moved_quietly: Vec::new(),
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
        self.connections.clear();
        self.by_tuple.clear();
        self.datagrams.clear();
        self.local.clear();
        self.of_threads.clear();
        self.moved_quietly.clear();
        self.changes.clear();
        self.sockets.follow(&sources);
        self.mirror.survey(sources, &mut self.changes)?;
        // Until an epoch of this is committed the service is what there is: no socket of it may be
        // left in repair mode by a kill.
        self.collect(Pass::Always, sent, delta)?;
        unix::check(self.local.values())?;
        self.bring_to_their_end(closings, true, delta)
    }

    /// Reads what may have changed since the last capture. The caller holds `closings`' sockets.
    pub fn update(
        &mut self,
        due: &DueObjects,
        activity: &Activity,
        sent: &SentBytes,
        closings: &Closings,
        delta: &mut ObjectsDelta,
        clock: &mut StepClock,
    ) -> Result<(), CaptureError> {
        self.changes.clear();
        self.mirror.update(&due.descriptors, &mut self.changes)?;
        clock.done(EpochStep::Descriptors);
        // Memfds that were mapped in between may have changed without a trace.
        if due.map {
            self.read_memory_files_again();
        }
        if due.threads_ended {
            self.read_files_of_threads_again();
        }
        self.wake(activity);
        self.collect(Pass::IfCheaper, sent, delta)?;
        self.bring_to_their_end(closings, false, delta)
    }

    /// Looks again at quiet connections that packets concern.
    fn wake(&mut self, activity: &Activity) {
        if activity.anywhere {
            for (&id, connection) in &mut self.connections {
                if std::mem::take(&mut connection.quiet) {
                    self.mirror.mark_active(id);
                }
            }
            return;
        }
        for tuple in &activity.connections {
            if let Some(id) = self.by_tuple.get(tuple)
                && let Some(connection) = self.connections.get_mut(id)
                && std::mem::take(&mut connection.quiet)
            {
                self.mirror.mark_active(*id);
            }
        }
    }

    /// Connections that the service has closed and that have words left.
    fn bring_to_their_end(
        &mut self,
        closings: &Closings,
        is_new: bool,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        self.closed.hear(closings);
        let context = closed::Context {
            gone: &self.left,
            is_new,
        };
        let standing = &self.by_tuple;
        let stands = |connection: &TcpConnection| standing.contains_key(&Tuple::from(connection));
        let mirror = &mut self.mirror;
        self.closed
            .update(&context, stands, || mirror.number_unlisted(), delta)
    }

    /// Completes the delta with what need not be done while the service stands.
    pub fn describe(&mut self, delta: &mut ObjectsDelta) {
        for id in delta.moved.drain(..) {
            if let Some(Connection { state, .. }) = self.connections.get(&id) {
                let object = Object::TcpConnection(state.clone());
                delta.objects.push((id, object));
            }
        }
        for (id, object) in &delta.objects {
            if let Object::TcpConnection(connection) = object {
                delta.connections.take(connection);
                self.tuples.insert(*id, connection.into());
            }
        }
        for id in &delta.gone {
            delta.connections.gone.extend(self.tuples.remove(id));
        }
    }

    /// What was stored through a mapping leaves no trace in the file's times, and none in the page
    /// tables once that mapping is gone.
    fn read_memory_files_again(&mut self) {
        let changes = &mut self.changes;
        for (id, kind) in self.mirror.objects() {
            if kind == Kind::MemoryFile
                && !changes.appeared.contains(&id)
                && !changes.touched.contains(&id)
            {
                changes.touched.push(id);
            }
        }
    }

    /// Those of a thread that has ended cannot be opened again.
    fn read_files_of_threads_again(&mut self) {
        let (mirror, changes) = (&self.mirror, &mut self.changes);
        for id in &self.of_threads {
            if mirror.kind(*id).is_some()
                && !changes.appeared.contains(id)
                && !changes.touched.contains(id)
            {
                changes.touched.push(*id);
            }
        }
    }

    /// I7: compares the mirror with the kernel.
    pub fn verify(&mut self) -> Result<(), CaptureError> {
        let mut differences = self.mirror.verify()?;
        // A packet that came, or left by a timer, since the mark of this epoch: the next one hears
        // of it from the wire.
        for (id, difference) in std::mem::take(&mut self.moved_quietly) {
            if self.connections.get(&id).is_some_and(|seen| seen.quiet) {
                differences.push(difference);
            }
        }
        for (&id, connection) in &self.connections {
            let Connection {
                state,
                tracker,
                quiet,
                ..
            } = connection;
            let descriptor = self.mirror.duplicate(id)?;
            let (socket, tuple) = (descriptor.as_fd(), Tuple::from(state));
            if *quiet {
                let (found, known) = (tcp::fingerprint(socket)?, tracker.fingerprint());
                if found != *known {
                    let difference = format!("quiet {tuple:?} moved from {known:?} to {found:?}");
                    self.moved_quietly.push((id, difference));
                }
            } else if let Some(difference) = tcp::difference(socket, state, tracker)? {
                differences.push(format!("{tuple:?}: {difference}"));
            }
        }
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
        for &id in &named {
            self.capture_whole(id, sent, delta)?;
        }
        self.left.clear();
        for &id in &self.changes.gone {
            if let Some(Connection { state, .. }) = self.connections.remove(&id) {
                let tuple = Tuple::from(&state);
                if self.by_tuple.get(&tuple) == Some(&id) {
                    self.by_tuple.remove(&tuple);
                }
                self.left.push((id, tuple));
            }
            self.datagrams.remove(&id);
            self.local.remove(&id);
            self.of_threads.retain(|named| *named != id);
        }
        delta.gone.append(&mut self.changes.gone);
        for index in 0..self.volatile.len() {
            let (id, kind) = self.volatile[index];
            self.look(id, kind, sent, delta)?;
        }
        named.clear();
        self.changes.appeared = named;
        Ok(())
    }

    /// An object that appeared, or that a call changed.
    fn capture_whole(
        &mut self,
        id: ObjectId,
        sent: &SentBytes,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        let object = match self.mirror.kind(id) {
            Some(Kind::Tcp) => self.capture_tcp(id, sent)?,
            Some(Kind::Udp) => {
                let descriptor = self.mirror.duplicate(id)?;
                let state = udp::capture(descriptor.as_fd())?;
                self.datagrams.insert(id, state.clone());
                Object::UdpSocket(state)
            }
            Some(Kind::Unix) => {
                let descriptor = self.mirror.duplicate(id)?;
                let diag = open_diag(&mut self.diag, descriptor.as_fd())?;
                let state = unix::capture(descriptor.as_fd(), diag)?;
                self.local.insert(id, state.clone());
                Object::UnixSocket(state)
            }
            Some(_) => match self.mirror.capture(id)? {
                Some(object) => object.clone(),
                None => return Ok(()),
            },
            None => return Ok(()),
        };
        let path = match &object {
            Object::RegularFile(file) => &file.path,
            Object::Directory(directory) => &directory.path,
            _ => "",
        };
        if proc_file::names_thread(path) && !self.of_threads.contains(&id) {
            self.of_threads.push(id);
        }
        delta.objects.push((id, object));
        Ok(())
    }

    fn capture_tcp(&mut self, id: ObjectId, sent: &SentBytes) -> Result<Object, CaptureError> {
        let descriptor = self.mirror.duplicate(id)?;
        let socket = descriptor.as_fd();
        if listener::is_listener(socket)? {
            self.connections.remove(&id);
            self.mirror.mark_quiet(id);
            return Ok(Object::TcpListener(listener::capture(socket)?));
        }
        let bytes = |first, length, into: &mut Vec<u8>| {
            tuple_of(socket).is_ok_and(|tuple| sent.copy(tuple, first, length, into))
        };
        let known = Known::new(self.sockets.record(id), &bytes);
        let (state, tracker) = tcp::capture_known(socket, &known)?;
        let object = Object::TcpConnection(state.clone());
        if state.phase != TcpPhase::Closed {
            self.by_tuple.insert(Tuple::from(&state), id);
        }
        let connection = Connection {
            state,
            tracker,
            calm_since_ns: now_ns(),
            quiet: false,
        };
        self.connections.insert(id, connection);
        self.mirror.mark_active(id);
        Ok(object)
    }

    /// An object that nobody announced but that changes without announcements.
    fn look(
        &mut self,
        id: ObjectId,
        kind: Kind,
        sent: &SentBytes,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        if !kind.is_socket() {
            if let Some(object) = self.mirror.look(id)? {
                delta.objects.push((id, object.clone()));
            }
            return Ok(());
        }
        if self.connections.contains_key(&id) {
            return self.look_at_connection(id, sent, delta);
        }
        let descriptor = self.mirror.duplicate(id)?;
        let socket = descriptor.as_fd();
        if let Some(state) = self.datagrams.get_mut(&id) {
            if udp::capture_into(socket, state, false)? {
                delta.objects.push((id, Object::UdpSocket(state.clone())));
            }
        } else if let Some(state) = self.local.get_mut(&id) {
            let diag = open_diag(&mut self.diag, socket)?;
            if unix::capture_into(socket, diag, state, false)? {
                delta.objects.push((id, Object::UnixSocket(state.clone())));
            }
        } else {
            drop(descriptor);
            return self.capture_whole(id, sent, delta);
        }
        Ok(())
    }

    /// A connection that packets may have moved. Its descriptor is taken only when the pass over
    /// all sockets cannot tell everything of it.
    fn look_at_connection(
        &mut self,
        id: ObjectId,
        sent: &SentBytes,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let Connection { state, tracker, .. } = connection;
        let tuple = Tuple::from(&*state);
        let bytes = |first, length, into: &mut Vec<u8>| sent.copy(tuple, first, length, into);
        let record = self.sockets.record(id);
        let seen = record.map_or(Seen::Unclear, |record| {
            tracker.look_at(record, state, &bytes)
        });
        let mut descriptor = None;
        let moved = match seen {
            Seen::Moved => true,
            Seen::Unchanged => false,
            Seen::Unclear => {
                let socket = descriptor.insert(self.mirror.duplicate(id)?);
                tracker.look(socket.as_fd(), state, &Known::new(record, &bytes))?
            }
        };
        if moved {
            delta.moved.push(id);
            delta.moved_bytes += state.send_queue.len() + state.receive_queue.len();
            connection.calm_since_ns = now_ns();
            return Ok(());
        }
        if now_ns() - connection.calm_since_ns <= CALM_NS || !tcp::may_be_quiet(state) {
            return Ok(());
        }
        let socket = match descriptor {
            Some(socket) => socket,
            None => self.mirror.duplicate(id)?,
        };
        if tcp::is_quiet(socket.as_fd(), state)? {
            connection.quiet = true;
            self.mirror.mark_quiet(id);
        }
        Ok(())
    }
}

fn tuple_of(socket: BorrowedFd<'_>) -> io::Result<Tuple> {
    let local = socket::local_address(socket)?;
    Ok(Tuple::new(local, socket::peer_address(socket)?))
}

fn open_diag<'a>(
    diag: &'a mut Option<Diag>,
    socket: BorrowedFd<'_>,
) -> Result<&'a mut Diag, CaptureError> {
    let open = match diag.take() {
        Some(open) => open,
        None => Diag::of_namespace(socket)?,
    };
    Ok(diag.insert(open))
}
