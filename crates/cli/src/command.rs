//! The service's command and user, looked up before anything is started.

use crate::exit::{Exit, Failure};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use unbroken_node::config::UserIds;
use unbroken_sys::account;

/// Where `execvp(3)` looks when there is no PATH.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The file that `name` stands for, by the rules of `execvp(3)`: a name with a slash is a path
/// from the working directory, any other is searched in `path` (the value of PATH).
///
/// # Errors
/// [`Exit::Command`]: it does not exist, or it is a directory or not executable.
pub fn find(name: &OsStr, path: Option<OsString>) -> Result<PathBuf, Failure> {
    let shown = name.to_string_lossy();
    let failed = |why: &str| Failure::new(Exit::Command, format!("cannot run {shown:?}: {why}"));
    if name.is_empty() {
        return Err(failed("the name is empty"));
    }
    if name.as_bytes().contains(&b'/') {
        return match look(Path::new(name)) {
            Look::Executable => Ok(name.into()),
            Look::Other(why) => Err(failed(why)),
        };
    }
    let path = path.unwrap_or_else(|| DEFAULT_PATH.into());
    let mut in_the_way = None;
    for directory in std::env::split_paths(&path) {
        let candidate = directory.join(name);
        match look(&candidate) {
            Look::Executable => return Ok(candidate),
            Look::Other(NOT_FOUND) => {}
            Look::Other(why) => {
                in_the_way.get_or_insert(format!("{}: {why}", candidate.display()));
            }
        }
    }
    Err(failed(&in_the_way.unwrap_or_else(|| {
        "no such command in PATH; install it, or give its whole path".into()
    })))
}

const NOT_FOUND: &str = "no such file";

enum Look {
    Executable,
    Other(&'static str),
}

fn look(path: &Path) -> Look {
    match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Look::Other("a directory on the way to it may not be entered")
        }
        Err(_) => Look::Other(NOT_FOUND),
        Ok(metadata) if metadata.is_dir() => Look::Other("it is a directory"),
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => {
            Look::Other("it is not executable; chmod +x makes it so")
        }
        Ok(_) => Look::Executable,
    }
}

/// The numbers of `USER[:GROUP]`; each may be a name or a number. Without GROUP the user has all
/// groups that the machine gives it; with GROUP that one alone.
///
/// # Errors
/// [`Exit::Usage`] when there is no such user or group.
pub fn user(text: &str) -> Result<UserIds, Failure> {
    let (name, group) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    let unknown = |kind: &str, name: &str| {
        Failure::new(
            Exit::Usage,
            format!("cannot run as {text:?}: there is no {kind} {name:?}"),
        )
    };
    let failed = |error: std::io::Error| {
        Failure::new(
            Exit::Internal,
            format!("cannot look up user {text:?}: {error}"),
        )
    };
    let found = account::user(name).map_err(failed)?;
    let gid = match group {
        None => None,
        Some(group) => Some(match account::group(group).map_err(failed)? {
            Some(gid) => gid,
            None => group.parse().map_err(|_| unknown("group", group))?,
        }),
    };
    match (found, gid) {
        (Some(user), Some(gid)) => Ok(UserIds {
            uid: user.uid,
            gid,
            groups: vec![gid],
        }),
        (Some(user), None) => Ok(UserIds {
            uid: user.uid,
            gid: user.gid,
            groups: account::groups_of(name, user.gid).map_err(failed)?,
        }),
        (None, gid) => {
            let uid: u32 = name.parse().map_err(|_| unknown("user", name))?;
            // A number without an account has no group of its own: the same number, as is usual.
            let gid = gid.unwrap_or(uid);
            Ok(UserIds {
                uid,
                gid,
                groups: vec![gid],
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(name: &str, path: &str) -> Result<PathBuf, Failure> {
        find(OsStr::new(name), Some(path.into()))
    }

    #[test]
    fn commands_are_found_as_by_execvp() {
        assert_eq!(
            find_in("sh", "/nowhere:/bin").expect("sh"),
            Path::new("/bin/sh")
        );
        assert_eq!(
            find_in("/bin/sh", "/nowhere").expect("sh"),
            Path::new("/bin/sh")
        );
        assert!(find(OsStr::new("sh"), None).is_ok());
    }

    #[test]
    fn what_cannot_be_run_is_named_with_the_reason() {
        let refused = |name: &str, path: &str| {
            let failure = find_in(name, path).expect_err(name);
            assert_eq!(failure.exit, Exit::Command);
            assert!(failure.message.contains(name), "{}", failure.message);
            failure.message
        };
        assert!(refused("no-such-thing", "/bin").contains("PATH"));
        assert!(refused("/no/such/thing", "").contains("no such file"));
        assert!(refused("/etc", "").contains("directory"));
        assert!(refused("/etc/passwd", "").contains("chmod"));
        assert!(refused("passwd", "/etc").contains("/etc/passwd"));
        assert!(find_in("", "/bin").is_err());
    }

    #[test]
    fn users() {
        let ids = |text| user(text).expect(text);
        assert_eq!(ids("root").uid, 0);
        assert!(ids("root").groups.contains(&0));
        assert_eq!((ids("12345").uid, ids("12345").gid), (12345, 12345));
        assert_eq!(ids("root:77").groups, [77]);
        let message = user("nobody-here").expect_err("unknown").message;
        assert!(message.contains("no user \"nobody-here\""), "{message}");
        let message = user("root:nothing-here").expect_err("unknown").message;
        assert!(message.contains("no group \"nothing-here\""), "{message}");
    }
}
