//! The first primary of a service: it starts it.

use super::mailbox::Mailbox;
use super::tracer::{Tracer, deadlines_unseen};
use super::{Common, Primary, ServiceEnds};
use crate::bundle::Bundle;
use crate::capture::Capture;
use crate::config::Config;
use crate::kernel_program::KernelProgram;
use crate::log;
use crate::stage::launch::InitRole;
use crate::stage::notifier::{self, Announcements};
use crate::stage::rules::is_announced;
use crate::stage::{self, Stage, StageConfig};
use crate::status_page::ServiceState;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, mpsc};
use unbroken_core::give_up::{GiveUp, GiveUpLimits};
use unbroken_core::role::{Event, Role};
use unbroken_sys::affinity;
use unbroken_sys::bpf::DeadlineProgram;
use unbroken_tracee::{Bell, TraceError, Tree};
use unbroken_wire::exchange::Input;
use unbroken_wire::flows::{FlowLimits, Flows};

/// Why a service could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error(transparent)]
    Stage(#[from] stage::Error),
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error(transparent)]
    Capture(#[from] crate::capture::CaptureError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Starts the service and is its primary until it ends.
pub fn run(mut bundle: Bundle) -> io::Result<()> {
    let common = Common::of(&mut bundle)?;
    log::open(common.directory.path(), "primary")?;
    affinity::bind(0, &[common.config.spare_core])?;
    let mailbox = Mailbox::new()?;
    let (sender, started) = mpsc::channel();
    let (config, tracer_mailbox) = (common.config.clone(), mailbox.clone());
    std::thread::Builder::new()
        .name("tracer".to_owned())
        .spawn(move || {
            match start(&config, &tracer_mailbox) {
                Ok((ends, bell, tracer)) => {
                    if sender.send(Ok((ends, bell))).is_ok() {
                        tracer.run();
                    }
                }
                // The main thread waits for it.
                Err(error) => drop(sender.send(Err(error))),
            }
        })?;
    let outcome = started
        .recv()
        .map_err(|_| io::Error::other("the tracer thread died"))?;
    match outcome {
        Ok((ends, bell)) => {
            let mut role = Role::primary(GiveUp::new(GiveUpLimits::default()));
            let actions = role.apply(Event::Launched, crate::clock::now_ns());
            Primary::new(common, ends, role, mailbox, bell)?.run(actions)
        }
        Err(error) => {
            log!("not started: {error}");
            common
                .page
                .set_state(ServiceState::Failed, &error.to_string());
            common.page.set_exit(exit_code_of(&error));
            common.directory.remove()?;
            common.ring_front();
            Ok(())
        }
    }
}

/// The conventions of shells: 127 for a command that is not there, 126 for one that cannot be run.
fn exit_code_of(error: &LaunchError) -> u8 {
    match error {
        LaunchError::Stage(stage::Error::CommandNotFound { .. }) => 127,
        LaunchError::Stage(
            stage::Error::CommandNotExecutable { .. } | stage::Error::CommandFailed { .. },
        ) => 126,
        _ => 70,
    }
}

/// On the tracer thread: the stage, the service under its filter and seized, the notifier.
fn start(
    config: &Config,
    mailbox: &Arc<Mailbox>,
) -> Result<(ServiceEnds, Bell, Tracer), LaunchError> {
    let stage = Stage::create(StageConfig {
        addresses: config.addresses,
        mtu_bytes: config.mtu_bytes,
    })?;
    let command = config
        .command
        .iter()
        .cloned()
        .map(OsString::from_vec)
        .collect();
    let identity = config.user.clone().map(Into::into);
    let (init, pending, output) = stage.spawn_init(InitRole::Service {
        command,
        identity,
        inherited: config.inherited.clone(),
    })?;
    let output = output.ok_or_else(|| io::Error::other("the service has no output pipes"))?;
    affinity::bind(pending.host_pid, &[config.service_core])?;
    affinity::bind(0, &[config.service_core])?;
    let mut tree = Tree::seize(&[pending.host_pid], false)?;
    tree.see_announced(is_announced);
    let notify = Arc::new(pending.install_filter()?);
    let announcements = Announcements::new(config.bounds.announcements);
    start_notifier(notify.clone(), announcements.clone(), config.service_core)?;
    let host_pid = pending.host_pid;
    // The service's first waits are seen, too.
    match DeadlineProgram::load(host_pid) {
        Ok(program) => tree.see_deadlines(program),
        Err(error) => deadlines_unseen(&error),
    }
    pending.execute()?;
    let outputs = [
        Some(nonblocking(output.stdout)?),
        Some(nonblocking(output.stderr)?),
    ];
    let capture = Capture::new(announcements, &outputs, config)?;
    let bell = tree.bell();
    let init_pid = Pid::from_raw(init.host_pid).ok_or_else(|| io::Error::other("no init"))?;
    let ends = ServiceEnds {
        tun: stage.tun().try_clone_to_owned()?,
        outputs,
        stage: pidfd_open(init_pid, PidfdFlags::empty()).map_err(io::Error::from)?,
        init,
        notify,
        host_pid,
        input: Input {
            flows: Flows::of_primary(FlowLimits::default()),
            position: 1,
        },
    };
    Ok((
        ends,
        bell,
        Tracer::new(
            tree,
            mailbox.clone(),
            capture,
            KernelProgram::Absent,
            config.spare_core,
        ),
    ))
}

/// Starts the thread that answers the service's announced calls, on the service's core.
pub fn start_notifier(
    notify: Arc<OwnedFd>,
    announcements: Announcements,
    core: usize,
) -> io::Result<()> {
    std::thread::Builder::new()
        .name("notifier".to_owned())
        .spawn(move || {
            let bound = affinity::bind(0, &[core]);
            let served = notifier::serve(notify.as_fd(), &announcements, bound.is_ok());
            if let Err(error) = served {
                log!("{error}");
            }
        })?;
    Ok(())
}

fn nonblocking(pipe: OwnedFd) -> io::Result<OwnedFd> {
    rustix::fs::fcntl_setfl(&pipe, rustix::fs::OFlags::NONBLOCK)?;
    Ok(pipe)
}
