//! What `ps` and `top` show of our processes: `unbroken: NAME primary`.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

/// Room behind the name for a role, which changes while the process runs.
const ROLE_BYTES: usize = 16;

/// The name by which lists of processes know all of ours (/proc/PID/comm).
const PROGRAM: &str = "unbroken";

/// The first argument for a process of service `name`, with room for its role.
pub fn with_room(name: &str) -> String {
    format!("{PROGRAM}: {name}{:ROLE_BYTES$}", "")
}

/// Calls the calling thread, and lists of processes that show it, by the program's name: one that was
/// executed as /proc/self/exe is called `exe`.
pub fn name_program() {
    // Nothing but what people see depends on it.
    let _ = fs::write("/proc/self/comm", PROGRAM);
}

/// Shows the calling process, whose first argument was made by [`with_room`], under this role.
pub fn show(name: &str, role: &str) {
    // Nothing but what people see depends on it.
    if let Err(error) = write(&format!("{PROGRAM}: {name} {role}")) {
        crate::log!("this process is not shown as the {role}: {error}");
    }
}

fn write(title: &str) -> io::Result<()> {
    name_program();
    let stat = fs::read_to_string("/proc/self/stat")?;
    let malformed = || io::Error::other("/proc/self/stat is not understood");
    let (start, end) = argument_area(&stat).ok_or_else(malformed)?;
    let bytes = usize::try_from(end.saturating_sub(start)).map_err(io::Error::other)?;
    let mut area = vec![0; bytes];
    // The last byte stays 0: the kernel would read on into the environment (fs/proc/base.c,
    // get_mm_cmdline).
    let length = title.len().min(bytes.saturating_sub(1));
    area[..length].copy_from_slice(&title.as_bytes()[..length]);
    // Our own arguments, which nobody reads any more.
    let memory = fs::OpenOptions::new().write(true).open("/proc/self/mem")?;
    memory.write_all_at(&area, start)
}

/// Start and end of the arguments in memory: fields 48 and 49 of proc_pid_stat(5). The second field is
/// a name in brackets that may have anything in it.
fn argument_area(stat: &str) -> Option<(u64, u64)> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_ascii_whitespace().skip(45);
    let start = fields.next()?.parse().ok()?;
    Some((start, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_is_found_behind_any_name() {
        let numbers: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("1 (a) b (c) {}", numbers.join(" "));
        assert_eq!(argument_area(&stat), Some((48, 49)));
        assert_eq!(argument_area("1 (a) S 1"), None);
    }
}
