//! The two changes that a stage makes to its mount namespace.
//!
//! The unsafe blocks pass C string literals, which live for ever, and null pointers where
//! `mount(2)` ignores an argument.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::ptr;

/// Stops every mount of the calling thread's namespace from passing mounts to or from others.
pub fn make_private() -> io::Result<()> {
    mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE)
}

/// Mounts a fresh /proc that shows the pid namespace of the caller.
pub fn mount_proc() -> io::Result<()> {
    mount(
        c"proc",
        c"/proc",
        Some(c"proc"),
        libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
    )
}

fn mount(
    source: &CStr,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let kind = kind.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: every pointer is a C string that outlives the call, or null where it is unused.
    let result = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, ptr::null()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
