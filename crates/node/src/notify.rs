//! What a service manager is told, by the protocol of `sd_notify(3)`: one datagram of `KEY=VALUE`
//! lines to the Unix socket that `NOTIFY_SOCKET` names.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Environment variable with the manager's socket.
pub const ENVIRONMENT_VARIABLE: &str = "NOTIFY_SOCKET";

/// A way to the service manager, or to nobody when there is none.
#[derive(Debug, Default)]
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    /// The manager that the environment names. The service must not inherit the variable: it would
    /// report under our name.
    ///
    /// # Errors
    /// An address that is neither a path nor, with a leading `@`, an abstract name.
    pub fn from_environment() -> io::Result<Notifier> {
        match std::env::var_os(ENVIRONMENT_VARIABLE) {
            Some(address) if !address.is_empty() => Notifier::to(&address),
            _ => Ok(Notifier::default()),
        }
    }

    /// As [`Notifier::from_environment`], with the address given; nodes get it from the front.
    ///
    /// # Errors
    /// As there.
    pub fn to(address: &OsStr) -> io::Result<Notifier> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(address)?,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let socket = UnixDatagram::unbound()?;
        // A manager that does not read must not stop a service.
        socket.set_nonblocking(true)?;
        Ok(Notifier {
            manager: Some((socket, address)),
        })
    }

    /// The service is protected.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// The service's state as a sentence.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", one_line(status)));
    }

    /// The main process is another one now, by its pid on the host. A manager believes this only
    /// of a process inside the unit's control group.
    pub fn main_pid(&self, pid: i32) {
        self.send(&format!("MAINPID={pid}"));
    }

    /// The service is ending on purpose.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Telling is a courtesy: a manager that is gone or busy is no error of ours.
    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.manager {
            let _ = socket.send_to_addr(message.as_bytes(), address);
        }
    }
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_root::TestRoot;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).expect("receive");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn to_a_path() {
        let root = TestRoot::new();
        let path = root.path().join("manager");
        let manager = UnixDatagram::bind(&path).expect("bind");
        let notifier = Notifier::to(path.as_os_str()).expect("address");
        notifier.ready("protected\nby a standby");
        assert_eq!(received(&manager), "READY=1\nSTATUS=protected by a standby");
        notifier.main_pid(42);
        assert_eq!(received(&manager), "MAINPID=42");
        notifier.stopping();
        assert_eq!(received(&manager), "STOPPING=1");
        drop(manager);
        notifier.status("nobody listens");
    }

    #[test]
    fn to_an_abstract_name() {
        let name = format!("unbroken-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("address");
        let manager = UnixDatagram::bind_addr(&address).expect("bind");
        let notifier = Notifier::to(OsStr::new(&format!("@{name}"))).expect("address");
        notifier.status("syncing");
        assert_eq!(received(&manager), "STATUS=syncing");
    }

    #[test]
    fn nonsense_is_refused_and_nobody_is_silent() {
        assert!(Notifier::to(OsStr::new("relative")).is_err());
        Notifier::default().ready("");
    }
}
