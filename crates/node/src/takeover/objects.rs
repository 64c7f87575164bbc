//! Brings every kernel object of the last epoch back, on a thread inside the replica's namespaces.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use unbroken_image::object::{FileLock, PipeEnd, RegularFile, TcpConnection, UnixSocket};
use unbroken_image::{Descriptor, Fd, Object, ObjectId, Pid};
use unbroken_objects::tcp::{Inject, Prepared, Resend, View};
use unbroken_objects::{
    device, directory, epoll, eventfd, file, listener, memfd, pipe, signalfd, tcp, timerfd, udp,
    unix,
};
use unbroken_wire::Tuple;

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Object(#[from] unbroken_objects::Error),
    #[error("restore {what}: {source}")]
    Socket {
        what: String,
        source: unbroken_objects::socket::SocketError,
    },
    #[error("make a pipe for the service's output: {0}")]
    Output(std::io::Error),
}

/// Everything that the replica's descriptors will name.
#[derive(Default)]
pub struct Restored {
    pub descriptors: BTreeMap<ObjectId, OwnedFd>,
    /// Read ends of the standard output and error that the replica will write to.
    pub outputs: [Option<OwnedFd>; 2],
    /// Packets of clients to inject before any other reaches the replica.
    pub injects: Vec<Inject>,
    /// What to say to clients again, with the bytes to say.
    pub resends: Vec<(Resend, Vec<u8>)>,
    /// Connections that the service had closed with words left; closing them says those.
    pub closed: Vec<(TcpConnection, OwnedFd)>,
    /// The connections that are there again.
    pub connections: Vec<Tuple>,
}

/// Restores `objects` on the calling thread's namespaces. `memory_files` are the memfds that the
/// replica's memory has made already, by object; `named` are the objects that slots name.
pub fn restore(
    objects: &BTreeMap<ObjectId, Object>,
    named: &HashSet<ObjectId>,
    views: &HashMap<Tuple, View>,
    memory_files: &BTreeMap<ObjectId, OwnedFd>,
) -> Result<Restored, RestoreError> {
    let mut restored = Restored::default();
    let mut pipes: BTreeMap<u64, Vec<(ObjectId, &PipeEnd)>> = BTreeMap::new();
    let mut unix_sockets: Vec<(ObjectId, &UnixSocket)> = Vec::new();
    let (mut connections, mut closed) = (Vec::new(), Vec::new());
    for (&id, object) in objects {
        let descriptor = match object {
            Object::RegularFile(state) => file::restore(state, None)?,
            Object::Directory(state) => directory::restore(state, None)?,
            Object::CharacterDevice(state) => device::restore(state)?,
            Object::MemoryFile(state) => {
                memfd::restore(state, memory_files.get(&id).map(AsFd::as_fd))?
            }
            Object::EventCounter(state) => eventfd::restore(state)?,
            Object::TimerDescriptor(state) => timerfd::restore(state)?,
            Object::SignalDescriptor(state) => signalfd::restore(state)?,
            Object::Epoll(state) => epoll::restore(state)?,
            Object::TcpListener(state) => listener::restore(state)
                .map_err(|source| socket_error(format!("listener {}", state.local), source))?,
            Object::UdpSocket(state) => udp::restore(state)
                .map_err(|source| socket_error("UDP socket".to_owned(), source))?,
            Object::Output { stream, flags } => output(*stream, *flags, &mut restored)?,
            Object::PipeEnd(state) => {
                pipes.entry(state.inode).or_default().push((id, state));
                continue;
            }
            Object::UnixSocket(state) => {
                unix_sockets.push((id, state));
                continue;
            }
            Object::TcpConnection(state) => {
                if named.contains(&id) {
                    connections.push((id, state));
                } else {
                    closed.push(state);
                }
                continue;
            }
        };
        restored.descriptors.insert(id, descriptor);
    }
    for ends in pipes.into_values() {
        let states: Vec<&PipeEnd> = ends.iter().map(|(_, state)| *state).collect();
        let descriptors = pipe::restore_group(&states)?;
        restored
            .descriptors
            .extend(ends.iter().map(|(id, _)| *id).zip(descriptors));
    }
    let sockets = unix::restore_all(&unix_sockets)
        .map_err(|source| socket_error("Unix sockets".to_owned(), source))?;
    restored.descriptors.extend(sockets);
    restore_connections(&connections, views, &mut restored)?;
    for state in closed {
        // One client's last words: no reason to let all others down.
        if let Err(error) = restore_closed(state, views, &mut restored) {
            crate::log!("{error}");
        }
    }
    Ok(restored)
}

/// A connection that the service had closed, unless all is said on it.
fn restore_closed(
    state: &TcpConnection,
    views: &HashMap<Tuple, View>,
    restored: &mut Restored,
) -> Result<(), RestoreError> {
    let tuple = Tuple::from(state);
    let view = views.get(&tuple).copied().unwrap_or_default();
    let said = view
        .heard
        .is_some_and(|heard| tcp::is_said(state, heard.acknowledgement));
    if said || restored.connections.contains(&tuple) {
        return Ok(());
    }
    let failed = |source| {
        let what = format!("the closed connection {} - {}", state.local, state.remote);
        socket_error(what, source)
    };
    let now = tcp::said_since(state, view.heard);
    let live = tcp::prepare(&now, view)
        .and_then(tcp::Prepared::go_live)
        .map_err(failed)?;
    restored.take_words(&now, live.inject, live.resend);
    restored.closed.push((state.clone(), live.fd));
    Ok(())
}

impl Restored {
    fn take_words(
        &mut self,
        state: &TcpConnection,
        inject: Option<Inject>,
        resend: Option<Resend>,
    ) {
        self.connections.push(Tuple::from(state));
        self.injects.extend(inject);
        if let Some(resend) = resend {
            let bytes = state.send_queue[resend.bytes.clone()].to_vec();
            self.resends.push((resend, bytes));
        }
    }
}

/// All stand silently before the first one speaks.
fn restore_connections(
    connections: &[(ObjectId, &TcpConnection)],
    views: &HashMap<Tuple, View>,
    restored: &mut Restored,
) -> Result<(), RestoreError> {
    let failed = |state: &TcpConnection| {
        let what = format!(
            "connection {} - {} in {:?}",
            state.local, state.remote, state.phase
        );
        move |source| socket_error(what, source)
    };
    let mut standing: Vec<(ObjectId, &TcpConnection, Prepared<'_>)> = Vec::new();
    for &(id, state) in connections {
        let view = views.get(&Tuple::from(state)).copied().unwrap_or_default();
        let prepared = tcp::prepare(state, view).map_err(failed(state))?;
        standing.push((id, state, prepared));
    }
    for (id, state, prepared) in standing {
        let live = prepared.go_live().map_err(failed(state))?;
        restored.take_words(state, live.inject, live.resend);
        restored.descriptors.insert(id, live.fd);
    }
    Ok(())
}

fn socket_error(what: String, source: unbroken_objects::socket::SocketError) -> RestoreError {
    RestoreError::Socket { what, source }
}

/// A new pipe in the place of the one whose read end the old primary had.
fn output(stream: u8, flags: i32, restored: &mut Restored) -> Result<OwnedFd, RestoreError> {
    use rustix::pipe::{PipeFlags, pipe_with};
    let failed = |error: rustix::io::Errno| RestoreError::Output(error.into());
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
    // Only the end that we read is nonblocking: the service sees a pipe that waits when full.
    rustix::fs::fcntl_setfl(&read, rustix::fs::OFlags::NONBLOCK).map_err(failed)?;
    let flags = rustix::fs::OFlags::from_bits_retain(flags.cast_unsigned());
    rustix::fs::fcntl_setfl(&write, flags).map_err(failed)?;
    if let Some(slot) = restored
        .outputs
        .get_mut(usize::from(stream.saturating_sub(1)))
    {
        *slot = Some(read);
    }
    Ok(write)
}

/// What was appended to files after the last epoch is taken back, and what descriptions had locked
/// is locked again. Only when no process of the old service runs any more: it would go on writing,
/// and it holds the locks.
pub fn take_files_over(
    objects: &BTreeMap<ObjectId, Object>,
    descriptors: &BTreeMap<ObjectId, OwnedFd>,
) -> Result<(), RestoreError> {
    for (id, object) in objects {
        if let (Object::RegularFile(state), Some(descriptor)) = (object, descriptors.get(id)) {
            cut_back(state, descriptor)?;
            file::lock_again(descriptor.as_fd(), state)?;
        }
    }
    Ok(())
}

fn cut_back(state: &RegularFile, descriptor: &OwnedFd) -> Result<(), RestoreError> {
    match file::cut_back(descriptor.as_fd(), state)? {
        file::CutBack::Unchanged | file::CutBack::Cut { .. } => {}
        other => crate::log!("{}: {other:?}", state.path),
    }
    Ok(())
}

/// Memfds are sealed again, when all their content and all their mappings are there.
pub fn seal_memory_files(
    objects: &BTreeMap<ObjectId, Object>,
    descriptors: &BTreeMap<ObjectId, OwnedFd>,
) {
    for (id, object) in objects {
        if let (Object::MemoryFile(state), Some(descriptor)) = (object, descriptors.get(id))
            // A mapping that was made before could be written through, which the kernel does not
            // allow beside a seal against writes. The service is better off without the seal than
            // without its replica.
            && let Err(error) = memfd::seal(descriptor.as_fd(), state)
        {
            crate::log!("without its seals: {error}");
        }
    }
}

/// The ranges that process `pid`, whose descriptors these are, must lock itself: such a lock is
/// the process's own, whoever opened the file.
pub fn locks_of_process(
    pid: Pid,
    descriptors: &BTreeMap<Fd, Descriptor>,
    objects: &BTreeMap<ObjectId, Object>,
) -> Vec<(Fd, FileLock)> {
    let mut locks: Vec<(Fd, FileLock)> = Vec::new();
    for (&fd, slot) in descriptors {
        if let Some(Object::RegularFile(state)) = objects.get(&slot.object) {
            // One call a lock is enough, whichever descriptor of the file it is made through.
            let access = state.flags & libc::O_ACCMODE;
            let own = file::process_locks(state, pid).filter(|lock| {
                access == libc::O_RDWR || (access == libc::O_WRONLY) == lock.exclusive
            });
            locks.extend(own.map(|lock| (fd, *lock)));
        }
    }
    locks
}
