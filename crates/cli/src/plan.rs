//! What `unbroken run` is asked for: what can be found wrong with it is found before anything is
//! started.

use crate::command;
use crate::exit::{Exit, Failure};
use crate::flags::RunFlags;
use std::ffi::OsString;
use std::net::IpAddr;
use unbroken_node::config::UserIds;
use unbroken_node::directory::ServiceName;
use unbroken_node::publish::PublishedPort;
use unbroken_node::status_page::PUBLISHED_BYTES_MAX;

/// What is to be run, checked as far as that goes without starting it.
#[derive(Debug, PartialEq)]
pub struct Plan {
    pub name: ServiceName,
    pub address: Option<IpAddr>,
    pub published: Vec<PublishedPort>,
    pub user: Option<UserIds>,
    pub detach: bool,
    /// Program and arguments; the program can be executed.
    pub command: Vec<OsString>,
}

impl Plan {
    /// The plan of these flags; `path` is the value of PATH.
    ///
    /// # Errors
    /// What is wrong with one of them, with an exit code of its kind.
    pub fn new(flags: RunFlags, path: Option<OsString>) -> Result<Plan, Failure> {
        check_standby(&flags.standby)?;
        let program = flags.command.first().cloned().unwrap_or_default();
        command::find(&program, path)?;
        let name = flags
            .name
            .unwrap_or_else(|| ServiceName::from_command(&program.to_string_lossy()));
        check_ports(&flags.publish)?;
        let plan = Plan {
            name,
            address: flags.address,
            published: flags.publish,
            user: flags.user.as_deref().map(command::user).transpose()?,
            detach: flags.detach,
            command: flags.command,
        };
        // Other services read there which ports are taken: it must not be cut.
        if plan.published_text().len() > PUBLISHED_BYTES_MAX {
            let message =
                format!("--publish: the ports take more than {PUBLISHED_BYTES_MAX} bytes");
            return Err(Failure::new(Exit::Usage, message));
        }
        Ok(plan)
    }

    /// The command as a reader would type it.
    pub fn command_text(&self) -> String {
        let words = self.command.iter().map(|word| word.to_string_lossy());
        words.collect::<Vec<_>>().join(" ")
    }

    /// The published ports as they were given.
    pub fn published_text(&self) -> String {
        let ports = self.published.iter().map(PublishedPort::to_string);
        ports.collect::<Vec<_>>().join(", ")
    }
}

fn check_standby(standby: &str) -> Result<(), Failure> {
    match standby {
        "local" => Ok(()),
        other if other.contains(':') => Err(Failure::new(
            Exit::NotAvailable,
            format!(
                "cannot use the standby {other}: a standby on another machine is not available in \
                 this version; use --standby local"
            ),
        )),
        other => Err(Failure::new(
            Exit::Usage,
            format!("{other:?} is no standby; use --standby local"),
        )),
    }
}

/// The same port of the same address cannot lead to two places.
fn check_ports(ports: &[PublishedPort]) -> Result<(), Failure> {
    for (index, port) in ports.iter().enumerate() {
        let clashes = |other: &&PublishedPort| port.overlaps(other);
        if let Some(other) = ports[..index].iter().find(clashes) {
            return Err(Failure::new(
                Exit::Usage,
                format!("--publish {other} and --publish {port} are the same port of this host"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{Command, Wish, parse};

    fn plan(line: &str) -> Result<Plan, Failure> {
        let words = line.split_whitespace().map(OsString::from);
        match parse(words)? {
            Wish::Do(Command::Run(flags)) => Plan::new(flags, Some("/bin:/usr/bin".into())),
            other => panic!("{other:?}"),
        }
    }

    fn refused(line: &str) -> (Exit, String) {
        let failure = plan(line).expect_err(line);
        (failure.exit, failure.message)
    }

    #[test]
    fn a_plan_from_flags() {
        let plan = plan("unbroken run --publish 80 --user root:77 -- sh -c true").expect("plan");
        assert_eq!(plan.name.as_str(), "sh");
        assert_eq!(plan.command_text(), "sh -c true");
        assert_eq!(plan.published_text(), "80");
        assert_eq!(plan.user.expect("user").gid, 77);
    }

    #[test]
    fn each_mistake_has_its_code_and_names_its_subject() {
        let cases = [
            (
                "--standby other:7000 -- sh",
                Exit::NotAvailable,
                "other:7000",
            ),
            ("--standby remote -- sh", Exit::Usage, "remote"),
            ("--user no-such-user -- sh", Exit::Usage, "no-such-user"),
            ("-- no-such-command", Exit::Command, "no-such-command"),
            ("-- /etc/passwd", Exit::Command, "/etc/passwd"),
            (
                "--publish 80 --publish 127.0.0.1:80 -- sh",
                Exit::Usage,
                "127.0.0.1:80",
            ),
        ];
        for (flags, exit, subject) in cases {
            let (code, message) = refused(&format!("unbroken run {flags}"));
            assert_eq!(code, exit, "{flags}: {message}");
            assert!(message.contains(subject), "{flags}: {message}");
        }
        assert!(plan("unbroken run --publish 127.0.0.1:80 --publish 127.0.0.2:80 -- sh").is_ok());
    }
}
