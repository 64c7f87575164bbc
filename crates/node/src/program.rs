//! The program of a node: what `unbroken __node` does.

use crate::bundle::{Bundle, Start};
use crate::{primary, standby, title};
use rustix::fs::{Mode, OFlags, open};
use std::io;
use std::os::fd::AsFd;
use unbroken_sys::{clone, fdinfo};

/// Receives the bundle that stands at standard input and does what it says; the exit code.
pub fn main() -> i32 {
    match run() {
        Ok(()) => 0,
        Err(error) => {
            crate::log!("this node ends: {error}");
            eprintln!("unbroken: a node failed: {error}");
            70
        }
    }
}

fn run() -> io::Result<()> {
    // A session of its own, not only a group: a group that loses its last parent in the session
    // while one of it is stopped gets SIGHUP (kernel/exit.c, kill_orphaned_pgrp).
    rustix::process::setsid()?;
    let channel = rustix::stdio::stdin().as_fd().try_clone_to_owned()?;
    // Whatever else was open in whoever started this is not ours to keep open: locks, ends of pipes.
    clone::close_all_from(3, channel.as_fd())?;
    // What is not closed on exec goes on to whatever this node starts.
    let nothing = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&nothing)?;
    drop(nothing);
    let bundle = Bundle::receive(channel.into())?;
    // Before a thread enters the stage, whose /proc does not know this process.
    fdinfo::initialise()?;
    let name = bundle.config.name.clone();
    match bundle.start {
        Start::Launch => {
            title::show(&name, "primary");
            primary::launch::run(bundle)
        }
        Start::Standby { .. } => {
            title::show(&name, "standby");
            standby::run(bundle)
        }
    }
}
