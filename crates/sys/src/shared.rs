//! Memory that several processes of ours map: the journal and the input log.
//!
//! The blocks here rely on a mapping staying valid and inside its object for as long as the
//! `Mapping` lives. Objects made here carry `F_SEAL_SHRINK`, so no process can cut the object under
//! a mapping (which would be SIGBUS). What other processes write at any moment is read through
//! atomics only; `ring` has its own argument.
#![allow(unsafe_code)]

mod ring;

pub use ring::{Consumer, Producer, Reservation, RingMemory};

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A range of our address space that shows shared objects; unmapped on drop.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    length_bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; access goes through atomics or
// through the ends of a ring, which say for themselves why they are sound.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Takes address space that shows nothing yet.
    fn reserve(length_bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length_bytes,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        match NonNull::new(address.cast::<u8>()) {
            Some(address) if address.as_ptr().cast() != libc::MAP_FAILED => Ok(Self {
                address,
                length_bytes,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Shows `length_bytes` of the object from `object_offset` at `offset` of this range; all
    /// three are multiples of the page size, except the last length.
    fn place(
        &self,
        offset: usize,
        fd: BorrowedFd<'_>,
        object_offset: usize,
        length_bytes: usize,
    ) -> io::Result<()> {
        let address = self.at(offset, length_bytes, 1);
        // SAFETY: MAP_FIXED replaces only addresses inside this range, which we own.
        let placed = unsafe {
            libc::mmap(
                address.as_ptr().cast(),
                length_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd.as_raw_fd(),
                object_offset as libc::off_t,
            )
        };
        if placed == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// The address of a checked range.
    fn at(&self, offset: usize, length_bytes: usize, alignment: usize) -> NonNull<u8> {
        let end = offset
            .checked_add(length_bytes)
            .filter(|end| *end <= self.length_bytes);
        assert!(
            end.is_some() && offset.is_multiple_of(alignment),
            "{length_bytes} bytes at offset {offset} of {} shared bytes, alignment {alignment}",
            self.length_bytes
        );
        // SAFETY: the offset is inside the mapping, as just checked.
        unsafe { self.address.add(offset) }
    }

    fn word32(&self, offset: usize) -> &AtomicU32 {
        let address = self.at(offset, 4, 4);
        // SAFETY: inside the mapping, aligned, initialised; atomics may be shared.
        unsafe { AtomicU32::from_ptr(address.as_ptr().cast()) }
    }

    fn word64(&self, offset: usize) -> &AtomicU64 {
        let address = self.at(offset, 8, 8);
        // SAFETY: inside the mapping, aligned, initialised; atomics may be shared.
        unsafe { AtomicU64::from_ptr(address.as_ptr().cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from the mapping any more. munmap of a range that we mapped
        // fails only for want of memory to split it, and whole ranges are not split.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.length_bytes) };
    }
}

/// A memfd of fixed length: sealed against shrinking, growing and further seals.
fn sealed_object(name: &str, length_bytes: usize) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the name is a C string that outlives the call.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(length_bytes as u64)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

fn require_seal(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GET_SEALS takes no argument.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(io::Error::last_os_error());
    }
    if seals & libc::F_SEAL_SHRINK == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "shared memory without F_SEAL_SHRINK could be cut under its users",
        ));
    }
    Ok(())
}

fn length_of(fd: &OwnedFd) -> io::Result<usize> {
    let length_bytes = File::from(fd.try_clone()?).metadata()?.len();
    usize::try_from(length_bytes)
        .ok()
        .filter(|length_bytes| *length_bytes > 0)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "shared memory of no length"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "shared bytes")]
    fn an_offset_past_the_end_panics() {
        let mapping = Mapping::reserve(4096).unwrap();
        mapping.word64(4092);
    }
}
