//! Memory that several processes of ours map: the status board, the journal, the input log.
//!
//! The blocks here rely on a mapping staying valid and inside its object for as long as the
//! `Mapping` lives. Objects made here carry `F_SEAL_SHRINK`, so no process can cut the object under
//! a mapping (which would be SIGBUS); for a plain file the caller vouches. What other processes
//! write at any moment is read through atomics only; `ring` has its own argument.
#![allow(unsafe_code)]

mod ring;

pub use ring::{Consumer, Producer, Reservation, RingMemory};

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Shared memory with bounds-checked atomic access. Offsets are layout constants of the caller:
/// one that is out of range or not aligned panics, as an index does.
#[derive(Debug)]
pub struct SharedMemory {
    mapping: Mapping,
    fd: OwnedFd,
}

impl SharedMemory {
    /// Makes a new object of `length_bytes` zero bytes that can neither shrink nor grow, and maps
    /// it. `name` shows in `/proc/PID/maps`.
    pub fn create(name: &str, length_bytes: usize) -> io::Result<Self> {
        let fd = sealed_object(name, length_bytes)?;
        let mapping = Mapping::of(fd.as_fd(), length_bytes)?;
        Ok(Self { mapping, fd })
    }

    /// Maps an object that another process made with [`create`](Self::create). Refuses with
    /// `InvalidInput` one that could shrink under the mapping.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        require_seal(fd.as_fd())?;
        let length_bytes = length_of(&fd)?;
        let mapping = Mapping::of(fd.as_fd(), length_bytes)?;
        Ok(Self { mapping, fd })
    }

    /// Maps a file in a directory that only we write, making it at least `length_bytes` long.
    /// Whoever can truncate the file can kill its users by SIGBUS: root only.
    pub fn from_file(file: File, length_bytes: usize) -> io::Result<Self> {
        if file.metadata()?.len() < length_bytes as u64 {
            file.set_len(length_bytes as u64)?;
        }
        let fd = OwnedFd::from(file);
        let mapping = Mapping::of(fd.as_fd(), length_bytes)?;
        Ok(Self { mapping, fd })
    }

    pub fn length_bytes(&self) -> usize {
        self.mapping.length_bytes
    }

    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        self.mapping.word32(offset)
    }

    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        self.mapping.word64(offset)
    }

    /// Copies `into.len()` bytes out, each read atomically; bytes that another process writes
    /// meanwhile may be old or new, one by one.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let bytes = self.bytes(offset, into.len());
        for (target, source) in into.iter_mut().zip(bytes) {
            *target = source.load(Ordering::Relaxed);
        }
    }

    /// Copies `from` in, each byte written atomically.
    pub fn write(&self, offset: usize, from: &[u8]) {
        for (target, source) in self.bytes(offset, from.len()).iter().zip(from) {
            target.store(*source, Ordering::Relaxed);
        }
    }

    fn bytes(&self, offset: usize, length_bytes: usize) -> &[AtomicU8] {
        let address = self.mapping.at(offset, length_bytes, 1);
        // SAFETY: the range is inside the mapping, every byte of it is initialised, and an
        // `AtomicU8` may be shared with any number of writers.
        unsafe { std::slice::from_raw_parts(address.as_ptr().cast::<AtomicU8>(), length_bytes) }
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

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
    /// Maps the first `length_bytes` of the object, readable and writable.
    fn of(fd: BorrowedFd<'_>, length_bytes: usize) -> io::Result<Self> {
        let mapping = Self::reserve(length_bytes)?;
        mapping.place(0, fd, 0, length_bytes)?;
        Ok(mapping)
    }

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

    /// Makes the pages of a range present and writable now, so that no later store faults.
    fn populate(&self, offset: usize, length_bytes: usize) -> io::Result<()> {
        let address = self.at(offset, length_bytes, 1);
        // SAFETY: MADV_POPULATE_WRITE (madvise(2), Linux 5.14) changes no content.
        let result = unsafe {
            libc::madvise(
                address.as_ptr().cast(),
                length_bytes,
                libc::MADV_POPULATE_WRITE,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
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
    fn two_mappings_of_one_object_agree() {
        let first = SharedMemory::create("unbroken-test", 8192).unwrap();
        let second = SharedMemory::from_fd(first.as_fd().try_clone_to_owned().unwrap()).unwrap();
        first.word64(8).store(7, Ordering::Release);
        first.write(100, b"across");
        let mut read = [0; 6];
        second.read(100, &mut read);
        assert_eq!(
            (second.word64(8).load(Ordering::Acquire), &read),
            (7, b"across")
        );
        assert_eq!(second.length_bytes(), 8192);
    }

    #[test]
    fn an_object_that_could_shrink_is_refused() {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"unbroken-test".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: the descriptor is new and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        File::from(fd.try_clone().unwrap()).set_len(4096).unwrap();
        assert_eq!(
            SharedMemory::from_fd(fd).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    #[should_panic(expected = "shared bytes")]
    fn an_offset_past_the_end_panics() {
        let memory = SharedMemory::create("unbroken-test", 4096).unwrap();
        memory.word64(4092);
    }
}
