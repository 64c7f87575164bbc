//! The command line as data. Parsing touches nothing: it only says what was asked for.

use crate::exit::{Exit, Failure};
use clap::error::{ContextKind, ErrorKind};
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::net::IpAddr;
use unbroken_node::directory::ServiceName;
use unbroken_node::publish::PublishedPort;

const ABOUT: &str = "Keeps an unmodified TCP server alive through the death of its process.

The server runs as it is; a warm replica of its whole process tree stands by. When the server dies \
the replica goes on in its place: same connections, same bytes, none lost, none doubled.";

const EXAMPLES: &str = "Examples:
  sudo unbroken check                                   can this machine do it?
  sudo unbroken run --name echo --publish 7000 -- /usr/local/bin/echo-server --port 7000
  sudo unbroken status                                  how do my services stand?
  sudo unbroken switchover echo                         move it to the replica now
  sudo unbroken stop echo

Exit codes: below 70 and above 128 the service's own; the others are listed in docs/ERRORS.md.";

#[derive(Debug, Parser)]
#[command(
    name = "unbroken",
    version,
    about = "Keeps an unmodified TCP server alive through the death of its process",
    long_about = ABOUT,
    after_help = EXAMPLES,
    disable_help_subcommand = true
)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand, PartialEq)]
pub enum Command {
    /// Run a server with a replica standing by
    Run(RunFlags),
    /// Stand by for a service on another machine (not in this version)
    Standby(StandbyFlags),
    /// Show how services stand
    Status(StatusFlags),
    /// Hand a service to its replica, losing nothing
    Switchover(NameFlags),
    /// End a service
    Stop(NameFlags),
    /// Say what this machine can do, and the fix for what it cannot
    Check(CheckFlags),
}

#[derive(Args, Debug, PartialEq)]
#[command(override_usage = "unbroken run [OPTIONS] -- COMMAND [ARG...]")]
pub struct RunFlags {
    /// Name of the service: 1 to 32 of a-z 0-9 - _ . [default: from the command]
    #[arg(long)]
    pub name: Option<ServiceName>,

    /// The service's own address, IPv4 or IPv6 [default: a free one]
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,

    /// Lead a TCP port of this host to the service; may be repeated
    #[arg(long, value_name = "[IP:]PORT[:SERVICE_PORT]")]
    pub publish: Vec<PublishedPort>,

    /// Where the replica stands: local, or HOST:PORT of another machine (not in this version)
    #[arg(long, value_name = "local|HOST:PORT", default_value = "local")]
    pub standby: String,

    /// Run the server as this user, and group
    #[arg(long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Return as soon as the service is protected
    #[arg(long)]
    pub detach: bool,

    /// The server and its arguments; it need not stay in the foreground
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub command: Vec<OsString>,
}

#[derive(Args, Debug, PartialEq)]
pub struct StandbyFlags {
    /// Where to wait for the service's machine
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: String,
}

#[derive(Args, Debug, PartialEq)]
pub struct StatusFlags {
    /// Only this service, in detail [default: all]
    pub name: Option<ServiceName>,

    /// For programs: an object with NAME, else an array of them
    #[arg(long)]
    pub json: bool,

    /// For programs: all that was counted since the start, with every histogram, as an object
    #[arg(long, requires = "name", conflicts_with = "json")]
    pub histograms: bool,
}

#[derive(Args, Debug, PartialEq)]
pub struct NameFlags {
    /// Name of the service
    pub name: ServiceName,
}

#[derive(Args, Debug, PartialEq)]
pub struct CheckFlags {
    /// For programs: an array of objects
    #[arg(long)]
    pub json: bool,
}

/// What a command line asks for.
#[derive(Debug, PartialEq)]
pub enum Wish {
    Do(Command),
    /// Text that was asked for: help or version.
    Show(String),
}

/// Parses the arguments, the program's name first.
///
/// # Errors
/// [`Exit::Usage`] with one line.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Wish, Failure> {
    match CommandLine::try_parse_from(arguments) {
        Ok(line) => Ok(Wish::Do(line.command)),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                Ok(Wish::Show(error.render().to_string()))
            }
            _ => Err(Failure::new(Exit::Usage, one_line(&error))),
        },
    }
}

/// clap explains over several lines; the first says what is wrong, and help has the rest.
fn one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        || error.kind() == ErrorKind::MissingSubcommand
    {
        return "no subcommand is given; see `unbroken --help`".into();
    }
    let text = error.render().to_string();
    let mut lines = text.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    let first = first.strip_prefix("error: ").unwrap_or(first);
    // A list of what is missing follows the first line.
    let listed: Vec<&str> = match error.get(ContextKind::InvalidArg) {
        Some(_) if first.ends_with(':') => lines.take_while(|line| !line.is_empty()).collect(),
        _ => Vec::new(),
    };
    let space = if listed.is_empty() { "" } else { " " };
    let listed = listed.join(", ");
    format!("{first}{space}{listed}; see `unbroken --help`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Wish, Failure> {
        parse(line.split_whitespace().map(OsString::from))
    }

    fn refused(line: &str) -> String {
        let failure = parsed(line).expect_err(line);
        assert_eq!(failure.exit, Exit::Usage, "{line}");
        assert!(!failure.message.contains('\n'), "{line}");
        failure.message
    }

    #[test]
    fn the_table_is_consistent() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }

    #[test]
    fn run_takes_everything() {
        let wish = parsed(
            "unbroken run --name a-1 --address 10.9.0.1 --publish 80:8080 --publish [::1]:81 \
             --standby local --user www:adm --detach -- server --name x -d",
        );
        let Ok(Wish::Do(Command::Run(flags))) = wish else {
            panic!("{wish:?}");
        };
        assert_eq!(flags.name.expect("name").as_str(), "a-1");
        assert_eq!(flags.publish.len(), 2);
        assert_eq!(flags.user.as_deref(), Some("www:adm"));
        assert!(flags.detach);
        assert_eq!(flags.command, ["server", "--name", "x", "-d"]);
    }

    #[test]
    fn mistakes_are_one_line() {
        assert!(refused("unbroken").contains("no subcommand"));
        assert!(refused("unbroken dance").contains("dance"));
        assert!(refused("unbroken run").contains("COMMAND"));
        assert!(refused("unbroken run --name Big -- x").contains("'B'"));
        assert!(refused("unbroken run --address 1.2.3 -- x").contains("1.2.3"));
        assert!(refused("unbroken run --publish 0 -- x").contains("65535"));
        assert!(refused("unbroken run --frobnicate -- x").contains("--frobnicate"));
        assert!(refused("unbroken stop").contains("NAME"));
        assert!(refused("unbroken stop a b").contains("'b'"));
        assert!(refused("unbroken standby").contains("--listen"));
    }

    #[test]
    fn help_fits_a_screen() {
        for line in ["unbroken --help", "unbroken -h", "unbroken run --help"] {
            let Ok(Wish::Show(text)) = parsed(line) else {
                panic!("{line} shows nothing");
            };
            assert!(text.lines().count() <= 40, "{line}: {text}");
            assert!(!text.contains("__"), "{line} shows what is internal");
        }
    }

    #[test]
    fn fuzz_command_line() {
        let samples = [
            "unbroken run --name chat --publish 6667 --address 10.0.0.9 --user u:g -- /bin/x -f",
            "unbroken run --standby local --detach --publish [::1]:80:8080 -- x",
            "unbroken status chat --json",
            "unbroken switchover chat",
            "unbroken stop chat",
            "unbroken check --json",
            "unbroken standby --listen [::]:7000",
        ];
        unbroken_fuzz::text("command-line", &samples, |text| {
            let _ = parse(text.split(' ').map(OsString::from));
        });
    }
}
