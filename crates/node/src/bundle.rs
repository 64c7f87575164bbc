//! What a new node is given: the configuration, its role, and every descriptor that keeps the
//! service alive whoever dies.

use crate::channel;
use crate::config::Config;
use crate::title;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use unbroken_sys::channel::Channel;

/// What a node is started to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// Start the service and be its primary.
    Launch,
    /// Build a replica and stand by.
    Standby {
        primary_pid: i32,
        /// The running service's stage init, as the host numbers it.
        init_pid: i32,
        term: u64,
        /// What the primary knows of deaths right after takeovers.
        early_deaths: u32,
        live_since_ns: u64,
    },
}

/// What a descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Purpose {
    Lock,
    Control,
    /// Rung when the front should look at the status page.
    FrontBell,
    /// A pipe's end that nobody writes to: the front hears when the last node that holds it ends.
    Life,
    HostTun,
    /// Our own standard output and error: where the service's are released to.
    Output,
    ErrorOutput,
    /// Shared memory of the link between a primary and its standby.
    Epochs,
    Inputs,
    /// The end of its socket where references to files come out.
    References,
    /// pidfd of pid 1 of the running service's namespace.
    StageInit,
    /// The connection to it.
    StageControl,
    /// pidfd of the primary.
    Primary,
    /// What another node needs to adopt the running service.
    ServiceTun,
    ServiceNotify,
    ServiceOutput,
    ServiceErrorOutput,
}

#[derive(Serialize, Deserialize)]
struct Message {
    config: Config,
    start: Start,
    purposes: Vec<Purpose>,
}

pub struct Bundle {
    pub config: Config,
    pub start: Start,
    descriptors: BTreeMap<Purpose, OwnedFd>,
    /// To whoever started this node.
    pub channel: Channel,
}

impl Bundle {
    /// Takes the descriptor out; an error names what the starter forgot.
    pub fn take(&mut self, purpose: Purpose) -> io::Result<OwnedFd> {
        self.descriptors.remove(&purpose).ok_or_else(|| {
            io::Error::other(format!(
                "the starting process sent no {purpose:?} descriptor"
            ))
        })
    }

    /// As [`Bundle::take`], for one that may be missing.
    pub fn take_if_sent(&mut self, purpose: Purpose) -> Option<OwnedFd> {
        self.descriptors.remove(&purpose)
    }

    /// Receives the bundle that `spawn` sent over `channel`.
    pub fn receive(channel: Channel) -> io::Result<Bundle> {
        let (message, descriptors, _) = channel::receive::<Message>(&channel)?;
        if message.purposes.len() != descriptors.len() {
            return Err(io::Error::other(
                "the starting process sent too few descriptors",
            ));
        }
        let descriptors = message.purposes.into_iter().zip(descriptors).collect();
        Ok(Bundle {
            config: message.config,
            start: message.start,
            descriptors,
            channel,
        })
    }
}

/// Starts a node of this same program and sends it its bundle. Returns the child and our end of
/// the channel.
pub fn spawn(
    config: &Config,
    start: Start,
    descriptors: &[(Purpose, BorrowedFd<'_>)],
) -> io::Result<(Child, Channel)> {
    let (ours, theirs) = Channel::pair()?;
    let child = {
        // The child finds its end as its standard input: no number to agree on, nothing else of
        // ours is inherited, and what we hold is closed on exec.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(title::with_room(&config.name))
            .arg("__node")
            .stdin(OwnedFd::from(theirs));
        // The front alone speaks to the service manager; the service, which has this environment,
        // would report in our name.
        command.env_remove(crate::notify::ENVIRONMENT_VARIABLE);
        command.spawn()?
    };
    let purposes = descriptors.iter().map(|&(purpose, _)| purpose).collect();
    let message = Message {
        config: config.clone(),
        start,
        purposes,
    };
    let borrowed: Vec<_> = descriptors
        .iter()
        .map(|&(_, descriptor)| descriptor)
        .collect();
    channel::send(&ours, &message, &borrowed)?;
    Ok((child, ours))
}
