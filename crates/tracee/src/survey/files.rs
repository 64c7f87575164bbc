//! Files and links of `/proc/PID`.

use crate::host::{HostPid, HostTid};
use crate::{TraceError, proc};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::{fs, io};
use unbroken_image::{FileIdentity, NamedDirectory};
use unbroken_sys::descriptor;
use unbroken_sys::fdinfo::ProcessDirectory;

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

/// What a link of a process leads to.
pub(super) fn identity_of_link(host_pid: HostPid, name: &str) -> Result<FileIdentity, TraceError> {
    let path = format!("/proc/{host_pid}/{name}");
    match fs::metadata(&path) {
        Ok(file) => Ok(FileIdentity {
            device: file.dev(),
            inode: file.ino(),
        }),
        Err(error) if proc::is_gone(&error) => Err(TraceError::gone(HostTid(host_pid.0))),
        Err(source) => Err(TraceError::Proc { path, source }),
    }
}

/// Reads which directory a link of a process leads to, unless it is the one that is known.
pub(super) fn read_directory(
    host_pid: HostPid,
    name: &str,
    known: &mut NamedDirectory,
) -> Result<(), TraceError> {
    let identity = identity_of_link(host_pid, name)?;
    if known.identity == identity {
        return Ok(());
    }
    let path = format!("/proc/{host_pid}/{name}");
    let read = || -> io::Result<NamedDirectory> {
        let target = fs::read_link(&path)?.into_os_string().into_string();
        let directory = ProcessDirectory::open(host_pid.0)?.linked(name)?;
        let identity = match descriptor::has_lasting_identity(directory.as_fd())? {
            true => identity,
            false => FileIdentity::default(),
        };
        let path = target.map_err(|_| io::Error::other("a path that is not UTF-8"))?;
        Ok(NamedDirectory { identity, path })
    };
    *known = read().map_err(|source| TraceError::Proc { path, source })?;
    Ok(())
}
