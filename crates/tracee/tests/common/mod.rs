//! Guests: this test program runs itself again, as the process that is traced.

// Each test program uses its own part.
#![allow(dead_code)]

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use unbroken_sys::ptrace;
use unbroken_tracee::{Event, HostTid, Stopped, Tree};

/// A running guest; killed when dropped.
pub struct Guest {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub stdout: BufReader<ChildStdout>,
}

impl Guest {
    /// Starts this program's test `guest` in the given role and waits for its line "ready".
    pub fn start(role: &str) -> Guest {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "guest", "--nocapture", "--test-threads=1"]);
        command.env("GUEST_ROLE", role);
        Guest::spawn(command)
    }

    pub fn spawn(mut command: Command) -> Guest {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn guest");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut guest = Guest {
            child,
            stdin,
            stdout,
        };
        guest.expect_line("ready");
        guest
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Reads lines up to one that contains `wanted`, and returns that.
    pub fn expect_line(&mut self, wanted: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let length = self.stdout.read_line(&mut line).unwrap();
            assert!(length > 0, "guest ended without saying {wanted:?}");
            if line.contains(wanted) {
                return line;
            }
        }
    }
}

impl Guest {
    /// Has the guest do something, with the tracer's thread free to pass its signals on.
    pub fn tell(&mut self, tree: &mut Tree, line: &str) {
        use std::io::Write;
        let bell = tree.bell();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
                self.expect_line("done");
                bell.ring();
            });
            // A child that it makes on the way is let go.
            while tree.wait().unwrap() != Event::Bell {}
        });
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // The tracer may have reaped it already.
        let _ = self.child.wait();
    }
}

/// The role of this process, `None` in the test runner itself.
pub fn role() -> Option<String> {
    std::env::var("GUEST_ROLE").ok()
}

/// A guest in Python, with its output unbuffered.
pub fn python(program: &str) -> Guest {
    let mut command = Command::new("python3");
    command.args(["-u", "-c", program]);
    Guest::spawn(command)
}

/// What the kernel says a thread does: `t` is stopped by its tracer.
pub fn state_letter(tid: HostTid) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap();
    stat[stat.rfind(')').unwrap() + 2..].chars().next().unwrap()
}

/// Ends tracing, as the death of the tracer would.
pub fn let_go(stopped: Stopped<'_>) {
    let threads = stopped.processes().flat_map(|process| process.threads());
    let tids: Vec<HostTid> = threads.map(|thread| thread.host_tid).collect();
    stopped.stay();
    for tid in tids {
        ptrace::detach(tid.0, 0).unwrap();
    }
}

/// Waits for a line of the guest with the tracer's thread free to pass its signals on.
pub fn wait_for_line(tree: &mut Tree, guest: &mut Guest, wanted: &str) -> String {
    let bell = tree.bell();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let line = guest.expect_line(wanted);
            bell.ring();
            line
        });
        assert_eq!(tree.wait().unwrap(), Event::Bell);
        reader.join().unwrap()
    })
}
