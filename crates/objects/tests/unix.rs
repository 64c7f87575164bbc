//! Unix sockets, captured and made again in one process.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use unbroken_image::object::{UnixAddress, UnixKind, UnixSocket};
use unbroken_image::{Object, ObjectId};
use unbroken_objects::{Error, Phase, Restored, Scene, unix};
use unbroken_sys::unix::Diag;
use unbroken_sys::{socket, sockopt};

fn capture(fd: impl AsFd) -> UnixSocket {
    let mut diag = Diag::open().unwrap();
    let state = unix::capture(fd.as_fd(), &mut diag).unwrap();
    // A capture takes nothing: another one reads the same.
    assert_eq!(unix::capture(fd.as_fd(), &mut diag).unwrap(), state);
    state
}

fn restore(states: &[&UnixSocket]) -> Vec<OwnedFd> {
    let descriptors = try_to_restore(states).unwrap();
    assert_eq!(descriptors.len(), states.len());
    descriptors
}

fn try_to_restore(states: &[&UnixSocket]) -> Result<Vec<OwnedFd>, Error> {
    let named = states.iter().zip(0..);
    let objects = named.map(|(state, id)| (ObjectId(id), Object::UnixSocket((*state).clone())));
    let (objects, mut restored) = (objects.collect(), Restored::default());
    unbroken_objects::restore(Phase::Make, &objects, &Scene::default(), &mut restored)?;
    Ok(restored.descriptors.into_values().collect())
}

/// What must be the same, as inodes are not.
fn without_inodes(state: &UnixSocket) -> UnixSocket {
    UnixSocket {
        inode: 0,
        peer_inode: None,
        ..state.clone()
    }
}

/// A directory of the test's own that goes away with it.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("unbroken-unix-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_stream_pair_with_bytes_both_ways() {
    let (mut one, mut other) = UnixStream::pair().unwrap();
    one.write_all(&[1; 100_000]).unwrap();
    other.write_all(b"to one").unwrap();
    other.set_nonblocking(true).unwrap();
    sockopt::set_i32(one.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000).unwrap();
    one.shutdown(std::net::Shutdown::Write).unwrap();
    let states = [capture(&one), capture(&other)];
    assert_eq!(states[0].peer_inode, Some(states[1].inode));
    assert_eq!((states[0].shutdown, states[1].shutdown), (2, 1));
    drop((one, other));
    let restored = restore(&[&states[0], &states[1]]);
    for (fd, state) in restored.iter().zip(&states) {
        assert_eq!(without_inodes(&capture(fd)), without_inodes(state));
    }
    let mut ends = restored.into_iter().map(UnixStream::from);
    let (mut one, mut other) = (ends.next().unwrap(), ends.next().unwrap());
    let mut bytes = [0; 6];
    one.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to one");
    let mut all = Vec::new();
    other.read_to_end(&mut all).unwrap();
    assert_eq!(all, [1; 100_000]);
}

#[test]
fn messages_keep_their_borders() {
    for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let (one, other) = unbroken_sys::unix::pair(kind).unwrap();
        for message in [&b"first"[..], b"2", &[7; 70_000]] {
            assert_eq!(
                socket::send(one.as_fd(), message, 0).unwrap(),
                message.len()
            );
        }
        let states = [capture(&one), capture(&other)];
        let lengths: Vec<_> = states[1]
            .queue
            .iter()
            .map(|message| message.bytes.len())
            .collect();
        assert_eq!(lengths, [5, 1, 70_000]);
        drop((one, other));
        let restored = restore(&[&states[0], &states[1]]);
        for (fd, state) in restored.iter().zip(&states) {
            assert_eq!(without_inodes(&capture(fd)), without_inodes(state));
        }
    }
}

#[test]
fn a_second_capture_sees_what_changed() {
    let (one, other) = UnixStream::pair().unwrap();
    let mut diag = Diag::of_namespace(one.as_fd()).unwrap();
    let mut state = unix::capture(one.as_fd(), &mut diag).unwrap();
    let mut look = |changed: bool| {
        assert_eq!(
            unix::capture_into(one.as_fd(), &mut diag, &mut state).unwrap(),
            changed
        );
        assert_eq!(unix::capture(one.as_fd(), &mut diag).unwrap(), state);
    };
    look(false);
    (&other).write_all(b"x").unwrap();
    look(true);
    look(false);
    (&one).read_exact(&mut [0]).unwrap();
    look(true);
    look(false);
    drop(other);
    look(true);
    look(false);
}

#[test]
fn the_end_of_a_closed_peer() {
    let (mut one, other) = UnixStream::pair().unwrap();
    (&other).write_all(b"last words").unwrap();
    drop(other);
    let state = capture(&one);
    assert_eq!(
        (state.connected, state.peer_inode, state.shutdown),
        (true, None, 3)
    );
    one = restore(&[&state]).remove(0).into();
    let mut all = Vec::new();
    one.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
    assert_eq!(
        one.write(&[0]).unwrap_err().raw_os_error(),
        Some(libc::EPIPE)
    );
}

#[test]
fn a_listener_with_connections() {
    let directory = Directory::new("listener");
    let path = directory.file("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    (&client).write_all(b"unread").unwrap();
    let waiting = UnixStream::connect(&path).unwrap();
    let states = [
        capture(&client),
        capture(&accepted),
        capture(&listener),
        capture(&waiting),
    ];
    assert_eq!(
        states[2].local,
        Some(UnixAddress::Path(path.to_str().unwrap().to_owned()))
    );
    assert_eq!(states[1].local, states[2].local);
    assert!(states[3].connected && states[3].peer_inode.is_none());
    drop((listener, client, accepted, waiting));
    let restored = restore(&states.iter().collect::<Vec<_>>());
    for (fd, state) in restored.iter().zip(&states) {
        assert_eq!(without_inodes(&capture(fd)), without_inodes(state));
    }
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
    assert_eq!(mode & 0o777, 0o640);
    let mut ends = restored.into_iter();
    let _client = ends.next().unwrap();
    let mut accepted = UnixStream::from(ends.next().unwrap());
    let listener = UnixListener::from(ends.next().unwrap());
    let mut bytes = [0; 6];
    accepted.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"unread");
    // The one that waited is accepted now, and a new one after it.
    listener.accept().unwrap();
    let _new = UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn a_sender_to_a_log_daemon_outside() {
    let directory = Directory::new("log");
    let path = directory.file("log");
    let daemon = UnixDatagram::bind(&path).unwrap();
    let sender = UnixDatagram::unbound().unwrap();
    sender.connect(&path).unwrap();
    let state = capture(&sender);
    assert_eq!(state.kind, UnixKind::Datagram);
    drop(sender);
    let restored = restore(&[&state]);
    socket::send(restored[0].as_fd(), b"message", 0).unwrap();
    let mut bytes = [0; 16];
    assert_eq!(daemon.recv(&mut bytes).unwrap(), 7);
    // Without the daemon the socket comes back all the same.
    drop(daemon);
    let restored = restore(&[&state]);
    assert!(socket::send(restored[0].as_fd(), b"message", 0).is_err());
}

#[test]
fn a_named_receiver_with_unread_messages() {
    let directory = Directory::new("receiver");
    let receiver = UnixDatagram::bind(directory.file("in")).unwrap();
    let sender = UnixDatagram::unbound().unwrap();
    sender.connect(directory.file("in")).unwrap();
    sender.send(b"one").unwrap();
    sender.send(b"").unwrap();
    sender.send(b"three").unwrap();
    let mut diag = Diag::open().unwrap();
    let states = [
        unix::capture(receiver.as_fd(), &mut diag).unwrap(),
        unix::capture(sender.as_fd(), &mut diag).unwrap(),
    ];
    assert_eq!(states[0].queue.len(), 3);
    drop((receiver, sender));
    let restored = restore(&[&states[0], &states[1]]);
    let receiver = UnixDatagram::from(restored.into_iter().next().unwrap());
    for expected in [&b"one"[..], b"", b"three"] {
        let mut bytes = [0; 16];
        let length = receiver.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], expected);
    }
}

#[test]
fn an_abstract_listener() {
    let name = format!("unbroken-test-{}", std::process::id()).into_bytes();
    let listener = socket::open(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0).unwrap();
    unbroken_sys::unix::bind(
        listener.as_fd(),
        &unbroken_sys::unix::Name::Abstract(name.clone()),
    )
    .unwrap();
    socket::listen(listener.as_fd(), 9).unwrap();
    let state = capture(&listener);
    assert_eq!(state.local, Some(UnixAddress::Abstract(name)));
    assert_eq!(state.backlog, Some(9));
    drop(listener);
    let restored = restore(&[&state]);
    assert_eq!(
        without_inodes(&capture(&restored[0])),
        without_inodes(&state)
    );
}

#[test]
fn a_connection_to_another_process_is_refused() {
    let (one, _other) = UnixStream::pair().unwrap();
    let state = capture(&one);
    let result = try_to_restore(&[&state]);
    assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");
}

#[test]
fn descriptors_in_flight_are_refused() {
    let (one, other) = UnixStream::pair().unwrap();
    let sent = std::process::Command::new("python3")
        .args([
            "-c",
            "import socket; s = socket.socket(fileno=0); socket.send_fds(s, [b'x'], [1])",
        ])
        .stdin(OwnedFd::from(one.try_clone().unwrap()))
        .status();
    if !sent.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no python3 to send a descriptor with");
        return;
    }
    let mut diag = Diag::open().unwrap();
    let result = unix::capture(other.as_fd(), &mut diag);
    assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");
}

#[test]
fn a_message_of_a_closed_peer_is_kept() {
    let (one, other) = UnixDatagram::pair().unwrap();
    other.send(b"left").unwrap();
    drop(other);
    let state = capture(&one);
    assert_eq!((state.connected, state.peer_inode), (true, None));
    drop(one);
    let restored = UnixDatagram::from(restore(&[&state]).remove(0));
    assert_eq!(without_inodes(&capture(&restored)), without_inodes(&state));
    let mut bytes = [0; 10];
    assert_eq!(restored.recv(&mut bytes).unwrap(), 4);
    let error = restored.send(b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
}

#[test]
fn a_relative_path_is_bound_where_it_was() {
    let directory = Directory::new("relative");
    let listener = UnixListener::bind(directory.file("here")).unwrap();
    let mut state = capture(&listener);
    drop(listener);
    state.local = Some(UnixAddress::Relative {
        directory: directory.0.to_str().unwrap().to_owned(),
        path: "here".to_owned(),
    });
    let before = std::env::current_dir().unwrap();
    let restored = UnixListener::from(restore(&[&state]).remove(0));
    assert_eq!(std::env::current_dir().unwrap(), before);
    let name = restored.local_addr().unwrap();
    assert_eq!(name.as_pathname(), Some("here".as_ref()));
    UnixStream::connect(directory.file("here")).unwrap();
    // Of a path that begins nobody knows where.
    state.local = Some(UnixAddress::Path("here".to_owned()));
    let result = try_to_restore(&[&state]);
    assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");
}
