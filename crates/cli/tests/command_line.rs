//! The built program from outside: exit codes, and one line for every error.
//!
//! A running service is played by the test itself: it claims a name of its own below /run/unbroken
//! and answers on the control socket.

use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};
use unbroken_node::control::{Control, Request};
use unbroken_node::directory::{Claim, RunDirectory, ServiceName};
use unbroken_node::status_page::{Identity, ServiceState, StatusPage};

fn unbroken(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unbroken"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    unbroken(arguments).output().expect("the built program")
}

/// Runs it, expects `code` and one line on standard error, and returns that line.
fn error_line(arguments: &[&str], code: i32) -> String {
    one_line_of(&output(arguments), code)
}

fn one_line_of(output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("unbroken: "), "{text}");
    text
}

fn stdout(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {error}", output.status);
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// What was printed of all services. Another one of this machine may be of another version, or have been
/// left behind by a run that was killed: that is said, and is none of ours.
fn list(arguments: &[&str]) -> String {
    String::from_utf8(output(arguments).stdout).expect("text")
}

/// A service that the test plays; its directory goes with it.
struct Played {
    directory: RunDirectory,
    page: StatusPage,
    control: Control,
    claim: Option<Claim>,
}

impl Played {
    fn new(part: &str) -> Played {
        let name = format!("test-{part}-{}", std::process::id());
        let directory = RunDirectory::new(ServiceName::new(&name).expect("name"));
        let claim = directory.claim().expect("claim");
        let identity = Identity {
            command: "played by a test",
            address: "10.211.0.2",
            published: "7000",
        };
        let page = StatusPage::create(&directory, &identity).expect("status page");
        let control = Control::bind(&directory).expect("control");
        Played {
            directory,
            page,
            control,
            claim: Some(claim),
        }
    }

    fn name(&self) -> &str {
        self.directory.name().as_str()
    }

    /// Waits for the request of `asker` and answers it.
    fn answer(&self, mut asker: Child, wanted: Request, outcome: Result<(), &str>) -> Output {
        let (request, from) = loop {
            if let Some(received) = self.control.next_request().expect("receive") {
                break received;
            }
            assert!(asker.try_wait().expect("wait").is_none(), "it did not ask");
            std::thread::yield_now();
        };
        assert_eq!(request, wanted);
        self.control.answer(&from, outcome);
        asker.wait_with_output().expect("output")
    }

    fn asker(&self, subcommand: &str) -> Child {
        unbroken(&[subcommand, self.name()])
            .stderr(Stdio::piped())
            .spawn()
            .expect("the built program")
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        let _ = self.directory.remove();
    }
}

#[test]
fn usage_errors_end_with_73() {
    assert!(error_line(&[], 73).contains("no subcommand"));
    assert!(error_line(&["dance"], 73).contains("dance"));
    assert!(error_line(&["run"], 73).contains("COMMAND"));
    assert!(error_line(&["run", "--name", "NO", "--", "sh"], 73).contains("'N'"));
    assert!(error_line(&["run", "--publish", "70000", "--", "sh"], 73).contains("65535"));
    assert!(error_line(&["run", "--address", "x", "--", "sh"], 73).contains("--address"));
    assert!(error_line(&["run", "--user", "no-such", "--", "sh"], 73).contains("no-such"));
}

#[test]
fn a_command_that_cannot_be_run_ends_with_74_and_leaves_nothing() {
    let name = format!("test-command-{}", std::process::id());
    for command in [
        "no-such-command-here",
        "/no/such/file",
        "/etc/passwd",
        "/etc",
    ] {
        let line = error_line(&["run", "--name", &name, "--", command], 74);
        assert!(line.contains(command), "{line}");
        let directory = RunDirectory::new(ServiceName::new(&name).expect("name"));
        assert!(!directory.exists());
    }
}

#[test]
fn what_is_not_in_this_version_ends_with_79() {
    let line = error_line(&["standby", "--listen", "0.0.0.0:7000"], 79);
    assert!(line.contains("not available in this version"), "{line}");
    let line = error_line(&["run", "--standby", "other:7000", "--", "sh"], 79);
    assert!(line.contains("--standby local"), "{line}");
}

#[test]
fn an_unknown_service_ends_with_76() {
    for subcommand in ["status", "stop", "switchover"] {
        let line = error_line(&[subcommand, "no-such-service"], 76);
        assert!(line.contains("no-such-service"), "{line}");
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    let help = stdout(&output(&["--help"]));
    for word in ["run", "status", "switchover", "stop", "check"] {
        assert!(help.contains(word), "{word}");
    }
    assert!(help.lines().count() <= 40);
    assert!(stdout(&output(&["--version"])).starts_with("unbroken "));
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let status = unbroken(&["--help"]).stdout(writer).status();
    let status = status.expect("the built program");
    assert!(status.success() && status.signal().is_none(), "{status}");
}

#[test]
fn check_passes_here_and_says_so_in_both_forms() {
    let text = stdout(&output(&["check"]));
    assert!(
        text.ends_with("This machine can protect services.\n"),
        "{text}"
    );
    let json = stdout(&output(&["check", "--json"]));
    let findings: Value = serde_json::from_str(&json).expect("JSON");
    let findings = findings.as_array().expect("array");
    assert!(findings.len() > 10);
    for finding in findings {
        assert!(finding["subject"].is_string());
        assert_ne!(finding["verdict"], "missing", "{finding}");
    }
}

#[test]
fn status_shows_a_running_service() {
    let played = Played::new("status");
    played
        .page
        .set_state(ServiceState::Unprotected, "the standby died");
    played
        .page
        .set_service_pids(&[std::process::id().cast_signed()]);
    let json = stdout(&output(&["status", played.name(), "--json"]));
    let object: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(object["name"], played.name());
    assert_eq!(object["state"], "unprotected");
    assert_eq!(object["reason"], "the standby died");
    assert!(object["resident_bytes"].as_u64() > Some(0));
    assert!(object["standby_pid"].is_null());

    let json = list(&["status", "--json"]);
    let all: Value = serde_json::from_str(&json).expect("JSON");
    let all = all.as_array().expect("array");
    assert!(all.iter().any(|service| service["name"] == played.name()));

    let text = stdout(&output(&["status", played.name()]));
    assert!(text.contains("the standby died"), "{text}");
    assert!(!text.contains('\x1b'), "no colour outside a terminal");
    assert!(list(&["status"]).contains(played.name()));
}

#[test]
fn status_knows_the_dead() {
    let mut played = Played::new("dead");
    played.page.set_state(ServiceState::Protected, "");
    played.page.set_primary_pid(1);
    played.claim = None;
    let json = stdout(&output(&["status", played.name(), "--json"]));
    let object: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(object["state"], "failed");
    assert!(object["primary_pid"].is_null());
    let line = error_line(&["stop", played.name()], 76);
    assert!(line.contains("no service"), "{line}");
}

#[test]
fn a_name_that_is_taken_ends_with_75() {
    let played = Played::new("taken");
    let line = error_line(&["run", "--name", played.name(), "--", "sleep", "1"], 75);
    assert!(line.contains("already running"), "{line}");
    assert!(
        played.directory.status_page().exists(),
        "the running one is untouched"
    );
}

#[test]
fn stop_and_switchover_wait_for_the_answer() {
    let played = Played::new("control");
    let done = played.answer(played.asker("switchover"), Request::Switchover, Ok(()));
    assert!(done.status.success());
    let refused = Err("there is no standby yet");
    let done = played.answer(played.asker("switchover"), Request::Switchover, refused);
    assert!(one_line_of(&done, 77).contains("there is no standby yet"));
    let done = played.answer(played.asker("stop"), Request::Stop, Ok(()));
    assert!(done.status.success());
}
