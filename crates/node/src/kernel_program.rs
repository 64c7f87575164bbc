//! A program for the kernel that is made while everything else goes on.

use std::io;
use std::thread::JoinHandle;
use unbroken_sys::affinity;

/// It takes milliseconds to make. Another thread does it, and until then there is none.
pub enum KernelProgram<P> {
    Unasked,
    Loading(JoinHandle<io::Result<P>>),
    Ready(P),
    /// This kernel has no such thing, or it failed.
    Absent,
}

impl<P: Send + 'static> KernelProgram<P> {
    /// Has it made on `core`, if it was not asked for before.
    pub fn ask_for(&mut self, core: usize, load: impl FnOnce() -> io::Result<P> + Send + 'static) {
        if !matches!(self, KernelProgram::Unasked) {
            return;
        }
        let work = move || {
            affinity::bind(0, &[core])?;
            load()
        };
        let thread = std::thread::Builder::new().name("programs".to_owned());
        *self = thread
            .spawn(work)
            .map_or(KernelProgram::Absent, KernelProgram::Loading);
    }

    /// The program, when it is made.
    ///
    /// # Errors
    /// Says once why there is none.
    pub fn ready(&mut self) -> io::Result<Option<&P>> {
        match self {
            KernelProgram::Loading(thread) if !thread.is_finished() => Ok(None),
            _ => self.wait(),
        }
    }

    /// The program, once, when it is made.
    ///
    /// # Errors
    /// Says once why there is none.
    pub fn take_ready(&mut self) -> io::Result<Option<P>> {
        self.ready()?;
        match std::mem::replace(self, KernelProgram::Absent) {
            KernelProgram::Ready(program) => Ok(Some(program)),
            not_ready => {
                *self = not_ready;
                Ok(None)
            }
        }
    }

    /// The program, made by now if it was asked for.
    ///
    /// # Errors
    /// Says once why there is none.
    pub fn wait(&mut self) -> io::Result<Option<&P>> {
        if matches!(self, KernelProgram::Loading(_))
            && let KernelProgram::Loading(thread) = std::mem::replace(self, KernelProgram::Absent)
        {
            let loaded = thread.join().map_err(|_| io::ErrorKind::Other)?;
            *self = KernelProgram::Ready(loaded?);
        }
        Ok(match self {
            KernelProgram::Ready(program) => Some(program),
            _ => None,
        })
    }
}
