//! `/proc` as this process sees it from its first namespace: descriptor lists, links and fdinfo,
//! of ourselves and of other processes.
//!
//! A thread that entered another mount namespace finds another `/proc` there, in which
//! `/proc/self` may not exist; so every look goes through one descriptor of the `/proc` that the
//! process started with. No unsafe code.

use crate::descriptor;
use std::ffi::{CStr, CString};
use std::fmt::{self, Write as _};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

static PROC: OnceLock<OwnedFd> = OnceLock::new();

/// Opens `/proc`. To be called once before any thread enters another mount namespace; later calls
/// do nothing.
pub fn initialise() -> io::Result<()> {
    proc_root().map(drop)
}

/// The `/proc` of the namespace in which [`initialise`] ran.
pub fn proc_root() -> io::Result<BorrowedFd<'static>> {
    if let Some(root) = PROC.get() {
        return Ok(root.as_fd());
    }
    let root = descriptor::open(
        None,
        c"/proc",
        libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC,
    )?;
    // Two threads may race here; either descriptor does, the loser's is closed.
    Ok(PROC.get_or_init(|| root).as_fd())
}

/// A short path, built without allocation.
struct ShortPath {
    bytes: [u8; 64],
    length: usize,
}

impl ShortPath {
    fn new(arguments: fmt::Arguments<'_>) -> io::Result<ShortPath> {
        let mut path = ShortPath {
            bytes: [0; 64],
            length: 0,
        };
        path.write_fmt(arguments)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENAMETOOLONG))?;
        Ok(path)
    }

    fn as_c_str(&self) -> &CStr {
        // `write_str` leaves at least one NUL behind the text.
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

impl fmt::Write for ShortPath {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        if end >= self.bytes.len() {
            return Err(fmt::Error);
        }
        self.bytes[self.length..end].copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

/// `/proc/PID` of another process, kept open: looks through it cannot meet a later process with
/// the same number.
#[derive(Debug)]
pub struct ProcessDirectory(OwnedFd);

impl ProcessDirectory {
    /// Opens `/proc/PID` for a host pid.
    pub fn open(pid: i32) -> io::Result<ProcessDirectory> {
        let path = ShortPath::new(format_args!("{pid}"))?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        Ok(ProcessDirectory(descriptor::open(
            Some(proc_root()?),
            path.as_c_str(),
            flags,
        )?))
    }

    /// How many descriptors are open, in one call (`st_size` of `/proc/PID/fd`, Linux 6.2).
    pub fn descriptor_count(&self) -> io::Result<u64> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let directory = descriptor::open(Some(self.0.as_fd()), c"fd", flags)?;
        Ok(descriptor::status(directory.as_fd())?.length_bytes)
    }

    /// The numbers of all open descriptors, ascending, into `list`.
    pub fn descriptors(&self, list: &mut Vec<i32>) -> io::Result<()> {
        list.clear();
        self.numbers(c"fd", list)
    }

    /// The host tids of all threads, into `list`.
    pub fn threads(&self, list: &mut Vec<i32>) -> io::Result<()> {
        list.clear();
        self.numbers(c"task", list)
    }

    fn numbers(&self, name: &CStr, list: &mut Vec<i32>) -> io::Result<()> {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let directory = descriptor::open(Some(self.0.as_fd()), name, flags)?;
        descriptor::each_name(directory.as_fd(), |name| {
            let number = std::str::from_utf8(name)
                .ok()
                .and_then(|text| text.parse::<i32>().ok());
            list.extend(number);
        })?;
        list.sort_unstable();
        Ok(())
    }

    /// The fdinfo of descriptor `fd`, to be read again and again: it always tells about whatever
    /// that number names, and holds nothing of the process.
    pub fn fdinfo(&self, fd: i32) -> io::Result<OwnedFd> {
        let path = ShortPath::new(format_args!("fdinfo/{fd}"))?;
        descriptor::open(
            Some(self.0.as_fd()),
            path.as_c_str(),
            libc::O_RDONLY | libc::O_CLOEXEC,
        )
    }

    /// A reference to the file behind `fd`: an `O_PATH` descriptor, which has neither its locks nor
    /// its position, and is of that file whatever becomes of its name.
    pub fn reference(&self, fd: i32) -> io::Result<OwnedFd> {
        self.follow(format_args!("fd/{fd}"))
    }

    /// The same to the file that is mapped from `start` to `end`, which is one mapping of the
    /// kernel's.
    pub fn mapped_file(&self, start: u64, end: u64) -> io::Result<OwnedFd> {
        self.follow(format_args!("map_files/{start:x}-{end:x}"))
    }

    /// The same to where a link of the process leads: `exe`, `cwd` or `root`.
    pub fn linked(&self, name: &str) -> io::Result<OwnedFd> {
        self.follow(format_args!("{name}"))
    }

    fn follow(&self, link: fmt::Arguments<'_>) -> io::Result<OwnedFd> {
        let path = ShortPath::new(link)?;
        descriptor::open(
            Some(self.0.as_fd()),
            path.as_c_str(),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    }
}

/// Reads all of an fdinfo descriptor from its start into `text`, whose capacity is kept. One call
/// when the capacity suffices: the kernel makes the whole text at once (`single_open`), so a read
/// that leaves room has reached the end.
pub fn read_again(fdinfo: BorrowedFd<'_>, text: &mut Vec<u8>) -> io::Result<()> {
    text.resize(text.capacity().max(512), 0);
    let mut length = 0;
    loop {
        length += descriptor::read_at(fdinfo, &mut text[length..], length as u64)?;
        if length < text.len() {
            text.truncate(length);
            return Ok(());
        }
        text.resize(text.len() * 2, 0);
    }
}

/// The fdinfo text of a descriptor of our own.
pub fn own_fdinfo(fd: BorrowedFd<'_>, text: &mut Vec<u8>) -> io::Result<()> {
    let path = ShortPath::new(format_args!("thread-self/fdinfo/{}", fd.as_raw_fd()))?;
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    let file = descriptor::open(Some(proc_root()?), path.as_c_str(), flags)?;
    read_again(file.as_fd(), text)
}

/// What `/proc/self/fd/N` points at: a path, or a name such as `socket:[4711]`.
pub fn own_link(fd: BorrowedFd<'_>, link: &mut Vec<u8>) -> io::Result<()> {
    let path = ShortPath::new(format_args!("thread-self/fd/{}", fd.as_raw_fd()))?;
    link.resize(link.capacity().max(256), 0);
    loop {
        let length = descriptor::read_link(proc_root()?, path.as_c_str(), link)?;
        if length < link.len() {
            link.truncate(length);
            return Ok(());
        }
        link.resize(link.len() * 2, 0);
    }
}

/// Opens the file behind a descriptor of our own once more: a new description, with `flags`.
pub fn reopen(fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let path = ShortPath::new(format_args!("thread-self/fd/{}", fd.as_raw_fd()))?;
    descriptor::open(Some(proc_root()?), path.as_c_str(), flags | libc::O_CLOEXEC)
}

/// The value of the line `name:` of an fdinfo text, without the blanks around it.
pub fn field<'a>(text: &'a [u8], name: &str) -> Option<&'a str> {
    fields(text, name).next()
}

/// The values of all lines `name:` of an fdinfo text.
pub fn fields<'a>(text: &'a [u8], name: &str) -> impl Iterator<Item = &'a str> {
    text.split(|byte| *byte == b'\n').filter_map(move |line| {
        let rest = line.strip_prefix(name.as_bytes())?.strip_prefix(b":")?;
        std::str::from_utf8(rest).ok().map(str::trim)
    })
}

/// `path` as the kernel takes it; `EINVAL` for one with a NUL in it.
pub fn c_path(path: &str) -> io::Result<CString> {
    CString::new(path).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
