//! Every call that is announced, made in ways that do not wait and, where it can, in one that does.
//!
//! # Safety
//! Calls are made raw, for a wrapper could make one again after EINTR. What they are given is
//! integers, and pointers to what the scene owns and no reference names meanwhile: its scratch page,
//! its paths, and structures of the moment.
#![allow(unsafe_code)]

mod calls;

pub use calls::{TRIES, WAITS};

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::Place;
use crate::area::{Area, PAGE};

/// A call by what it gives, or the errno that it fails with, negated.
pub type Made = i64;

/// Some calls, and whoever makes them.
pub struct Try {
    pub names: &'static str,
    pub make: fn(&Scene) -> Made,
}

/// What the calls are made on.
pub struct Scene {
    page: Area,
    directory: File,
    directory_path: CString,
    path: CString,
    fifo: CString,
    file: File,
    /// Another description of the file, which holds locks that the first one wants.
    other: File,
    near: OwnedFd,
    far: OwnedFd,
    /// Has no room.
    full: OwnedFd,
    _unread: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
    listener: UnixListener,
    address: Vec<u8>,
    nobody_calls: TcpListener,
    epoll: OwnedFd,
    event: OwnedFd,
}

impl Scene {
    pub fn new(place: &Place) -> Result<Self> {
        let path = place.directory.join("announced");
        let fifo = place.directory.join("announced-fifo");
        let file = File::create(&path)?;
        let pair = || {
            let (family, kind) = (AddressFamily::Unix, SockType::Stream);
            socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC)
        };
        let ((near, far), (full, unread)) = (pair()?, pair()?);
        fill(&full);
        // A connection to ourselves that neither side has to wait for.
        let socket = place.directory.join("announced-socket");
        let listener = UnixListener::bind(&socket)?;
        let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        address.extend(socket.into_os_string().into_vec());
        address.push(0);
        let name = |path: std::path::PathBuf| CString::new(path.into_os_string().into_vec());
        let scene = Self {
            page: Area::private(4)?,
            directory: File::open(&place.directory)?,
            directory_path: name(place.directory.clone())?,
            other: File::open(&path)?,
            path: name(path)?,
            fifo: name(fifo)?,
            file,
            near,
            far,
            full,
            _unread: unread,
            pipe: nix::unistd::pipe()?,
            listener,
            address,
            nobody_calls: TcpListener::bind("127.0.0.1:0")?,
            epoll: owned(call(libc::SYS_epoll_create1, &[&0]))?,
            event: owned(call(libc::SYS_eventfd2, &[&0, &0]))?,
        };
        done(call(
            libc::SYS_mknod,
            &[&scene.fifo, &(libc::S_IFIFO | 0o600)],
        ))
        .context("make a FIFO")?;
        Ok(scene)
    }

    /// Where a call may write, or read what was put there.
    fn scratch(&self) -> usize {
        self.page.address() + PAGE
    }

    /// A structure of the moment, by its words.
    fn put(&self, words: &[u64]) -> usize {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.page.write(PAGE, &bytes);
        self.scratch()
    }

    /// A `struct flock` of the whole file.
    fn lock(&self, kind: i32) -> usize {
        self.put(&[kind as u64, 0, 0, 0])
    }
}

/// What a raw call may be given.
trait Word {
    fn word(&self) -> usize;
}

macro_rules! words {
    ($($type:ty),*) => {
        $(impl Word for $type {
            fn word(&self) -> usize {
                *self as usize
            }
        })*
    };
}

words!(i32, u32, i64, u64, usize);

impl Word for CString {
    fn word(&self) -> usize {
        self.as_ptr() as usize
    }
}

macro_rules! descriptors {
    ($($type:ty),*) => {
        $(impl Word for $type {
            fn word(&self) -> usize {
                self.as_raw_fd() as usize
            }
        })*
    };
}

descriptors!(OwnedFd, File, TcpListener, UnixListener);

fn call(number: i64, arguments: &[&dyn Word]) -> Made {
    let mut words = [0; 6];
    for (word, argument) in words.iter_mut().zip(arguments) {
        *word = argument.word();
    }
    let [a, b, c, d, e, f] = words;
    // SAFETY: see the head of this file.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        value => value,
    }
}

fn owned(made: Made) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    done(made)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(made as i32) })
}

fn done(made: Made) -> io::Result<()> {
    match made {
        0.. => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno as i32)),
    }
}

/// Closes what a call has opened.
fn closed(opened: Made) -> Made {
    match opened {
        0.. => call(libc::SYS_close, &[&opened]),
        errno => errno,
    }
}

/// The first that failed, else 0.
fn all(made: &[Made]) -> Made {
    made.iter().copied().find(|made| *made < 0).unwrap_or(0)
}

/// The two descriptors that a call wrote.
fn both_closed(scene: &Scene, made: Made) -> Made {
    if made < 0 {
        return made;
    }
    let pair = scene.page.read(PAGE, 8);
    let number = |at: usize| i64::from(pair[at]) | i64::from(pair[at + 1]) << 8;
    all(&[closed(number(0)), closed(number(4))])
}

fn fill(full: &OwnedFd) {
    let bytes = vec![0; 1 << 16];
    while let Ok(1..) = nix::sys::socket::send(
        full.as_raw_fd(),
        &bytes,
        nix::sys::socket::MsgFlags::MSG_DONTWAIT,
    ) {}
}

impl Scene {
    /// A connection to ourselves, taken by `accept`.
    fn meet(&self, accept: i64) -> Made {
        let client = call(libc::SYS_socket, &[&libc::AF_UNIX, &libc::SOCK_STREAM, &0]);
        if client < 0 {
            return client;
        }
        self.page.write(PAGE, &self.address);
        let arguments: [&dyn Word; 3] = [&client, &self.scratch(), &self.address.len()];
        let connected = call(libc::SYS_connect, &arguments);
        if connected < 0 {
            return all(&[connected, closed(client)]);
        }
        let accepted = call(accept, &[&self.listener, &0, &0, &0]);
        if accepted < 0 {
            return all(&[accepted, closed(client)]);
        }
        let shut = call(libc::SYS_shutdown, &[&accepted, &libc::SHUT_WR]);
        all(&[shut, closed(client), closed(accepted)])
    }
}
