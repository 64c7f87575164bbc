//! The node's side of starting stage init and the first process of a service or replica.

use super::Stage;
use super::error::Error;
use crate::channel::{receive, send};
use crate::inherited::Inherited;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use unbroken_image::Pid;
use unbroken_sys::channel::Channel;
use unbroken_sys::clone;

/// The hidden subcommand under which the program becomes stage init.
pub const INIT_SUBCOMMAND: &str = "__init";

/// The service's first process, in its own pid namespace; the same in every replica.
pub const FIRST_PID: Pid = Pid(2);

/// Room that output of the service finds before it is read.
const OUTPUT_PIPE_BYTES: i32 = 1 << 20;

/// Whom the service runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub user: u32,
    pub group: u32,
    pub groups: Vec<u32>,
}

/// What stage init's child becomes.
#[derive(Clone, Debug)]
pub enum InitRole {
    Service {
        command: Vec<OsString>,
        identity: Option<Identity>,
        inherited: Inherited,
    },
    /// An empty process for a replica to be built in.
    Stub,
}

/// What init is told first; the command itself comes as its arguments.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub service: bool,
    pub first_pid: i32,
    pub identity: Option<Identity>,
    /// Of the service alone.
    pub inherited: Inherited,
}

/// What init tells.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum InitMessage {
    FirstExited { wait_status: i32 },
    AllExited { wait_status: i32 },
    Failed { step: String, errno: i32 },
}

/// What the node tells the child, and what the child answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ChildRequest {
    InstallFilter,
    Execute,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ChildAnswer {
    Hello,
    /// With the listener.
    FilterInstalled,
    FilterFailed {
        errno: i32,
    },
    IdentityFailed {
        errno: i32,
    },
    ExecuteFailed {
        errno: i32,
    },
}

/// News of the processes inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitReport {
    /// The first process has ended; others may live on (a service that went to the background).
    FirstExited(ExitStatus),
    /// The last process has ended, with this status; init ends too.
    AllExited(ExitStatus),
    /// Init is gone, and with it every process inside.
    InitGone,
}

/// The node's connection to stage init.
///
/// Init ends, and the kernel kills everything inside, when the last duplicate of this connection
/// is closed: hand one to every process of ours that the service shall outlive the others with.
#[derive(Debug)]
pub struct Init {
    control: Channel,
    /// As this process sees it.
    pub host_pid: i32,
}

/// What the service prints.
#[derive(Debug)]
pub struct Output {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// The first process before it is anything: it waits for [`Pending::install_filter`], so that its
/// tracer can seize it by `host_pid` first.
#[derive(Debug)]
pub struct Pending {
    channel: Channel,
    pub host_pid: i32,
    command: String,
}

impl Stage {
    /// Starts stage init, which starts the first process. Once for each stage.
    ///
    /// The program is this process's own (`/proc/self/exe` with [`INIT_SUBCOMMAND`]); the service
    /// gets this process's environment and the stage thread's working directory. Init becomes a
    /// child of the stage thread: a tracer that waits for its own children and tracees only
    /// (`__WNOTHREAD`) never reaps it by accident.
    pub fn spawn_init(&self, role: InitRole) -> Result<(Init, Pending, Option<Output>), Error> {
        let (control, init_end) = pair()?;
        let (channel, child_end) = pair()?;
        channel
            .want_sender_pid()
            .map_err(Error::during("ask for the service's pid"))?;
        let (command, plan) = match role {
            InitRole::Service {
                command,
                identity,
                inherited,
            } => (command, plan(true, identity, inherited)),
            InitRole::Stub => (Vec::new(), plan(false, None, Inherited::default())),
        };
        let shown = command
            .first()
            .map_or_else(String::new, |name| name.display().to_string());
        let (output, ends) = if plan.service {
            output_pipes()?
        } else {
            (None, None)
        };
        let (stdout, stderr) = ends.unwrap_or((Stdio::null(), Stdio::null()));
        let spawned = self.run(move || {
            Command::new("/proc/self/exe")
                .arg0("unbroken: init")
                .arg(INIT_SUBCOMMAND)
                .args(command)
                .stdin(OwnedFd::from(init_end))
                .stdout(stdout)
                .stderr(stderr)
                .spawn()
        })?;
        let host_pid = spawned.map_err(Error::during("start stage init"))?.id() as i32;
        let init = Init { control, host_pid };
        send(&init.control, &plan, &[child_end.as_fd()]).map_err(|_| Error::InitGone)?;
        drop(child_end);
        let mut pending = Pending {
            channel,
            host_pid: 0,
            command: shown,
        };
        let (answer, _, sender) = pending.answer().map_err(|error| init.explain(error))?;
        match (answer, sender) {
            (ChildAnswer::Hello, Some(pid)) => pending.host_pid = pid,
            _ => return Err(init.explain(Error::InitGone)),
        }
        Ok((init, pending, output))
    }
}

fn plan(service: bool, identity: Option<Identity>, inherited: Inherited) -> Plan {
    Plan {
        service,
        first_pid: FIRST_PID.0,
        identity,
        inherited,
    }
}

type OutputEnds = (Option<Output>, Option<(Stdio, Stdio)>);

fn output_pipes() -> Result<OutputEnds, Error> {
    let pipe = || clone::pipe(OUTPUT_PIPE_BYTES).map_err(Error::during("make an output pipe"));
    let (stdout, stdout_end) = pipe()?;
    let (stderr, stderr_end) = pipe()?;
    Ok((
        Some(Output { stdout, stderr }),
        Some((stdout_end.into(), stderr_end.into())),
    ))
}

fn pair() -> Result<(Channel, Channel), Error> {
    Channel::pair().map_err(Error::during("connect to stage init"))
}

impl Init {
    /// Takes over the connection from another process of ours.
    pub fn adopt(control: OwnedFd, host_pid: i32) -> Init {
        Init {
            control: control.into(),
            host_pid,
        }
    }

    /// To be polled for reading, and to be passed on to other processes of ours.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// Waits for the next report.
    pub fn report(&self) -> Result<InitReport, Error> {
        match receive::<InitMessage>(&self.control) {
            Ok((InitMessage::FirstExited { wait_status }, ..)) => {
                Ok(InitReport::FirstExited(ExitStatus::from_raw(wait_status)))
            }
            Ok((InitMessage::AllExited { wait_status }, ..)) => {
                Ok(InitReport::AllExited(ExitStatus::from_raw(wait_status)))
            }
            Ok((InitMessage::Failed { step, errno }, ..)) => Err(Error::Preparation {
                step,
                source: io::Error::from_raw_os_error(errno),
            }),
            Err(_) => Ok(InitReport::InitGone),
        }
    }

    /// What init said before it went, if it did.
    fn explain(&self, fallback: Error) -> Error {
        self.report().err().unwrap_or(fallback)
    }
}

impl Pending {
    /// Has the process put itself under the filter, and returns the listener.
    ///
    /// From then on its announced calls wait for a notifier, which must run before the next step.
    pub fn install_filter(&self) -> Result<OwnedFd, Error> {
        self.request(&ChildRequest::InstallFilter)?;
        match self.answer()? {
            (ChildAnswer::FilterInstalled, mut descriptors, _) if descriptors.len() == 1 => {
                Ok(descriptors.remove(0))
            }
            (ChildAnswer::FilterFailed { errno }, ..) => Err(Error::Preparation {
                step: "install the seccomp filter".into(),
                source: io::Error::from_raw_os_error(errno),
            }),
            _ => Err(Error::InitGone),
        }
    }

    /// Has the process become the command. Returns when it has, or with the reason why not.
    ///
    /// Its tracer may hold it at the exec event when this returns. Not for a stub.
    pub fn execute(self) -> Result<(), Error> {
        self.request(&ChildRequest::Execute)?;
        let answer = match receive::<ChildAnswer>(&self.channel) {
            // The channel is close-on-exec: its end is the success of exec, or a death that the
            // tracer and init report.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(_) => return Err(Error::InitGone),
            Ok((answer, ..)) => answer,
        };
        let command = self.command;
        match answer {
            ChildAnswer::ExecuteFailed {
                errno: libc::ENOENT,
            } => Err(Error::CommandNotFound { command }),
            ChildAnswer::ExecuteFailed {
                errno: libc::EACCES,
            } => Err(Error::CommandNotExecutable { command }),
            ChildAnswer::ExecuteFailed { errno } => Err(Error::CommandFailed {
                command,
                source: io::Error::from_raw_os_error(errno),
            }),
            ChildAnswer::IdentityFailed { errno } => Err(Error::Preparation {
                step: "take on the service's user".into(),
                source: io::Error::from_raw_os_error(errno),
            }),
            _ => Err(Error::InitGone),
        }
    }

    /// Our end of the channel of a stub, over which its replica gets descriptors. The stub ends
    /// when the last holder of this end does.
    pub fn into_channel(self) -> Channel {
        self.channel
    }

    fn request(&self, request: &ChildRequest) -> Result<(), Error> {
        send(&self.channel, request, &[]).map_err(|_| Error::InitGone)
    }

    fn answer(&self) -> Result<(ChildAnswer, Vec<OwnedFd>, Option<i32>), Error> {
        receive(&self.channel).map_err(|_| Error::InitGone)
    }
}
