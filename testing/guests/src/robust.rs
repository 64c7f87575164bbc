//! A robust mutex of the C library: the kernel tells the next owner when one has died.
//!
//! # Safety
//! The mutex lives in a box that never moves, for as long as any thread can use it.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;

/// A robust mutex without content.
pub struct RobustMutex(Box<UnsafeCell<libc::pthread_mutex_t>>);

// SAFETY: it is a mutex; every access is a call that is made for several threads.
unsafe impl Send for RobustMutex {}
// SAFETY: as above.
unsafe impl Sync for RobustMutex {}

fn check(errno: i32) -> io::Result<()> {
    match errno {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

impl RobustMutex {
    pub fn new() -> io::Result<Self> {
        // SAFETY: initialised in place, in the box where it stays.
        unsafe {
            let mut attributes = MaybeUninit::uninit();
            check(libc::pthread_mutexattr_init(attributes.as_mut_ptr()))?;
            let mut attributes = attributes.assume_init();
            check(libc::pthread_mutexattr_setrobust(
                &mut attributes,
                libc::PTHREAD_MUTEX_ROBUST,
            ))?;
            let mutex = Box::new(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));
            check(libc::pthread_mutex_init(mutex.get(), &attributes))?;
            Ok(Self(mutex))
        }
    }

    /// `None` when it is locked now, `EOWNERDEAD` when it is and its last owner died.
    pub fn lock(&self) -> io::Result<Option<i32>> {
        // SAFETY: initialised by `new`.
        match unsafe { libc::pthread_mutex_lock(self.0.get()) } {
            0 => Ok(None),
            libc::EOWNERDEAD => Ok(Some(libc::EOWNERDEAD)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// As [`RobustMutex::lock`], `EBUSY` when another thread has it.
    pub fn try_lock(&self) -> io::Result<Option<i32>> {
        // SAFETY: initialised by `new`.
        match unsafe { libc::pthread_mutex_trylock(self.0.get()) } {
            0 => Ok(None),
            errno @ (libc::EOWNERDEAD | libc::EBUSY) => Ok(Some(errno)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Makes it whole after `EOWNERDEAD`, and unlocks it.
    pub fn repair(&self) -> io::Result<()> {
        // SAFETY: initialised by `new`, and held by this thread.
        unsafe {
            check(libc::pthread_mutex_consistent(self.0.get()))?;
            check(libc::pthread_mutex_unlock(self.0.get()))
        }
    }
}
