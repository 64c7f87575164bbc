//! The node's own log: one line an event in /run/unbroken/NAME/log. Standard error belongs to the
//! user and to the service.

use std::fmt::Arguments;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

static LOG: OnceLock<(File, String)> = OnceLock::new();

/// Opens the log once for this process; `who` stands in every line. Without it, lines are lost.
pub fn open(directory: &Path, who: &str) -> std::io::Result<()> {
    let file = File::options()
        .append(true)
        .create(true)
        .open(directory.join("log"))?;
    let _ = LOG.set((file, who.to_owned()));
    Ok(())
}

/// Writes one line. Never on the pause path.
pub fn line(arguments: Arguments<'_>) {
    if let Some((file, who)) = LOG.get() {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let process = std::process::id();
        // One write, so that lines of two nodes do not mix. A full disk loses the line, not us.
        let text = format!(
            "{}.{:06} {who}[{process}] {arguments}\n",
            now.tv_sec,
            now.tv_nsec / 1000
        );
        let mut file = file;
        let _ = file.write_all(text.as_bytes());
    }
}

/// `log!("text {}", value)`
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { $crate::log::line(format_args!($($argument)*)) };
}
