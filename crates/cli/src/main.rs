#![forbid(unsafe_code)]
//! `unbroken`: reads the command line, asks the node, and says what came of it.

mod check;
mod command;
mod exit;
mod flags;
mod launch;
mod plan;
mod status;

use exit::{Exit, Failure};
use flags::{Command, NameFlags, StatusFlags, Wish};
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;
use unbroken_node::control::{self, ControlError, Request};
use unbroken_node::directory::RunDirectory;
use unbroken_node::{program, stage};

/// A switchover waits for a standby that is being filled and for one epoch.
const SWITCHOVER_PATIENCE: Duration = Duration::from_secs(60);
/// A service may take its time to end; a service manager's own default is 90 s.
const STOP_PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    // What we start ourselves: not for users, so not in the table of flags.
    match std::env::args_os().nth(1) {
        Some(word) if word == "__init" => stage::init::main(std::env::args_os().skip(2)),
        Some(word) if word == "__node" => std::process::exit(program::main()),
        _ => {}
    }
    let done = flags::parse(std::env::args_os()).and_then(|wish| match wish {
        Wish::Show(text) => show(&text),
        Wish::Do(command) => carry_out(command),
    });
    match done {
        Ok(code) => code,
        Err(failure) => {
            // With standard error closed there is nobody to tell.
            let _ = writeln!(io::stderr(), "{failure}");
            failure.exit.into()
        }
    }
}

fn carry_out(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Run(flags) => launch::launch(flags),
        Command::Standby(flags) => Err(Failure::new(
            Exit::NotAvailable,
            format!(
                "cannot stand by at {}: a standby on another machine is not available in this \
                 version; on one machine `unbroken run` starts it by itself",
                flags.listen
            ),
        )),
        Command::Status(flags) => show_status(&flags),
        Command::Switchover(flags) => ask(&flags, Request::Switchover, SWITCHOVER_PATIENCE),
        Command::Stop(flags) => ask(&flags, Request::Stop, STOP_PATIENCE),
        Command::Check(flags) => {
            let findings = check::findings();
            match flags.json {
                true => show(&format!("{:#}\n", check::json(&findings)))?,
                false => show(&check::table(&findings))?,
            };
            Ok(check::outcome(&findings).map_or(ExitCode::SUCCESS, ExitCode::from))
        }
    }
}

/// Writes to standard output. A reader that has seen enough (`| head`) is no failure.
fn show(text: &str) -> Result<ExitCode, Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(
            Exit::Internal,
            format!("cannot write to standard output: {error}"),
        )),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn show_status(flags: &StatusFlags) -> Result<ExitCode, Failure> {
    let in_colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if let Some(name) = &flags.name {
        if flags.histograms {
            return show(&format!("{}\n", status::totals(name)?));
        }
        let service = status::one(name)?;
        return match flags.json {
            true => show(&format!("{:#}\n", status::json(&service))),
            false => show(&status::detail(&service, in_colour)),
        };
    }
    let (services, failures) = status::all();
    if flags.json {
        let objects: Vec<_> = services.iter().map(status::json).collect();
        show(&format!("{:#}\n", serde_json::Value::from(objects)))?;
    } else {
        show(&status::overview(&services, in_colour))?;
    }
    // What could be read was shown; each of the others is said too.
    let mut failures = failures.into_iter();
    let Some(first) = failures.next() else {
        return Ok(ExitCode::SUCCESS);
    };
    for failure in failures {
        let _ = writeln!(io::stderr(), "{failure}");
    }
    Err(first)
}

fn ask(flags: &NameFlags, request: Request, patience: Duration) -> Result<ExitCode, Failure> {
    let directory = RunDirectory::new(flags.name.clone());
    control::ask(&directory, request, patience).map_err(|error| {
        let exit = match &error {
            ControlError::Io { .. } => Exit::Internal,
            ControlError::Rights { .. } => Exit::Rights,
            ControlError::NoService(_) => Exit::NoService,
            ControlError::Refused { .. } => Exit::Refused,
            ControlError::NoAnswer { .. } => Exit::NoAnswer,
        };
        Failure::new(exit, error)
    })?;
    Ok(ExitCode::SUCCESS)
}
