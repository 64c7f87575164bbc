//! The userfaultfd that a tracer makes in a process of the service, takes, and closes there. One that
//! dies in between leaves it open; its calls say so.

use crate::TraceError;
use crate::host::{HostPid, HostTid};
use crate::remote::NOT_REACHED;
use crate::stop::Stopped;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use unbroken_sys::remote_code::{self, ENTRY_BYTES, TABLE};
use unbroken_sys::{pidfd, uffd};

/// The second argument, which the kernel does not look at, of the calls that make and close a
/// userfaultfd of ours in the service: whoever finds such a call knows that the descriptor is not
/// the service's own.
const OWN: u64 = u64::from_le_bytes(*b"unbroken");
/// What `/proc/PID/fd` has for one.
const LINK: &str = "anon_inode:[userfaultfd]";

impl Stopped<'_> {
    /// Makes one by thread `tid` of `host_pid`, and leaves the service no descriptor of it.
    pub(crate) fn take_userfault(
        &mut self,
        tid: HostTid,
        host_pid: HostPid,
    ) -> Result<OwnedFd, TraceError> {
        let mut batch = self.remote(tid);
        let create = batch.call(libc::SYS_userfaultfd, &[uffd::CREATE_FLAGS, OWN])?;
        let number = batch
            .run()?
            .get(create)
            .map_err(TraceError::of_call("userfaultfd", tid))?;
        let taken = pidfd::open(host_pid.0)
            .and_then(|process| pidfd::get_descriptor(process.as_fd(), number as i32));
        self.close_userfault(tid, number)?;
        taken.map_err(TraceError::of_thread("take the userfaultfd", tid))
    }

    /// Closes it in the service.
    pub(crate) fn close_userfault(&mut self, tid: HostTid, number: u64) -> Result<(), TraceError> {
        let mut batch = self.remote(tid);
        batch.call(libc::SYS_close, &[number, OWN])?;
        batch.run()?;
        Ok(())
    }

    /// The descriptor that a tracer had opened in the process and had not closed when it died: what
    /// its last batch tells, before there is another. That the service has not closed it since, and
    /// had the number again for something else, the name of what is open says.
    pub(crate) fn userfault_left_open(&self, tid: HostTid) -> Result<Option<u64>, TraceError> {
        let (process, _) = self.thread(tid).ok_or(TraceError::gone(tid))?;
        let mut entry = [0; ENTRY_BYTES];
        let first = remote_code::DATA + TABLE as u64;
        process
            .memory()
            .read_exact_at(&mut entry, first)
            .map_err(TraceError::of_thread("read the blob", tid))?;
        let Some(number) = left_open(&entry) else {
            return Ok(None);
        };
        let link = format!("/proc/{}/fd/{number}", process.host_pid);
        let is_ours = fs::read_link(link).is_ok_and(|name| name == Path::new(LINK));
        Ok(is_ours.then_some(number))
    }
}

/// The descriptor that is open in a process of the service if `entry` is the first of the last
/// batch that was made there.
fn left_open(entry: &[u8; ENTRY_BYTES]) -> Option<u64> {
    let word = |position: usize| {
        let bytes = entry[position * 8..].first_chunk();
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    };
    let [number, first, mark, result] = [0, 1, 2, 7].map(word);
    let result = result as i64;
    match number as i64 {
        libc::SYS_userfaultfd if mark == OWN => u64::try_from(result).ok(),
        libc::SYS_close if mark == OWN && result == NOT_REACHED => Some(first),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: i64, first: u64, mark: u64, result: i64) -> [u8; ENTRY_BYTES] {
        let words = [number as u64, first, mark, 0, 0, 0, 0, result as u64];
        let mut entry = [0; ENTRY_BYTES];
        entry.copy_from_slice(&words.map(u64::to_ne_bytes).concat());
        entry
    }

    #[test]
    fn what_is_left_open_is_told_by_the_last_batch() {
        let flags = uffd::CREATE_FLAGS;
        let cases = [
            (entry(libc::SYS_userfaultfd, flags, OWN, 7), Some(7)),
            (entry(libc::SYS_userfaultfd, flags, OWN, NOT_REACHED), None),
            (entry(libc::SYS_userfaultfd, flags, 0, 7), None),
            (entry(libc::SYS_close, 7, OWN, NOT_REACHED), Some(7)),
            (entry(libc::SYS_close, 7, OWN, 0), None),
            (entry(libc::SYS_close, 7, 0, NOT_REACHED), None),
            (entry(libc::SYS_gettid, 7, OWN, 7), None),
        ];
        for (entry, expected) in cases {
            assert_eq!(left_open(&entry), expected, "{entry:?}");
        }
    }
}
