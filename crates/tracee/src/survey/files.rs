//! Files and links of `/proc/PID`.

use crate::host::{HostPid, HostTid};
use crate::thread::Process;
use crate::{TraceError, proc};
use std::os::unix::fs::MetadataExt;
use std::{fs, io};

/// A file of a process, with its path.
pub(super) fn read_proc(host_pid: HostPid, name: &str) -> Result<(String, String), TraceError> {
    let path = format!("/proc/{host_pid}/{name}");
    match proc::read_if_alive(&path)? {
        Some(text) => Ok((path, text)),
        None => Err(TraceError::gone(HostTid(host_pid.0))),
    }
}

/// `None` where the kernel writes no core dumps, and has no such file.
pub(super) fn read_coredump_filter(host_pid: HostPid) -> Result<Option<u32>, TraceError> {
    let path = format!("/proc/{host_pid}/coredump_filter");
    let Some(text) = proc::read_if_alive(&path)? else {
        return Ok(None);
    };
    let filter = u32::from_str_radix(text.trim(), 16);
    let what = "the filter";
    filter
        .map(Some)
        .map_err(|_| TraceError::ProcFormat { path, what })
}

/// Where a link of a process leads, in the process's mount namespace.
pub(super) fn read_link(host_pid: HostPid, name: &str) -> Result<String, TraceError> {
    let path = format!("/proc/{host_pid}/{name}");
    let target = match fs::read_link(&path) {
        Ok(target) => target,
        Err(error) if proc::is_gone(&error) => return Err(TraceError::gone(HostTid(host_pid.0))),
        Err(source) => return Err(TraceError::Proc { path, source }),
    };
    target.into_os_string().into_string().map_err(|_| {
        let source = io::Error::new(io::ErrorKind::InvalidData, "a path that is not UTF-8");
        TraceError::Proc { path, source }
    })
}

/// The same for a directory, which must still have a path.
pub(super) fn read_directory(process: &Process, name: &'static str) -> Result<String, TraceError> {
    let target = read_link(process.host_pid, name)?;
    // What the kernel puts behind the path of a deleted one can be part of a name, too.
    if target.ends_with(" (deleted)") {
        let path = format!("/proc/{}/{name}", process.host_pid);
        let metadata = fs::metadata(&path).map_err(|source| TraceError::Proc { path, source })?;
        if metadata.nlink() == 0 {
            let pid = process.pid;
            return Err(TraceError::DirectoryDeleted { pid, path: target });
        }
    }
    Ok(target)
}
