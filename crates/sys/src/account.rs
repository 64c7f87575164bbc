//! Users and groups by name, from whatever the machine's name service knows.
//!
//! The blocks rely on: `getpwnam_r`, `getgrnam_r` and `getgrouplist` write only into the buffers
//! and structures they are given; the pointers inside the result point into that buffer.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;

/// The numbers that `login(1)` would give a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
}

/// Entries larger than this are not believed.
const LARGEST_ENTRY_BYTES: usize = 1 << 20;

/// The user of that name; `None` when there is none.
pub fn user(name: &str) -> io::Result<Option<User>> {
    let name = CString::new(name)?;
    with_growing_buffer(|buffer| {
        // SAFETY: an all-zero struct passwd is valid (null pointers and zero numbers).
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: name is NUL-terminated; buffer, entry and found are valid for the call.
        let code = unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                &raw mut entry,
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut found,
            )
        };
        let user = User {
            uid: entry.pw_uid,
            gid: entry.pw_gid,
        };
        (code, (!found.is_null()).then_some(user))
    })
}

/// The group number of that name; `None` when there is none.
pub fn group(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    with_growing_buffer(|buffer| {
        // SAFETY: an all-zero struct group is valid (null pointers and zero numbers).
        let mut entry: libc::group = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: name is NUL-terminated; buffer, entry and found are valid for the call.
        let code = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                &raw mut entry,
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut found,
            )
        };
        (code, (!found.is_null()).then_some(entry.gr_gid))
    })
}

/// Every group of the user, `gid` among them, as `initgroups(3)` would set them.
pub fn groups_of(name: &str, gid: u32) -> io::Result<Vec<u32>> {
    let name = CString::new(name)?;
    let mut groups = vec![0; 64];
    loop {
        let mut count = libc::c_int::try_from(groups.len()).map_err(io::Error::other)?;
        // SAFETY: `groups` has room for `count` numbers; name is NUL-terminated.
        let result =
            unsafe { libc::getgrouplist(name.as_ptr(), gid, groups.as_mut_ptr(), &raw mut count) };
        let needed = usize::try_from(count).unwrap_or(0);
        if result >= 0 {
            groups.truncate(needed);
            return Ok(groups);
        }
        if needed <= groups.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        groups.resize(needed, 0);
    }
}

/// Calls a `get*_r` function again with a larger buffer while it says ERANGE.
fn with_growing_buffer<T>(
    mut call: impl FnMut(&mut [libc::c_char]) -> (libc::c_int, Option<T>),
) -> io::Result<Option<T>> {
    let mut buffer = vec![0; 4096];
    loop {
        match call(&mut buffer) {
            (0, found) => return Ok(found),
            (libc::ERANGE, _) if buffer.len() < LARGEST_ENTRY_BYTES => {
                buffer.resize(buffer.len() * 4, 0);
            }
            // getpwnam(3): these also mean "not found" on some systems.
            (libc::ENOENT | libc::ESRCH, _) => return Ok(None),
            (code, _) => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_known_and_nonsense_is_not() {
        assert_eq!(user("root").expect("lookup"), Some(User { uid: 0, gid: 0 }));
        assert_eq!(group("root").expect("lookup"), Some(0));
        assert!(groups_of("root", 0).expect("lookup").contains(&0));
        assert_eq!(user("no-such-user-here").expect("lookup"), None);
        assert_eq!(group("no-such-group-here").expect("lookup"), None);
        assert!(user("nul\0inside").is_err());
    }
}
