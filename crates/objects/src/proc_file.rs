//! Files of /proc that name a process, a thread or a descriptor.
//!
//! A replica opens a file again by its path. Its processes and threads have the numbers that those
//! of the service had, so such a file tells of the same ones again, if they are still there: a
//! descriptor outlives the process or thread that it names, and its path does not. That has to be
//! said before a takeover depends on it.
//!
//! `/proc/PID/mem` is more than its path: the memory that it reads and writes is found when it is
//! opened (`mem_open` of fs/proc/base.c), and stays when the thread in its path ends.

use crate::methods::Event;
use crate::{Context, Error, description};
use std::io;
use std::os::fd::BorrowedFd;
use unbroken_image::{Pid, Tid};
use unbroken_sys::descriptor;

/// What a path of /proc names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    Process(Pid),
    Thread(Pid, Tid),
    Descriptor,
}

/// A file in the directory of a thread goes with that thread.
pub(crate) fn stale_after(path: &str) -> Option<Event> {
    match named(path) {
        Some(Named::Thread(..)) => Some(Event::ThreadEnded),
        _ => None,
    }
}

/// What a replica can open in the place of `path`, which `fd`, a duplicate of the service's
/// descriptor with these flags, was opened by. `process` gives the number in our namespace of each
/// process of the service.
///
/// # Errors
/// [`Error::Refused`] when there is nothing that a replica could open.
pub(crate) fn path_for_replica(
    fd: BorrowedFd<'_>,
    (path, flags): (String, i32),
    process: impl Fn(Pid) -> Option<i32>,
) -> Result<String, Error> {
    if !description::is_of_proc(fd, &path)? {
        return Ok(path);
    }
    if path.ends_with("/mem") {
        return memory_for_replica(fd, (path, flags), |pid| process(pid).is_some());
    }
    let is_there = match named(&path) {
        None => true,
        // Every replica has an init.
        Some(Named::Process(pid)) => pid == Pid(1) || process(pid).is_some(),
        Some(Named::Thread(pid, tid)) => match process(pid) {
            Some(host_pid) => has_thread(host_pid, tid).during("look for the threads of", pid)?,
            None => false,
        },
        Some(Named::Descriptor) => {
            return Err(Error::refused(
                format!("{path}, a file of one descriptor,"),
                "the replica has no descriptors yet when it opens its files",
            ));
        }
    };
    if is_there {
        return Ok(path);
    }
    Err(Error::refused(
        format!("{path}, a file of a process or thread that has ended,"),
        "there is nothing that the replica could open",
    ))
}

/// Whether the process has a thread of this number in its own namespace.
fn has_thread(host_pid: i32, tid: Tid) -> io::Result<bool> {
    let number = tid.0.to_string();
    for entry in std::fs::read_dir(format!("/proc/{host_pid}/task"))? {
        let status = std::fs::read_to_string(entry?.path().join("status"))?;
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        if numbers.and_then(|numbers| numbers.split_whitespace().last()) == Some(&number) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whichever thread it was opened by: the memory is the process's.
fn memory_for_replica(
    fd: BorrowedFd<'_>,
    (path, flags): (String, i32),
    lives: impl Fn(Pid) -> bool,
) -> Result<String, Error> {
    let Some((directory, pid)) = owner_of_memory(&path).filter(|(_, pid)| lives(*pid)) else {
        return Err(Error::refused(
            format!("{path}, the memory of another process,"),
            "that process is not there when the replica opens it",
        ));
    };
    if flags & libc::O_PATH == 0 && is_abandoned(fd, flags) {
        return Err(Error::refused(
            format!("{path}, the memory of a program that was replaced by another,"),
            "nothing names it any more",
        ));
    }
    Ok(format!("{directory}/{pid}/mem"))
}

/// Where /proc is mounted, and whose memory the path is of.
fn owner_of_memory(path: &str) -> Option<(&str, Pid)> {
    let (directory, number) = path.strip_suffix("/mem")?.rsplit_once('/')?;
    let (directory, number) = match directory.strip_suffix("/task") {
        Some(process) => process.rsplit_once('/')?,
        None => (directory, number),
    };
    Some((directory, Pid(number.parse().ok()?)))
}

fn named(path: &str) -> Option<Named> {
    let mut parts = path.strip_prefix("/proc/")?.split('/');
    let pid = Pid(parts.next()?.parse().ok()?);
    let part = match (parts.next(), parts.next()) {
        (Some("task"), Some(tid)) => match (parts.next(), parts.next()) {
            (Some("fdinfo"), Some(_)) => Named::Descriptor,
            _ => Named::Thread(pid, Tid(tid.parse().ok()?)),
        },
        (Some("fdinfo"), Some(_)) => Named::Descriptor,
        _ => Named::Process(pid),
    };
    Some(part)
}

/// Whether nobody has the memory any more that `fd` was opened for, as after `execve(2)`: the
/// kernel then has nothing to read or write, wherever it is asked for, and says 0. It says EIO for
/// an address that no process can have, which this is with page tables of any depth.
fn is_abandoned(fd: BorrowedFd<'_>, flags: i32) -> bool {
    const NOWHERE: u64 = 0x7fff_ffff_ffff_f000;
    let done = if flags & libc::O_ACCMODE == libc::O_WRONLY {
        descriptor::write_at(fd, &[0], NOWHERE)
    } else {
        descriptor::read_at(fd, &mut [0], NOWHERE)
    };
    matches!(done, Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};
    use unbroken_sys::pidfd;

    /// A shell opens its memory, and may be replaced by another program then.
    fn held_by_a_shell(opened: &str, then: &str) -> Result<String, Error> {
        let script = format!("exec 9{opened}/proc/self/mem; {then}");
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a shell");
        let mut line = String::new();
        let said = child.stdout.take().expect("its output is a pipe");
        BufReader::new(said).read_line(&mut line).expect("read");
        let pid = child.id().cast_signed();
        let process = pidfd::open(pid).expect("pidfd_open");
        let fd = pidfd::get_descriptor(process.as_fd(), 9).expect("pidfd_getfd");
        let path = description::path_of(fd.as_fd()).expect("path");
        let flags = descriptor::status_flags(fd.as_fd()).expect("flags");
        let result = path_for_replica(fd.as_fd(), (path, flags), |other| {
            (other.0 == pid).then_some(pid)
        });
        child.kill().expect("kill the shell");
        child.wait().expect("wait for the shell");
        result.inspect(|path| assert_eq!(*path, format!("/proc/{pid}/mem")))
    }

    #[test]
    fn memory_of_a_program_that_was_replaced_is_refused() {
        for opened in ["<", ">", "<>"] {
            held_by_a_shell(opened, "echo; read line").expect("its own memory");
            let replaced = held_by_a_shell(opened, "exec sh -c 'echo; read line'");
            let error = replaced.expect_err("nobody has that memory any more");
            assert!(error.to_string().contains("was replaced"), "{error}");
        }
    }

    #[test]
    fn paths_name_what_they_are_of() {
        let (process, thread) = (Named::Process(Pid(7)), Named::Thread(Pid(7), Tid(9)));
        for (path, expected) in [
            ("/proc/7/stat", Some(process)),
            ("/proc/7/task", Some(process)),
            ("/proc/7/fdinfo", Some(process)),
            ("/proc/7/fdinfo/3", Some(Named::Descriptor)),
            ("/proc/7/task/9", Some(thread)),
            ("/proc/7/task/9/stat", Some(thread)),
            ("/proc/7/task/9/fdinfo", Some(thread)),
            ("/proc/7/task/9/fdinfo/3", Some(Named::Descriptor)),
            ("/proc/sys/kernel/pid_max", None),
            ("/proc/stat", None),
            ("/var/7/task/9/stat", None),
        ] {
            assert_eq!(named(path), expected, "{path}");
        }
    }

    #[test]
    fn memory_is_of_the_process_whatever_thread_the_path_names() {
        for (path, expected) in [
            ("/proc/7/mem", Some(("/proc", Pid(7)))),
            ("/proc/7/task/9/mem", Some(("/proc", Pid(7)))),
            ("/srv/9/proc/7/mem", Some(("/srv/9/proc", Pid(7)))),
            ("/proc/self/mem", None),
            ("/mem", None),
            ("/proc/7/maps", None),
        ] {
            assert_eq!(owner_of_memory(path), expected, "{path}");
        }
    }
}
