//! One descriptor of ours: what it names, its flags, its position, its bytes.
//!
//! Every block passes a descriptor that a `BorrowedFd` keeps open for the length of the call, and
//! memory of ours whose length goes with it.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What `fstat(2)` says that a mirror of the object needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub device: u64,
    pub inode: u64,
    /// Type and permission bits.
    pub mode: u32,
    pub user: u32,
    pub group: u32,
    /// `st_rdev`: which device a device file is.
    pub special_device: u64,
    pub length_bytes: u64,
    /// Names of the inode; 0 for a file that was deleted.
    pub links: u64,
    /// `st_ctime` as nanoseconds since 1970.
    pub changed_ns: i64,
}

impl Status {
    /// The `S_IF*` type.
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

pub(crate) fn check_size(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `fstat(2)`; works on `O_PATH` descriptors too.
pub fn status(fd: BorrowedFd<'_>) -> io::Result<Status> {
    // SAFETY: all-zero bytes are a valid `struct stat`.
    let mut raw: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills `raw`, which outlives the call.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &mut raw) })?;
    Ok(Status {
        device: raw.st_dev,
        inode: raw.st_ino,
        mode: raw.st_mode,
        user: raw.st_uid,
        group: raw.st_gid,
        special_device: raw.st_rdev,
        length_bytes: u64::try_from(raw.st_size).unwrap_or(0),
        links: raw.st_nlink,
        changed_ns: raw.st_ctime * 1_000_000_000 + raw.st_ctime_nsec,
    })
}

/// `f_type` of `fstatfs(2)`: the magic number of the filesystem that `fd` lies on.
pub fn filesystem_magic(fd: BorrowedFd<'_>) -> io::Result<i64> {
    // SAFETY: all-zero bytes are a valid `struct statfs`.
    let mut raw: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills `raw`, which outlives the call.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), &mut raw) })?;
    Ok(raw.f_type)
}

/// Whether what `fd` names has an identity (`st_dev`, `st_ino`) that lasts. Some filesystems of the
/// kernel's make their inodes as they are looked up, or give the same path another number on each
/// mount.
pub fn has_lasting_identity(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // include/uapi/linux/magic.h: proc, sysfs, cgroup and cgroup2
    const MADE_WHEN_LOOKED_UP: [i64; 4] = [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270];
    Ok(!MADE_WHEN_LOOKED_UP.contains(&filesystem_magic(fd)?))
}

fn control(fd: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> io::Result<i32> {
    // SAFETY: every command used here takes an integer, so no memory is involved.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) })
}

/// `F_GETFL`: access mode and status flags of the description.
pub fn status_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    control(fd, libc::F_GETFL, 0)
}

/// `F_SETFL`.
pub fn set_status_flags(fd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    control(fd, libc::F_SETFL, flags).map(drop)
}

/// `F_GETLEASE`: `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
pub fn lease(fd: BorrowedFd<'_>) -> io::Result<i32> {
    control(fd, libc::F_GETLEASE, 0)
}

/// A new descriptor of the same description, at the lowest free number at or above `minimum`,
/// closed on exec.
pub fn duplicate_from(fd: BorrowedFd<'_>, minimum: i32) -> io::Result<OwnedFd> {
    let new = control(fd, libc::F_DUPFD_CLOEXEC, minimum)?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// `lseek(2)`; `whence` is `SEEK_*`. Returns the new position in bytes.
pub fn seek(fd: BorrowedFd<'_>, offset: i64, whence: i32) -> io::Result<u64> {
    // SAFETY: no memory is involved.
    let position = unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) };
    u64::try_from(position).map_err(|_| io::Error::last_os_error())
}

/// `ftruncate(2)`.
pub fn truncate(fd: BorrowedFd<'_>, length_bytes: u64) -> io::Result<()> {
    let length =
        i64::try_from(length_bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), length) }).map(drop)
}

/// `read(2)`.
pub fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `len` bytes into `buffer`.
    check_size(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// `write(2)`.
pub fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the kernel reads `len` bytes of `bytes`.
    check_size(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })
}

/// `pread(2)`.
pub fn read_at(fd: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `len` bytes into `buffer`.
    check_size(unsafe {
        libc::pread(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            offset as i64,
        )
    })
}

/// `pwrite(2)`.
pub fn write_at(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> io::Result<usize> {
    // SAFETY: the kernel reads `len` bytes of `bytes`.
    check_size(unsafe {
        libc::pwrite(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            offset as i64,
        )
    })
}

/// `FIONREAD`: bytes that can be read now.
pub fn unread_bytes(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// `poll(2)` without waiting: which of `events`, and of `POLLERR` and `POLLHUP`, hold now.
pub fn poll_now(fd: BorrowedFd<'_>, events: i16) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call.
    check(unsafe { libc::poll(&mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// `fchown(2)`.
pub fn set_owner(fd: BorrowedFd<'_>, user: u32, group: u32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fchown(fd.as_raw_fd(), user, group) }).map(drop)
}

/// `fchmod(2)` with permission bits.
pub fn set_mode(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), mode) }).map(drop)
}

/// `openat(2)`; with `directory` as `None` relative to the working directory.
pub fn open(directory: Option<BorrowedFd<'_>>, path: &CStr, flags: i32) -> io::Result<OwnedFd> {
    let base = directory.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: `path` is NUL-terminated; no mode is read as neither O_CREAT nor O_TMPFILE is passed.
    let fd = check(unsafe { libc::openat(base, path.as_ptr(), flags & !libc::O_CREAT) })?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a path as it is seen from `root`, which no part of it leads out of (`openat2(2)`).
pub fn open_beneath(root: BorrowedFd<'_>, path: &CStr, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: all-zero bytes are a valid `struct open_how`.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((flags & !libc::O_CREAT).cast_unsigned());
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: `path` is NUL-terminated, and `how` outlives the call, which is told its length.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            std::mem::size_of_val(&how),
        )
    };
    let fd = check(fd as libc::c_int)?;
    // SAFETY: the kernel just gave us this number, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `readlinkat(2)` into `buffer`; returns the length. A result as long as `buffer` may be cut.
pub fn read_link(directory: BorrowedFd<'_>, path: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `path` is NUL-terminated and the kernel writes at most `len` bytes into `buffer`.
    check_size(unsafe {
        libc::readlinkat(
            directory.as_raw_fd(),
            path.as_ptr(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
        )
    })
}

/// Calls `each` with every name in an open directory, from its current position on
/// (`getdents64(2)`).
pub fn each_name(directory: BorrowedFd<'_>, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    // struct linux_dirent64: inode 8, offset 8, record length 2, type 1, name.
    const LENGTH_AT: usize = 16;
    const NAME_AT: usize = 19;
    let mut buffer = [0u8; 8192];
    loop {
        // SAFETY: the kernel writes at most `len` bytes into `buffer`.
        let filled = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                directory.as_raw_fd(),
                buffer.as_mut_ptr(),
                buffer.len(),
            )
        };
        let mut rest = &buffer[..check_size(filled as libc::ssize_t)?];
        if rest.is_empty() {
            return Ok(());
        }
        while rest.len() > NAME_AT {
            let length = usize::from(u16::from_ne_bytes([rest[LENGTH_AT], rest[LENGTH_AT + 1]]));
            let Some(record) = rest.get(..length).filter(|record| record.len() > NAME_AT) else {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            };
            each(
                record[NAME_AT..]
                    .split(|byte| *byte == 0)
                    .next()
                    .unwrap_or_default(),
            );
            rest = &rest[length..];
        }
    }
}

/// `SO_DOMAIN`, `SO_TYPE`, `SO_PROTOCOL` and `SO_ACCEPTCONN` of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketNature {
    pub domain: i32,
    pub kind: i32,
    pub protocol: i32,
    pub listening: bool,
}

/// What sort of socket `fd` is; `ENOTSOCK` for anything else.
pub fn socket_nature(fd: BorrowedFd<'_>) -> io::Result<SocketNature> {
    let option = |name| -> io::Result<i32> {
        let mut value: libc::c_int = 0;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes into `value`.
        check(unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                name,
                (&raw mut value).cast(),
                &mut length,
            )
        })?;
        Ok(value)
    };
    Ok(SocketNature {
        domain: option(libc::SO_DOMAIN)?,
        kind: option(libc::SO_TYPE)?,
        protocol: option(libc::SO_PROTOCOL)?,
        listening: option(libc::SO_ACCEPTCONN)? != 0,
    })
}
