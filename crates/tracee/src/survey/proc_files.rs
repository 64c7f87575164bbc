//! Files of /proc by which a process is changed, and not by a call: `oom_score_adj`,
//! `coredump_filter`, `comm`, `timerslack_ns`.

use crate::host::HostPid;
use crate::{TraceError, proc};
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// Whether a stopped process has a file of /proc open for writing: what is written by it is told
/// by nothing. Memory is left out, which is followed as such.
pub fn writes_to_proc(host_pid: HostPid) -> Result<bool, TraceError> {
    let path = format!("/proc/{host_pid}/fd");
    let failed = |source| TraceError::Proc {
        path: path.clone(),
        source,
    };
    for entry in fs::read_dir(&path).map_err(failed)? {
        let link = entry.map_err(failed)?.path();
        let target = match fs::read_link(&link) {
            Ok(target) => target,
            Err(error) if proc::is_gone(&error) => continue,
            Err(source) => return Err(failed(source)),
        };
        if target.starts_with("/proc") && !target.ends_with("mem") {
            // A link's mode is that of the open file.
            let link = fs::symlink_metadata(&link).map_err(failed)?;
            if link.permissions().mode() & 0o200 != 0 {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
