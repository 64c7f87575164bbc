//! Locks that belong to an open file description (`F_OFD_SETLK` of `fcntl_locking(2)`): every
//! process that inherits the descriptor holds the lock, and the kernel drops it with the last one.
//!
//! The blocks rely on: `fcntl` reads and writes only the `struct flock` it is given.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The whole file, as `fcntl(2)` wants it.
fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Must be 0 for the F_OFD_ commands, else EINVAL.
        l_pid: 0,
    }
}

/// Takes the exclusive lock of the file without waiting; `false` when another open file
/// description holds it. The file must be open for writing.
pub fn try_exclusive(file: &impl AsFd) -> io::Result<bool> {
    let request = whole_file(libc::F_WRLCK);
    // SAFETY: `request` is a valid struct flock for the whole call.
    let result = unsafe {
        libc::fcntl(
            file.as_fd().as_raw_fd(),
            libc::F_OFD_SETLK,
            &raw const request,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether another open file description holds the exclusive lock. Takes nothing, so it can never
/// make somebody's [`try_exclusive`] fail.
pub fn is_held(file: &impl AsFd) -> io::Result<bool> {
    let mut request = whole_file(libc::F_RDLCK);
    // SAFETY: `request` is a valid struct flock that the kernel overwrites.
    let result = unsafe {
        libc::fcntl(
            file.as_fd().as_raw_fd(),
            libc::F_OFD_GETLK,
            &raw mut request,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request.l_type != libc::F_UNLCK as libc::c_short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn held_by_a_description_and_its_duplicates() {
        let path = std::env::temp_dir().join(format!("unbroken-lock-{}", std::process::id()));
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .expect("lock file")
        };
        let (first, second) = (open(), open());
        assert!(!is_held(&second).expect("test"));
        assert!(try_exclusive(&first).expect("lock"));
        assert!(!try_exclusive(&second).expect("lock"));
        let duplicate = first.try_clone().expect("dup");
        drop(first);
        assert!(is_held(&second).expect("test"));
        drop(duplicate);
        assert!(!is_held(&second).expect("test"));
        std::fs::remove_file(&path).expect("remove");
    }
}
