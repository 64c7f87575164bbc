//! Regular files: position, flags, close-on-exec, locks; and a log that a thread goes on appending
//! to while the service dies: what was written after the last commit is cut off, so that memory
//! and file agree.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{FlockOperation, flock};
use unbroken_guests::raw::{fcntl, range_lock};
use unbroken_guests::{Guest, Place, main as run, pattern, refused, same, same_bytes};

const BODY_BYTES: usize = 10_000;
const PIECE_BYTES: usize = 100;

struct Files {
    body: File,
    content: Vec<u8>,
    position: usize,
    inherited: File,
    second: File,
    log_path: PathBuf,
    /// How many lines the log has; whoever holds it is the only writer.
    lines: Arc<Mutex<(File, u64)>>,
}

impl Guest for Files {
    fn set_up(place: &Place) -> Result<Self> {
        let open = |name: &str, flags| {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create(true)
                .custom_flags(flags);
            options.open(place.directory.join(name))
        };
        let content = pattern(1, BODY_BYTES);
        let mut body = open("body", libc::O_DSYNC)?;
        body.write_all(&content)?;
        body.seek(SeekFrom::Start(1234))?;
        let inherited = open("inherited", libc::O_NOATIME)?;
        fcntl(&inherited, libc::F_SETFD, 0)?;
        // Another description of the same file, to ask what the first has locked.
        let second = open("body", 0)?;
        range_lock(&body, libc::F_OFD_SETLK, libc::F_WRLCK, 10, 20)?;
        range_lock(&body, libc::F_SETLK, libc::F_RDLCK, 100, 0)?;
        inherited.lock()?;
        let log_path = place.directory.join("log");
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&log_path)?;
        let lines = Arc::new(Mutex::new((log, 0)));
        let writer = Arc::clone(&lines);
        std::thread::spawn(move || append_for_ever(&writer));
        Ok(Self {
            body,
            content,
            position: 1234,
            inherited,
            second,
            log_path,
            lines,
        })
    }

    fn check(&mut self) -> Result<()> {
        same(
            "position",
            self.body.stream_position()?,
            self.position as u64,
        )?;
        let mut piece = [0; PIECE_BYTES];
        self.body.read_exact(&mut piece)?;
        let expected = &self.content[self.position..self.position + PIECE_BYTES];
        same_bytes("what stands at the position", &piece, expected)?;
        self.position += PIECE_BYTES;
        let written = pattern(self.position as u64, PIECE_BYTES);
        self.body.write_all(&written)?;
        self.content[self.position..self.position + PIECE_BYTES].copy_from_slice(&written);
        self.position += PIECE_BYTES;
        // Not opened again: closing any descriptor of the file would drop the process's lock.
        let mut whole = vec![0; self.content.len()];
        self.second.read_exact_at(&mut whole, 0)?;
        same_bytes("the whole file", &whole, &self.content)?;
        self.flags().context("flags")?;
        self.locks().context("locks")?;
        self.log().context("log")
    }
}

impl Files {
    fn flags(&self) -> Result<()> {
        let status = |file: &File| fcntl(file, libc::F_GETFL, 0);
        let large = libc::O_LARGEFILE | 0o100000;
        same(
            "body",
            status(&self.body)? & !large,
            libc::O_RDWR | libc::O_DSYNC,
        )?;
        same(
            "inherited",
            status(&self.inherited)? & !large,
            libc::O_RDWR | libc::O_NOATIME,
        )?;
        let log = self
            .lines
            .lock()
            .map_err(|_| anyhow!("the writer panicked"))?;
        same(
            "log",
            status(&log.0)? & !large,
            libc::O_WRONLY | libc::O_APPEND,
        )?;
        same(
            "close-on-exec of body",
            fcntl(&self.body, libc::F_GETFD, 0)?,
            libc::FD_CLOEXEC,
        )?;
        same(
            "close-on-exec of inherited",
            fcntl(&self.inherited, libc::F_GETFD, 0)?,
            0,
        )
    }

    fn locks(&self) -> Result<()> {
        // A lock of one's own process is no conflict, but an OFD question is another owner.
        let asked = range_lock(&self.second, libc::F_OFD_GETLK, libc::F_WRLCK, 0, 50)?;
        same(
            "kind of the description's lock",
            i32::from(asked.l_type),
            libc::F_WRLCK,
        )?;
        same("its range", (asked.l_start, asked.l_len), (10, 20))?;
        same("its owner", asked.l_pid, -1)?;
        let asked = range_lock(&self.second, libc::F_OFD_GETLK, libc::F_WRLCK, 60, 1000)?;
        same(
            "kind of the process's lock",
            i32::from(asked.l_type),
            libc::F_RDLCK,
        )?;
        same("its range", (asked.l_start, asked.l_len), (100, 0))?;
        same("its owner", asked.l_pid, std::process::id() as i32)?;
        let again = File::open(self.log_path.with_file_name("inherited"))?;
        let locked = flock(&again, FlockOperation::NonBlockingLockShared);
        refused("a second flock", locked, libc::EAGAIN)
    }

    fn log(&self) -> Result<()> {
        let lines = self
            .lines
            .lock()
            .map_err(|_| anyhow!("the writer panicked"))?;
        let found = std::fs::read_to_string(&self.log_path)?;
        let expected: String = (0..lines.1).map(line).collect();
        same("lines", found.lines().count() as u64, lines.1)?;
        same_bytes("the log", found.as_bytes(), expected.as_bytes())
    }
}

fn line(number: u64) -> String {
    format!("line {number}\n")
}

fn append_for_ever(lines: &Mutex<(File, u64)>) {
    while let Ok(mut held) = lines.lock() {
        let (log, next) = &mut *held;
        log.write_all(line(*next).as_bytes())
            .expect("the log takes a line");
        *next += 1;
        drop(held);
        std::thread::sleep(std::time::Duration::from_micros(300));
    }
}

fn main() -> ExitCode {
    run::<Files>()
}
