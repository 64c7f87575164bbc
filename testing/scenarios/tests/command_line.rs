//! The command line is a contract: what it prints, what it gives back, what it leaves behind.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use unbroken_clients::{churn, config};
use unbroken_harness::{
    Ended, KillPlan, Launch, Marker, Outcome, PATIENCE, Scratch, Service, Signal, Status, Target,
    assert_gone, program, run_to_end, send, wait_until,
};
use unbroken_scenarios::{PORT, host, own_server, survive};

/// Exit codes from here on are the program's own, not the service's.
const OWN_CODES_FROM: i32 = 70;

/// Runs the program to its end under a name of its own and checks that nothing is left.
fn run_alone(purpose: &str, arguments: &[&str], command: &[&str]) -> Result<Outcome> {
    let name = format!("t-{purpose}-{}", std::process::id());
    let marker = Marker::new(&name);
    let mut words = vec!["run", "--name", &name];
    words.extend(arguments);
    words.push("--");
    words.extend(command);
    let outcome = run_to_end(&words, Some(&marker))?;
    assert_gone(&name, &marker)?;
    Ok(outcome)
}

fn assert_refused(outcome: &Outcome, mention: &str) -> Result<()> {
    ensure!(
        outcome.code().is_some_and(|code| code >= OWN_CODES_FROM),
        "{outcome:?}"
    );
    ensure!(
        outcome.stderr.contains(mention),
        "no word of {mention:?}: {outcome:?}"
    );
    Ok(())
}

#[test]
fn the_exit_code_of_the_service_is_the_exit_code_of_run() -> Result<()> {
    host()?;
    for code in [0, 1, 7, 42] {
        let outcome = run_alone("exit", &[], &["/bin/sh", "-c", &format!("exit {code}")])?;
        ensure!(outcome.code() == Some(code), "{outcome:?}");
    }
    Ok(())
}

#[test]
fn a_service_that_ends_right_away_has_said_what_it_said() -> Result<()> {
    host()?;
    let outcome = run_alone("echo", &[], &["/bin/echo", "last", "words"])?;
    ensure!(outcome.code() == Some(0), "{outcome:?}");
    ensure!(outcome.stdout.contains("last words\n"), "{outcome:?}");
    Ok(())
}

/// Shows its own limits, ignored signals and mask.
const WHAT_CAME: [&str; 3] = ["/bin/cat", "/proc/self/limits", "/proc/self/status"];

/// The lines of that which a caller sets.
fn what_came(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let lines = text.lines().filter(|line| {
        ["Max ", "SigIgn", "SigBlk"]
            .iter()
            .any(|name| line.starts_with(name))
    });
    lines.map(str::to_owned).collect()
}

/// The limits would be too low for processes of ours: of files of 1 MB no journal can be made.
#[test]
fn the_limits_and_signals_of_the_caller_are_the_service_s() -> Result<()> {
    host()?;
    let name = format!("t-came-{}", std::process::id());
    let caller = || {
        let mut command = Command::new("env");
        command.args(["--ignore-signal=HUP,PIPE,CHLD", "--block-signal=USR2,TERM"]);
        command.args(["prlimit", "--nofile=300:", "--fsize=1000000:", "--cpu=60:"]);
        command.args(["--as=400000000:"]);
        command
    };
    let plain = caller().args(WHAT_CAME).output()?;
    let protected = caller()
        .arg(program()?)
        .args(["run", "--name", &name, "--"])
        .args(WHAT_CAME)
        .output()?;
    ensure!(protected.status.success(), "{protected:?}");
    let (wanted, got) = (what_came(&plain.stdout), what_came(&protected.stdout));
    ensure!(wanted.len() >= 18 && wanted == got, "{wanted:#?} {got:#?}");
    Ok(())
}

#[test]
fn a_limit_that_we_cannot_live_with_is_named_before_anything_starts() -> Result<()> {
    host()?;
    let outcome = Command::new("prlimit")
        .args(["--nofile=500:500", "--"])
        .arg(program()?)
        .args(["run", "--", "/bin/true"])
        .output()?;
    let stderr = String::from_utf8_lossy(&outcome.stderr);
    ensure!(outcome.status.code() == Some(72), "{outcome:?}");
    ensure!(
        stderr.contains("ulimit -n") && stderr.contains("500"),
        "{stderr}"
    );
    Ok(())
}

#[test]
fn a_command_that_does_not_exist_is_named() -> Result<()> {
    host()?;
    let outcome = run_alone("missing", &[], &["/nonexistent/server"])?;
    assert_refused(&outcome, "/nonexistent/server")
}

#[test]
fn a_command_that_may_not_be_executed_is_named() -> Result<()> {
    host()?;
    let outcome = run_alone("denied", &[], &["/etc/passwd"])?;
    assert_refused(&outcome, "/etc/passwd")
}

#[test]
fn bad_arguments_are_refused() -> Result<()> {
    host()?;
    let cases: [&[&str]; 6] = [
        &["run"],
        &["run", "--publish", "banana", "--", "/bin/true"],
        &["run", "--address", "no-address", "--", "/bin/true"],
        &["run", "--user", "no-such-user-here", "--", "/bin/true"],
        &["run", "--no-such-flag", "--", "/bin/true"],
        &["no-such-command"],
    ];
    for arguments in cases {
        let outcome = run_to_end(arguments, None)?;
        ensure!(
            outcome.code().is_some_and(|code| code >= OWN_CODES_FROM),
            "{outcome:?}"
        );
        ensure!(
            !outcome.stderr.trim().is_empty(),
            "{arguments:?} was refused without a word"
        );
        let flag_value = arguments.get(2).copied().unwrap_or_default();
        ensure!(outcome.stderr.contains(flag_value), "{outcome:?}");
    }
    Ok(())
}

#[test]
fn a_service_that_is_not_there_is_no_crash() -> Result<()> {
    host()?;
    for command in ["status", "stop", "switchover"] {
        let outcome = run_to_end(&[command, "t-nobody"], None)?;
        assert_refused(&outcome, "t-nobody")?;
    }
    Ok(())
}

#[test]
fn a_name_is_given_once() -> Result<()> {
    host()?;
    let (service, _) = own_server("echo-server")?;
    let words = ["run", "--name", service.name(), "--", "/bin/true"];
    assert_refused(&run_to_end(&words, None)?, service.name())?;
    ensure!(service.status()?.is_protected());
    service.stop()?;
    Ok(())
}

#[test]
fn status_says_all_that_it_promises() -> Result<()> {
    host()?;
    let (service, address) = own_server("echo-server")?;
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])?;
    let status = service.status()?;
    ensure!(
        status.missing_keys().is_empty(),
        "missing {:?}",
        status.missing_keys()
    );
    ensure!(status.name == service.name() && status.address == address.ip());
    ensure!(
        !status.service_pids.is_empty() && status.primary_pid.is_some(),
        "{status:?}"
    );
    let all = run_to_end(&["status", "--json"], None)?;
    let list: serde_json::Value = serde_json::from_str(&all.stdout)?;
    let names = list
        .as_array()
        .context("status --json without a name prints a list")?;
    ensure!(
        names.iter().any(|entry| entry["name"] == service.name()),
        "{list}"
    );
    let table = run_to_end(&["status"], None)?;
    ensure!(table.stdout.contains(service.name()), "{table:?}");
    service.stop()?;
    Ok(())
}

#[test]
fn processes_are_shown_by_name_and_role() -> Result<()> {
    host()?;
    let (service, _) = own_server("churn-server")?;
    let assert_shown = |pid: Option<i32>, role: &str| -> Result<()> {
        let pid = pid.context("no such process")?;
        let read = |what: &str| fs::read_to_string(format!("/proc/{pid}/{what}"));
        let (program, line) = (read("comm")?, read("cmdline")?);
        let line = line.trim_end_matches('\0');
        ensure!(program == "unbroken\n", "{program:?}");
        ensure!(
            line == format!("unbroken: {} {role}", service.name()),
            "{line:?}"
        );
        Ok(())
    };
    let before = service.wait_protected()?;
    assert_shown(before.primary_pid, "primary")?;
    assert_shown(before.standby_pid, "standby")?;
    service.kill(Target::Service, Signal::SIGKILL)?;
    let after = service.wait_for("a takeover", |status| {
        status.takeovers == 1 && status.is_protected()
    })?;
    ensure!(after.primary_pid == before.standby_pid, "{after:?}");
    assert_shown(after.primary_pid, "primary")?;
    assert_shown(after.standby_pid, "standby")?;
    service.stop()?;
    Ok(())
}

#[test]
fn signals_are_passed_on() -> Result<()> {
    host()?;
    // The shell waits in a builtin, so there is one process and it is protected.
    let script =
        "trap 'echo hup' HUP; trap 'exit 9' TERM; while :; do read -t 1 -u 3; done 3<> <(:)";
    let command = ["/bin/bash", "-c", script].map(String::from).to_vec();
    signals_reach(Service::start(&Launch::new("signals", command))?)
}

#[test]
fn signals_are_passed_on_to_a_service_that_forks_all_the_time() -> Result<()> {
    host()?;
    let script = "trap 'echo hup' HUP; trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done";
    let command = ["/bin/sh", "-c", script].map(String::from).to_vec();
    let service = Service::spawn(&Launch::new("forks", command))?;
    wait_until("the first word", PATIENCE, || {
        Ok(service.printed().0.contains("up").then_some(()))
    })?;
    signals_reach(service)
}

/// SIGHUP makes the service speak, SIGTERM makes it end with 9.
fn signals_reach(mut service: Service) -> Result<()> {
    send(service.front_pid(), Signal::SIGHUP)?;
    wait_until("the answer to SIGHUP", PATIENCE, || {
        Ok(service.printed().0.contains("hup").then_some(()))
    })?;
    send(service.front_pid(), Signal::SIGTERM)?;
    let ended = service.wait_end()?;
    ensure!(ended == Ended::Exit(9), "{ended:?}");
    service.assert_gone()
}

#[test]
fn a_published_port_reaches_the_service_through_a_kill() -> Result<()> {
    let mut random = host()?;
    let publish = format!("127.0.0.1:18000:{PORT}");
    let launch = Launch::new("publish", config::own_program("churn-server", PORT)?)
        .option(&["--publish", &publish]);
    let service = Service::start(&launch)?;
    service.listening(PORT)?;
    let load = churn::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 18000)), 3)?;
    survive(
        service,
        load,
        &KillPlan::new(Target::Service, 2),
        &mut random,
    )?;
    Ok(())
}

#[test]
fn the_address_can_be_chosen() -> Result<()> {
    host()?;
    let launch = Launch::new("address", config::own_program("echo-server", PORT)?)
        .option(&["--address", "10.77.0.9"]);
    let service = Service::start(&launch)?;
    let address = service.listening(PORT)?;
    ensure!(address.ip() == Ipv4Addr::new(10, 77, 0, 9), "{address}");
    service.stop()?;
    Ok(())
}

#[test]
fn the_service_runs_as_the_user_it_was_given() -> Result<()> {
    host()?;
    let outcome = run_alone("user", &["--user", "nobody"], &["/usr/bin/id", "-u", "-n"])?;
    ensure!(
        outcome.code() == Some(0) && outcome.stdout.contains("nobody"),
        "{outcome:?}"
    );
    Ok(())
}

/// A service that nobody waits for, which a test that fails must not leave running.
struct Detached<'a>(&'a Marker);

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        for (pid, _) in self.0.processes() {
            let _ = send(pid, Signal::SIGKILL);
        }
    }
}

#[test]
fn detached_it_goes_on_without_us() -> Result<()> {
    host()?;
    let name = format!("t-detach-{}", std::process::id());
    let marker = Marker::new(&name);
    let _detached = Detached(&marker);
    let command = config::own_program("echo-server", PORT)?;
    let mut words = vec!["run", "--name", &name, "--detach", "--"];
    words.extend(command.iter().map(String::as_str));
    let outcome = run_to_end(&words, Some(&marker))?;
    ensure!(outcome.code() == Some(0), "{outcome:?}");
    let status = Status::parse(&run_to_end(&["status", &name, "--json"], None)?.stdout)?;
    let mut stream = wait_until("a listener", PATIENCE, || {
        Ok(TcpStream::connect((status.address, PORT)).ok())
    })?;
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])?;
    let outcome = run_to_end(&["stop", &name], None)?;
    ensure!(outcome.code() == Some(0), "{outcome:?}");
    assert_gone(&name, &marker)
}

/// What cannot be protected is told, and runs on.
#[test]
fn detached_and_not_protected_is_said() -> Result<()> {
    host()?;
    let name = format!("t-hindered-{}", std::process::id());
    let marker = Marker::new(&name);
    let _detached = Detached(&marker);
    let with_terminal = "exec 9<>/dev/ptmx; exec sleep 1000";
    let command = ["/bin/sh", "-c", with_terminal];
    let mut words = vec!["run", "--name", &name, "--detach", "--"];
    words.extend(command);
    let outcome = run_to_end(&words, Some(&marker))?;
    ensure!(outcome.code() == Some(82), "{outcome:?}");
    ensure!(outcome.stderr.contains("terminal"), "{outcome:?}");
    let status = Status::parse(&run_to_end(&["status", &name, "--json"], None)?.stdout)?;
    ensure!(status.state == "unprotected", "{status:?}");
    let outcome = run_to_end(&["stop", &name], None)?;
    ensure!(outcome.code() == Some(0), "{outcome:?}");
    assert_gone(&name, &marker)
}

/// Each thing once, and nothing of what passes by itself.
#[test]
fn a_death_is_told_and_how_long_it_took() -> Result<()> {
    host()?;
    let (service, _) = own_server("churn-server")?;
    service.wait_protected()?;
    service.kill(Target::Service, Signal::SIGKILL)?;
    service.wait_for("a takeover", |status| {
        status.takeovers == 1 && status.is_protected()
    })?;
    let cause = service.status()?.whole["last_takeover_cause"].clone();
    ensure!(cause == "the service was killed by signal 9", "{cause}");
    let told = wait_until("the news", PATIENCE, || {
        let (_, stderr) = service.printed();
        Ok(stderr.contains("went on after").then_some(stderr))
    })?;
    let lines: Vec<&str> = told.lines().collect();
    ensure!(
        lines.len() == 2
            && lines[0].contains("is protected at")
            && lines[1].contains("killed by signal 9; its replica went on after"),
        "{told}"
    );
    service.stop()?;
    Ok(())
}

/// A lock, or the end of a pipe, that a shell had open when it started a service would stay so for
/// as long as the service lives.
#[test]
fn nothing_of_whoever_started_it_is_kept_open() -> Result<()> {
    host()?;
    let scratch = Scratch::new("open")?;
    let opened = scratch.path().join("opened");
    let name = format!("t-open-{}", std::process::id());
    let marker = Marker::new(&name);
    let _detached = Detached(&marker);
    let (variable, value) = marker.variable();
    let started = Command::new("sh")
        .args(["-c", "exec \"$@\" 9> \"$0\""])
        .arg(&opened)
        .arg(program()?)
        .args(["run", "--name", &name, "--detach", "--"])
        .args(config::own_program("echo-server", PORT)?)
        .env(variable, value)
        .stdout(Stdio::null())
        .status()?;
    ensure!(started.success(), "{started}");
    let status = wait_until("protection", PATIENCE, || {
        let shown = run_to_end(&["status", &name, "--json"], None)?;
        let status = Status::parse(&shown.stdout)?;
        Ok(status.is_protected().then_some(status))
    })?;
    let processes = marker.processes();
    let of_ours = [status.primary_pid, status.standby_pid];
    let mut known = of_ours.into_iter().flatten().chain(status.service_pids);
    ensure!(known.all(|pid| processes.iter().any(|(other, _)| *other == pid)));
    for (pid, line) in processes {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let target = fs::read_link(entry?.path()).unwrap_or_default();
            ensure!(target != opened, "process {pid} has it open: {line}");
        }
    }
    let outcome = run_to_end(&["stop", &name], None)?;
    ensure!(outcome.code() == Some(0), "{outcome:?}");
    assert_gone(&name, &marker)
}

#[test]
fn check_finds_this_machine_fit() -> Result<()> {
    host()?;
    let outcome = run_to_end(&["check", "--json"], None)?;
    ensure!(outcome.code() == Some(0), "{outcome:?}");
    let _: serde_json::Value = serde_json::from_str(&outcome.stdout)?;
    Ok(())
}
