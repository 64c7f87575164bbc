//! Stage init: process 1 of a service's pid namespace, and what its child does until it is the
//! service.
//!
//! A process 1 that sets no handlers is deaf to every signal from inside and to all but SIGKILL
//! and SIGSTOP from outside (pid_namespaces(7)), so there is nothing to ignore.

use super::launch::{ChildAnswer, ChildRequest, Identity, InitMessage, Plan};
use super::seccomp_filter;
use crate::channel;
use crate::title;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use unbroken_sys::channel::Channel;
use unbroken_sys::clone::{self, Forked};
use unbroken_sys::{descriptor, mount, seccomp};
use unbroken_tracee::blob;
use unbroken_tracee::replica::STUB_CHANNEL;

/// The whole life of stage init. `arguments` are what follows the hidden subcommand: the command
/// of the service. Standard input is the connection to the node; standard output and error are
/// the service's.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ! {
    title::name_program();
    let command: Vec<OsString> = arguments.collect();
    let Ok(control) = io::stdin().as_fd().try_clone_to_owned() else {
        clone::exit_now(1)
    };
    let control = Channel::from(control);
    let code = match run(&control, &command) {
        Ok(()) => 0,
        Err((step, error)) => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            // If the node is gone there is nobody to tell.
            let _ = channel::send(
                &control,
                &InitMessage::Failed {
                    step: step.into(),
                    errno,
                },
                &[],
            );
            1
        }
    };
    clone::exit_now(code)
}

type Failure = (&'static str, io::Error);

fn at(step: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |error| (step, error)
}

fn run(control: &Channel, command: &[OsString]) -> Result<(), Failure> {
    let (plan, mut descriptors, _) =
        channel::receive::<Plan>(control).map_err(at("hear from the node"))?;
    let launch = descriptors
        .pop()
        .ok_or(("hear from the node", io::ErrorKind::InvalidData.into()))?;
    clone::unblock_signals().map_err(at("unblock signals"))?;
    clone::new_session().map_err(at("start a session"))?;
    mount::mount_proc().map_err(at("mount /proc"))?;
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(at("open /dev/null"))?;
    if clone::fork_as(plan.first_pid).map_err(at("start the first process"))? == Forked::Child {
        child(&plan, launch.into(), &null, command)
    }
    drop(launch);
    // The service's output must end with the service.
    for number in 0..3 {
        clone::place_descriptor(null.as_fd(), number).map_err(at("let go of the output"))?;
    }
    reap_all(control, plan.first_pid)
}

/// Reaps until no child is left, or until nobody of ours is.
fn reap_all(control: &Channel, first_pid: i32) -> Result<(), Failure> {
    let ended = clone::child_signal().map_err(at("watch for SIGCHLD"))?;
    let mut ended = File::from(ended);
    let mut wait_status = 0;
    loop {
        loop {
            match clone::reap(false) {
                Ok(None) => break,
                Ok(Some((pid, status))) => {
                    wait_status = status;
                    if pid == first_pid {
                        tell(control, InitMessage::FirstExited { wait_status });
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                    tell(control, InitMessage::AllExited { wait_status });
                    return Ok(());
                }
                Err(error) => return Err(("reap", error)),
            }
        }
        let (_, spoken) =
            clone::wait_readable(ended.as_fd(), control.as_fd()).map_err(at("wait"))?;
        if spoken {
            // The node never speaks after the plan: every holder of its end is gone. Our end
            // kills whatever is left inside.
            return Ok(());
        }
        // One read empties a signalfd of one signal, which is never queued twice.
        match ended.read(&mut [0; 128]) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(("read a signal", error)),
        }
    }
}

fn tell(control: &Channel, message: InitMessage) {
    // With nobody to tell, the next wait finds the connection closed.
    let _ = channel::send(control, &message, &[]);
}

/// The first process: waits for the node at each step, and for ever as a stub.
fn child(plan: &Plan, channel: Channel, null: &File, command: &[OsString]) -> ! {
    if let Ok(channel) = prepare(plan, channel, null)
        && channel::send(&channel, &ChildAnswer::Hello, &[]).is_ok()
    {
        serve(plan, &channel, command);
    }
    clone::exit_now(1)
}

/// Leaves the process with the descriptors that it shall have, and its channel, which may move.
fn prepare(plan: &Plan, channel: Channel, null: &File) -> io::Result<Channel> {
    clone::new_session()?;
    clone::place_descriptor(null.as_fd(), 0)?;
    clone::close_all_from(3, channel.as_fd())?;
    if plan.service {
        return Ok(channel);
    }
    let moved = descriptor::duplicate_from(channel.as_fd(), STUB_CHANNEL)?;
    drop(channel);
    let channel = Channel::from(moved);
    clone::close_all_from(0, channel.as_fd())?;
    Ok(channel)
}

/// Obeys requests until the node is gone or the process is another program.
fn serve(plan: &Plan, channel: &Channel, command: &[OsString]) {
    while let Ok((request, ..)) = channel::receive(channel) {
        let answered = match request {
            ChildRequest::InstallFilter => install_filter(channel),
            ChildRequest::Execute => channel::send(channel, &execute(plan, command), &[]),
        };
        if answered.is_err() {
            return;
        }
    }
}

fn install_filter(channel: &Channel) -> io::Result<()> {
    let listener: OwnedFd = match seccomp::install(&seccomp_filter::build(blob::UNFILTERED)) {
        Ok(listener) => listener,
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            return channel::send(channel, &ChildAnswer::FilterFailed { errno }, &[]);
        }
    };
    channel::send(channel, &ChildAnswer::FilterInstalled, &[listener.as_fd()])
    // Closing the listener is the first call that waits for the notifier.
}

/// Returns only if it failed.
fn execute(plan: &Plan, command: &[OsString]) -> ChildAnswer {
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    if let Some(Identity {
        user,
        group,
        groups,
    }) = &plan.identity
        && let Err(error) = clone::set_identity(*user, *group, groups)
    {
        return ChildAnswer::IdentityFailed {
            errno: errno(error),
        };
    }
    let Some((program, arguments)) = command.split_first() else {
        return ChildAnswer::ExecuteFailed {
            errno: libc::ENOENT,
        };
    };
    ChildAnswer::ExecuteFailed {
        errno: errno(become_program(plan, program, arguments)),
    }
}

/// Returns only if it failed.
fn become_program(plan: &Plan, program: &OsString, arguments: &[OsString]) -> io::Error {
    let mut command = Command::new(program);
    command.args(arguments);
    plan.inherited.give(&mut command);
    command.exec()
}
