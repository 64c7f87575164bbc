//! A file mapped as a table of 64-bit atomic words, shared by every process that maps it.
//!
//! The blocks rely on: `mmap(2)` of a whole file that is at least as long as the mapping and that
//! nobody shortens while it is mapped (the callers replace such files by `rename(2)`, never by
//! truncation); a page-aligned address is aligned for `AtomicU64`; the mapping lives as long as
//! the value that owns it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// Whether the words may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The file need only be open for reading. Stores stay in this process.
    Read,
    ReadWrite,
}

/// A mapped file, as atomic words. Unmapped on drop.
#[derive(Debug)]
pub struct MappedWords {
    address: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is reached only by atomics.
unsafe impl Send for MappedWords {}
// SAFETY: as above; every access is through `&AtomicU64`.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps the first `count` words of `file`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file is shorter than that; else what `mmap(2)` says.
    pub fn map(file: &File, count: usize, access: Access) -> io::Result<MappedWords> {
        let bytes = count
            .checked_mul(size_of::<AtomicU64>())
            .filter(|bytes| *bytes > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A private mapping follows the file until the page is written to, so that even a stray
        // store through the safe `words` is harmless.
        let sharing = match access {
            Access::Read => libc::MAP_PRIVATE,
            Access::ReadWrite => libc::MAP_SHARED,
        };
        // SAFETY: no address is asked for, so no existing mapping is touched; the descriptor is
        // open for the whole call.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(MappedWords { address, count })
    }

    /// All words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping covers `count` words, is page-aligned, and lives until drop;
        // any bit pattern is a u64; other processes change it only as atomics.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.count) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `map` made; no reference to it outlives `self`.
        unsafe {
            libc::munmap(
                self.address.as_ptr().cast(),
                self.count * size_of::<AtomicU64>(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn two_mappings_of_one_file_are_the_same_words() {
        let path = std::env::temp_dir().join(format!("unbroken-mapped-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .expect("temporary file");
        std::fs::remove_file(&path).expect("temporary file");
        file.set_len(4096).expect("length");
        let writer = MappedWords::map(&file, 512, Access::ReadWrite).expect("map");
        let reader = MappedWords::map(&file, 512, Access::Read).expect("map");
        writer.words()[511].store(7, Ordering::Release);
        assert_eq!(reader.words()[511].load(Ordering::Acquire), 7);
        let too_long = MappedWords::map(&file, 513, Access::Read).expect_err("too long");
        assert_eq!(too_long.kind(), io::ErrorKind::UnexpectedEof);
    }
}
