//! Address spaces and what changed in them.

use serde::{Deserialize, Serialize};

/// Bytes of a page on x86-64.
pub const PAGE_SIZE: u64 = 4096;

/// Addresses `start..end` of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AddressRange {
    pub start: u64,
    pub end: u64,
}

impl AddressRange {
    pub fn length_bytes(self) -> u64 {
        self.end - self.start
    }

    pub fn pages(self) -> u64 {
        self.length_bytes() / PAGE_SIZE
    }

    pub fn contains(self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// The part that both ranges share, if any.
    pub fn intersection(self, other: AddressRange) -> Option<AddressRange> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(AddressRange { start, end })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    pub read: bool,
    pub write: bool,
    pub execute: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sharing {
    Private,
    Shared,
}

/// A file by what the kernel calls it; a path alone can come to mean another file. The default is no
/// file's.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct FileIdentity {
    /// `st_dev` as `makedev(major, minor)` of `/proc/PID/maps`.
    pub device: u64,
    pub inode: u64,
}

/// What stands behind a mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    Anonymous,
    /// A file, whatever its name is, if it has any.
    File {
        identity: FileIdentity,
        offset_bytes: u64,
        /// Whether the mapping could be made writable (the file was opened for writing).
        writable: bool,
    },
    /// Shared memory that never had a path: `MAP_SHARED | MAP_ANONYMOUS`, a memfd.
    /// Mappings of one identity share their pages.
    SharedMemory {
        identity: FileIdentity,
        offset_bytes: u64,
        /// Of a memfd; what is no memfd has none.
        name: String,
    },
    /// The kernel's own: moved to the address, never copied.
    Vdso,
    Vvar,
    Vsyscall,
}

/// Advice and locks that `/proc/PID/smaps` VmFlags shows and `maps` does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    pub dont_fork: bool,
    pub dont_dump: bool,
    pub huge_page: bool,
    pub no_huge_page: bool,
    pub wipe_on_fork: bool,
    pub mergeable: bool,
    pub sequential: bool,
    pub random: bool,
    pub locked: bool,
    /// Pages are locked when they come, and none are brought for that (`MLOCK_ONFAULT`).
    pub locked_on_fault: bool,
    pub no_reserve: bool,
}

impl Advice {
    /// What matters of it: not that there is to be no huge page, and no reservation. Those are
    /// given by flags of `mmap` that nearly every thread's memory carries, they change neither
    /// content nor behaviour, and only a walk through all page tables shows them.
    pub fn without_hints(self) -> Advice {
        Advice {
            no_huge_page: false,
            no_reserve: false,
            ..self
        }
    }
}

/// A run of addresses with one backing and one set of attributes. Adjacent mappings that continue
/// each other are one `Mapping`, whatever the kernel's own division is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    pub range: AddressRange,
    pub protection: Protection,
    pub sharing: Sharing,
    pub grows_down: bool,
    pub backing: Backing,
    pub advice: Advice,
}

impl Mapping {
    /// The file that it shows.
    pub fn file(&self) -> Option<FileIdentity> {
        match self.backing {
            Backing::File { identity, .. } => Some(identity),
            _ => None,
        }
    }
}

/// The bounds that `PR_SET_MM_MAP` sets (`struct prctl_mm_map`), and the auxiliary vector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    pub auxv: Vec<u8>,
    /// The program's file, whatever its name is now.
    pub executable: FileIdentity,
}

/// `count` consecutive pages whose content follows in the epoch's bulk part, in the order of the
/// runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    pub address: u64,
    pub count: u64,
}

/// How an address space differs from the epoch before. Applied in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDelta {
    /// Ranges whose old content is void: the replica unmaps them. Every page of them that is
    /// present now is among `pages`.
    pub voided: Vec<AddressRange>,
    /// The whole map, when any part of it changed. The replica maps what it lacks, unmaps what is
    /// not listed and changes protections.
    pub mappings: Option<Vec<Mapping>>,
    /// The guard regions (`MADV_GUARD_INSTALL`) in new mappings and in `voided`.
    pub guards: Vec<AddressRange>,
    pub layout: Option<MemoryLayout>,
    pub pages: Vec<PageRun>,
}
