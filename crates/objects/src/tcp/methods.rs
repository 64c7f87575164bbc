//! TCP sockets in the table of kinds: listeners and connections, which one socket can be in turn.

use super::capture::capture_known;
use super::difference::difference;
use super::fingerprint::{Seen, fingerprint};
use super::orphan;
use super::packets::{Inject, Resend};
use super::quiet::{is_quiet, may_be_quiet};
use super::restore::prepare;
use crate::methods::{Capture, Inode, Look, Means, Methods, Reading};
use crate::restored::{Batch, Phase, Restored, Scene};
use crate::{Error, listener};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use unbroken_image::object::{TcpConnection, TcpListener};
use unbroken_image::{Object, ObjectId};
use unbroken_sys::tcp::clock_ns;

pub(crate) const METHODS: Methods = Methods {
    inode: Inode::Unique,
    is_volatile: |object| matches!(object, Object::TcpConnection(_)),
    look,
    verify: Some(verify),
    ..Methods::new(
        Capture::Descriptor(read),
        &[(Phase::Make, make), (Phase::GoLive, go_live)],
    )
};

/// A connection that was calm for so long is asked whether it may be quiet: some epochs, lest one
/// that is in use be asked in vain, and no longer, for until then it is looked at in each of them.
const CALM_NS: u64 = 5_000_000;

fn read(reading: &mut Reading, fd: BorrowedFd<'_>, means: &mut Means<'_>) -> Result<(), Error> {
    if listener::is_listener(fd)? {
        reading.tracker = None;
        reading.state = Some(Object::TcpListener(listener::capture(fd)?));
    } else {
        let (state, tracker) = capture_known(fd, means.known)?;
        reading.tracker = Some(tracker);
        reading.state = Some(Object::TcpConnection(state));
    }
    Ok(())
}

/// A connection that packets may have moved. Its descriptor is taken only when the pass over all
/// sockets cannot tell everything of it.
fn look(reading: &mut Reading, means: &mut Means<'_>) -> Result<Look, Error> {
    let (Some(Object::TcpConnection(state)), Some(tracker)) =
        (&mut reading.state, &mut reading.tracker)
    else {
        return Ok(Look::Unknown);
    };
    let known = means.known;
    let seen = known.record.map_or(Seen::Unclear, |record| {
        tracker.look_at(record, state, known.sent)
    });
    let mut descriptor = None;
    let moved = match seen {
        Seen::Moved => true,
        Seen::Unchanged => false,
        Seen::Unclear => {
            let socket = descriptor.insert(means.holders.require_duplicate()?);
            tracker.look(socket.as_fd(), state, known)?
        }
    };
    if moved {
        tracker.calm_since_ns = clock_ns();
        return Ok(Look::Refreshed);
    }
    if clock_ns() - tracker.calm_since_ns <= CALM_NS || !may_be_quiet(state) {
        return Ok(Look::Same);
    }
    let socket = match descriptor {
        Some(socket) => socket,
        None => means.holders.require_duplicate()?,
    };
    match is_quiet(socket.as_fd(), state)? {
        true => Ok(Look::AtRest),
        false => Ok(Look::Same),
    }
}

fn verify(reading: &Reading, fd: BorrowedFd<'_>, at_rest: bool) -> Result<Option<String>, Error> {
    let (Some(Object::TcpConnection(state)), Some(tracker)) = (&reading.state, &reading.tracker)
    else {
        return Ok(None);
    };
    if !at_rest {
        return difference(fd, state, tracker);
    }
    let (found, known) = (fingerprint(fd)?, tracker.fingerprint());
    Ok((found != *known).then(|| format!("at rest, and moved from {known:?} to {found:?}")))
}

/// Listeners come before connections, which bind beside them; and all stand silently before the
/// first one speaks.
fn make(batch: &Batch<'_>, scene: &Scene, restored: &mut Restored) -> Result<(), Error> {
    let (ids, listeners): (Vec<ObjectId>, Vec<&TcpListener>) = batch
        .iter()
        .filter_map(|(id, object)| match object {
            Object::TcpListener(state) => Some((*id, state)),
            _ => None,
        })
        .unzip();
    let sockets = listener::restore_all(&listeners)?;
    restored.descriptors.extend(ids.into_iter().zip(sockets));
    for (id, state) in connections(batch).filter(|(id, _)| scene.named.contains(id)) {
        let view = scene.views.get(&id).copied().unwrap_or_default();
        let prepared = prepare(state, view).map_err(|error| error.of(name(state)))?;
        restored.silent.insert(id, prepared);
    }
    Ok(())
}

fn go_live(batch: &Batch<'_>, scene: &Scene, restored: &mut Restored) -> Result<(), Error> {
    let mut standing = HashSet::new();
    for (id, state) in connections(batch) {
        let Some(prepared) = restored.silent.remove(&id) else {
            continue;
        };
        let live = prepared
            .go_live(state)
            .map_err(|error| error.of(name(state)))?;
        standing.insert(ends(state));
        restored.connections.push(id);
        restored.say(state, live.inject, live.resend);
        restored.descriptors.insert(id, live.fd);
    }
    for (id, state) in connections(batch).filter(|(id, _)| !scene.named.contains(id)) {
        if standing.contains(&ends(state)) {
            continue;
        }
        match restore_orphan(id, state, scene, restored) {
            Ok(true) => drop(standing.insert(ends(state))),
            Ok(false) => {}
            // The end of one client's connection: no reason to let all others down.
            Err(error) => {
                let error = error.of(format!("the orphaned {}", name(state)));
                restored.shortcomings.push(error.to_string());
            }
        }
    }
    Ok(())
}

/// A connection that the service had closed; false when its client has everything.
fn restore_orphan(
    id: ObjectId,
    state: &TcpConnection,
    scene: &Scene,
    restored: &mut Restored,
) -> Result<bool, Error> {
    let view = scene.views.get(&id).copied().unwrap_or_default();
    let acknowledged = view.heard.map(|heard| heard.acknowledgement);
    if acknowledged.is_some_and(|number| orphan::is_finished(state, number)) {
        return Ok(false);
    }
    let now = orphan::advanced(state, view.heard);
    let live = prepare(&now, view)?.go_live(&now)?;
    restored.connections.push(id);
    restored.say(&now, live.inject, live.resend);
    restored.orphans.push((state.clone(), live.fd));
    Ok(true)
}

fn connections<'a>(
    batch: &'a Batch<'a>,
) -> impl Iterator<Item = (ObjectId, &'a TcpConnection)> + 'a {
    batch.iter().filter_map(|(id, object)| match object {
        Object::TcpConnection(state) => Some((*id, state)),
        _ => None,
    })
}

fn name(state: &TcpConnection) -> String {
    let TcpConnection {
        local,
        remote,
        phase,
        ..
    } = state;
    format!("connection {local} - {remote} in {phase:?}")
}

/// What tells connections apart on the wire, where a mapped address is IPv4.
fn ends(state: &TcpConnection) -> [SocketAddr; 2] {
    [state.local, state.remote]
        .map(|address| SocketAddr::new(address.ip().to_canonical(), address.port()))
}

impl Restored {
    fn say(&mut self, state: &TcpConnection, inject: Option<Inject>, resend: Option<Resend>) {
        self.injects.extend(inject);
        if let Some(resend) = resend {
            let bytes = state.send_queue[resend.bytes.clone()].to_vec();
            self.resends.push((resend, bytes));
        }
    }
}
