//! The control socket: how `unbroken switchover`, `stop` and the front reach whichever node is
//! primary.
//!
//! A Unix datagram socket at /run/unbroken/NAME/control. Successive primaries inherit the one
//! descriptor, so a request that was sent but not yet read survives the death of a primary, and no
//! asker ever sees a broken connection. One request is one datagram, so the event loop never waits
//! for the rest of one. The asker binds a socket of its own beside it for the answer: a path and
//! not an abstract name, because those are per network namespace.
//!
//! Request: `unbroken/1 NUMBER VERB [ARGUMENT]`. Answer: `unbroken/1 NUMBER ok` or
//! `unbroken/1 NUMBER error TEXT`.

use crate::directory::RunDirectory;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use unbroken_link::Asker;

const PROTOCOL: &str = "unbroken/1";
/// Longest request or answer; longer ones are cut by the kernel and then refused.
const DATAGRAM_BYTES_MAX: usize = 1024;
/// How often an asker that waits looks whether anybody is left who could answer.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(100);

/// What may be asked of a primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Hand the service to the standby, losing nothing. Answered when the replica runs.
    Switchover,
    /// End the service. Answered when it has ended.
    Stop,
    /// Send this signal to the service's first process. Answered when it is sent.
    Signal(i32),
}

impl Request {
    fn encode(self, number: u64) -> String {
        match self {
            Request::Switchover => format!("{PROTOCOL} {number} switchover"),
            Request::Stop => format!("{PROTOCOL} {number} stop"),
            Request::Signal(signal) => format!("{PROTOCOL} {number} signal {signal}"),
        }
    }

    fn decode(words: &[&str]) -> Option<Request> {
        match words {
            ["switchover"] => Some(Request::Switchover),
            ["stop"] => Some(Request::Stop),
            ["signal", number] => number
                .parse()
                .ok()
                .filter(|signal| (1..=64).contains(signal))
                .map(Request::Signal),
            _ => None,
        }
    }
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("cannot {operation} {}: {cause}", .path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error(
        "cannot ask service {name}: {cause}; run it as the user who started the service: sudo \
         unbroken ..."
    )]
    Rights { name: String, cause: io::Error },
    #[error("no service {0} is running; `unbroken status` lists those that are")]
    NoService(String),
    #[error("service {name} refused: {reason}")]
    Refused { name: String, reason: String },
    #[error(
        "service {name} gave no answer for {} s; see `unbroken status {name}`",
        .patience.as_secs()
    )]
    NoAnswer { name: String, patience: Duration },
}

/// The receiving end, held by every node of a service and read by the primary.
#[derive(Debug)]
pub struct Control {
    socket: UnixDatagram,
}

impl Control {
    /// Makes the socket in a claimed directory; only root may send to it.
    ///
    /// # Errors
    /// What binding or setting the mode says.
    pub fn bind(directory: &RunDirectory) -> Result<Control, ControlError> {
        let path = directory.control();
        let failed = |operation, cause| ControlError::Io {
            operation,
            path: path.clone(),
            cause,
        };
        let socket = UnixDatagram::bind(&path).map_err(|cause| failed("bind", cause))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .map_err(|cause| failed("protect", cause))?;
        socket
            .set_nonblocking(true)
            .map_err(|cause| failed("prepare", cause))?;
        Ok(Control { socket })
    }

    /// The socket that a node inherited.
    pub fn from_descriptor(socket: OwnedFd) -> Control {
        Control {
            socket: socket.into(),
        }
    }

    /// The next request that waits; `None` when there is none. Call it until it says so whenever
    /// the descriptor is readable. What is no request is answered with an error here, or dropped
    /// when it has no sender.
    ///
    /// # Errors
    /// What receiving says, other than that nothing waits.
    pub fn next_request(&self) -> io::Result<Option<(Request, Asker)>> {
        loop {
            let mut buffer = [0; DATAGRAM_BYTES_MAX];
            let (length, sender) = match self.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let Some(path) = sender.as_pathname().map(Path::to_owned) else {
                continue;
            };
            let text = String::from_utf8_lossy(&buffer[..length]);
            let words: Vec<&str> = text.split(' ').collect();
            let number = words.get(1).and_then(|word| word.parse().ok());
            let asker = Asker {
                path,
                number: number.unwrap_or(0),
            };
            match (words.as_slice(), number) {
                ([PROTOCOL, _, request @ ..], Some(_)) => match Request::decode(request) {
                    Some(request) => return Ok(Some((request, asker))),
                    None => self.answer(&asker, Err("it does not know this request")),
                },
                _ => self.answer(
                    &asker,
                    Err(
                        "the request is of another version of unbroken; use the program that \
                         started the service",
                    ),
                ),
            }
        }
    }

    /// Answers; an asker that has gone away is not an error.
    pub fn answer(&self, asker: &Asker, outcome: Result<(), &str>) {
        let number = asker.number;
        let text = match outcome {
            Ok(()) => format!("{PROTOCOL} {number} ok"),
            Err(reason) => format!("{PROTOCOL} {number} error {}", reason.replace('\n', " ")),
        };
        let bytes = text.as_bytes();
        // Nonblocking, and the asker reads nothing but answers: a full or gone socket is its own
        // loss, and it finds out by its patience.
        let _ = self
            .socket
            .send_to(&bytes[..bytes.len().min(DATAGRAM_BYTES_MAX)], &asker.path);
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The asker's socket; its name goes with it.
struct AnswerSocket {
    socket: UnixDatagram,
    path: PathBuf,
}

impl AnswerSocket {
    fn bind(directory: &RunDirectory, number: u64) -> io::Result<AnswerSocket> {
        let process = std::process::id();
        let path = directory.path().join(format!("ask-{process}-{number}"));
        // A process that was killed may have left the name of a pid that is ours now.
        let _ = fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path)?;
        let bound = AnswerSocket { socket, path };
        fs::set_permissions(&bound.path, fs::Permissions::from_mode(0o600))?;
        bound.socket.set_read_timeout(Some(LIVENESS_INTERVAL))?;
        Ok(bound)
    }
}

impl Drop for AnswerSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Asks a service's primary and waits for the answer, through takeovers, at most `patience`.
///
/// # Errors
/// [`ControlError::NoService`] when no process of ours lives under the name, also when the last
/// one dies while this waits (for [`Request::Stop`] that is success); the others as they say.
pub fn ask(
    directory: &RunDirectory,
    request: Request,
    patience: Duration,
) -> Result<(), ControlError> {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let name = directory.name().to_string();
    let is_alive = || directory.is_alive().unwrap_or(true);
    if !is_alive() {
        return Err(ControlError::NoService(name));
    }
    let deadline = Instant::now() + patience;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let failed = |operation| {
        let (name, path) = (name.clone(), directory.control());
        move |cause: io::Error| match cause.kind() {
            io::ErrorKind::PermissionDenied => ControlError::Rights { name, cause },
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ControlError::NoService(name)
            }
            _ => ControlError::Io {
                operation,
                path,
                cause,
            },
        }
    };
    let answers = AnswerSocket::bind(directory, number).map_err(failed("answer to"))?;
    answers
        .socket
        .send_to(request.encode(number).as_bytes(), directory.control())
        .map_err(failed("write to"))?;
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    loop {
        match answers.socket.recv(&mut buffer) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&buffer[..length]);
                if let Some(outcome) = decode_answer(&text, number) {
                    return outcome.map_err(|reason| ControlError::Refused { name, reason });
                }
            }
            Err(error) if is_timeout(&error) => {
                if !is_alive() {
                    // The end that was asked for, whoever brought it about.
                    return match request {
                        Request::Stop => Ok(()),
                        _ => Err(ControlError::NoService(name)),
                    };
                }
            }
            Err(error) => return Err(failed("read the answer from")(error)),
        }
        if Instant::now() >= deadline {
            return Err(ControlError::NoAnswer { name, patience });
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// `None` when it is not the answer to request `number`.
fn decode_answer(text: &str, number: u64) -> Option<Result<(), String>> {
    let rest = text.strip_prefix(PROTOCOL)?.strip_prefix(' ')?;
    let (answered, outcome) = rest.split_once(' ')?;
    if answered.parse() != Ok(number) {
        return None;
    }
    match outcome.split_once(' ') {
        None if outcome == "ok" => Some(Ok(())),
        Some(("error", reason)) => Some(Err(reason.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::{Claim, ServiceName};
    use crate::test_root::TestRoot;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn service(root: &TestRoot) -> (RunDirectory, Claim, Control) {
        let name = ServiceName::new("ctl").expect("name");
        let directory = RunDirectory::within(root.path(), name);
        let claim = directory.claim().expect("claim");
        let control = Control::bind(&directory).expect("bind");
        (directory, claim, control)
    }

    /// Waits for the next request; the asker runs in another thread.
    fn next(control: &Control) -> (Request, Asker) {
        loop {
            if let Some(request) = control.next_request().expect("receive") {
                return request;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn requests_and_answers() {
        let root = TestRoot::new();
        let (directory, _claim, control) = service(&root);
        assert!(control.next_request().expect("receive").is_none());
        for request in [
            Request::Switchover,
            Request::Stop,
            Request::Signal(libc::SIGHUP),
        ] {
            let directory = directory.clone();
            let asker = std::thread::spawn(move || ask(&directory, request, PATIENCE));
            let (received, from) = next(&control);
            assert_eq!(received, request);
            control.answer(&from, Ok(()));
            assert!(asker.join().expect("join").is_ok());
        }
    }

    #[test]
    fn a_refusal_carries_its_reason() {
        let root = TestRoot::new();
        let (directory, _claim, control) = service(&root);
        let asker = std::thread::spawn(move || ask(&directory, Request::Switchover, PATIENCE));
        let (_, from) = next(&control);
        control.answer(&from, Err("there is no standby:\nit is being filled"));
        let error = asker.join().expect("join").expect_err("refused");
        assert_eq!(
            error.to_string(),
            "service ctl refused: there is no standby: it is being filled"
        );
    }

    #[test]
    fn the_next_holder_answers_what_the_one_before_read() {
        let root = TestRoot::new();
        let (directory, _claim, control) = service(&root);
        let heir =
            Control::from_descriptor(control.as_fd().try_clone_to_owned().expect("duplicate"));
        let asker = std::thread::spawn(move || ask(&directory, Request::Stop, PATIENCE));
        let (_, from) = next(&control);
        drop(control);
        heir.answer(&from, Ok(()));
        assert!(asker.join().expect("join").is_ok());
    }

    #[test]
    fn foreign_datagrams_are_answered_or_dropped() {
        let root = TestRoot::new();
        let (directory, _claim, control) = service(&root);
        let stranger = AnswerSocket::bind(&directory, 9).expect("bind");
        for text in [
            "",
            "hello",
            "unbroken/9 4 stop",
            "unbroken/1 4 dance",
            "unbroken/1 4 signal 0",
            "unbroken/1 4 signal 65",
            "unbroken/1 x stop",
        ] {
            stranger
                .socket
                .send_to(text.as_bytes(), directory.control())
                .expect("send");
            assert!(control.next_request().expect("receive").is_none(), "{text}");
            let mut answer = [0; 256];
            let length = stranger.socket.recv(&mut answer).expect("answer");
            let answer = String::from_utf8_lossy(&answer[..length]);
            assert!(answer.contains(" error "), "{text}: {answer}");
        }
        let nameless = UnixDatagram::unbound().expect("socket");
        nameless
            .send_to(b"unbroken/1 1 stop", directory.control())
            .expect("send");
        assert!(control.next_request().expect("receive").is_none());
    }

    #[test]
    fn an_asker_notices_that_nobody_is_left() {
        let root = TestRoot::new();
        let (directory, claim, control) = service(&root);
        let ask_in_thread = |request| {
            let asking = directory.clone();
            std::thread::spawn(move || ask(&asking, request, PATIENCE))
        };
        let askers = [Request::Switchover, Request::Stop].map(ask_in_thread);
        next(&control);
        next(&control);
        drop((claim, control));
        let [switchover, stop] = askers.map(|asker| asker.join().expect("join"));
        assert!(stop.is_ok());
        let error = switchover.expect_err("nobody");
        assert!(matches!(error, ControlError::NoService(_)), "{error}");
        let error = ask(&directory, Request::Stop, PATIENCE).expect_err("nobody");
        assert_eq!(
            error.to_string(),
            "no service ctl is running; `unbroken status` lists those that are"
        );
    }

    #[test]
    fn patience_ends() {
        let root = TestRoot::new();
        let (directory, _claim, _control) = service(&root);
        let error = ask(&directory, Request::Stop, Duration::from_millis(1)).expect_err("silent");
        assert!(matches!(error, ControlError::NoAnswer { .. }), "{error}");
        let left = fs::read_dir(directory.path()).expect("list").count();
        assert_eq!(left, 2, "only lock and control are left");
    }

    #[test]
    fn fuzz_requests_and_answers() {
        let root = TestRoot::new();
        let directory = RunDirectory::within(root.path(), ServiceName::new("x").expect("name"));
        fs::create_dir(directory.path()).expect("directory");
        let control = Control::bind(&directory).expect("bind");
        let asker = AnswerSocket::bind(&directory, 1).expect("asker");
        asker.socket.set_nonblocking(true).expect("nonblocking");
        let samples = [
            "unbroken/1 7 switchover",
            "unbroken/1 7 stop",
            "unbroken/1 7 signal 15",
            "unbroken/1 7 ok",
            "unbroken/1 7 error it is over",
        ];
        unbroken_fuzz::text("control", &samples, |text| {
            let _ = decode_answer(text, 7);
            let sent = asker.socket.send_to(text.as_bytes(), directory.control());
            if sent.is_ok() {
                while let Ok(Some((_, asker))) = control.next_request() {
                    control.answer(&asker, Err(text));
                }
                let _ = asker.socket.recv(&mut [0; 64]);
            }
        });
    }
}
