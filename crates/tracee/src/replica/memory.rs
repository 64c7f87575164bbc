//! The address space of one process of the replica.

use super::ReplicaError;
use super::calls::{Calls, Expect, for_each};
use super::descriptors::give;
use super::files::Files;
use super::plan::{Step, part, steps};
use super::shared::SharedObjects;
use crate::memory_map::MapReader;
use crate::{HostTid, Stopped, blob};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use unbroken_image::{
    AddressRange, Advice, Backing, FileIdentity, Mapping, MemoryDelta, MemoryLayout, PAGE_SIZE,
    Pid, Protection, Sharing,
};
use unbroken_sys::channel::Channel;

/// The end of what a program can map (arch/x86/include/asm/page_64_types.h, TASK_SIZE_MAX).
const ADDRESSES_END: u64 = 0x7fff_ffff_f000;

/// asm-generic/mman-common.h, since Linux 6.13
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

/// asm/prctl.h
const ARCH_MAP_VDSO_64: u64 = 0x2003;

/// The first free descriptor of a process that holds nothing but the channel.
const FIRST_FREE: u64 = 0;

/// What of a process's memory stands in the replica.
#[derive(Debug, Default)]
pub(super) struct Memory {
    mappings: Vec<Mapping>,
    /// Guard regions were among it once; what is voided may have them.
    has_guards: bool,
    executable: FileIdentity,
}

/// What applying memory needs besides the process.
pub(super) struct Surroundings<'a> {
    pub shared: &'a mut SharedObjects,
    pub files: Files<'a>,
    pub channel: &'a Channel,
}

impl Memory {
    /// Takes in a change. Returns how many bytes of `bulk` were its pages.
    pub(super) fn apply(
        &mut self,
        stopped: &mut Stopped<'_>,
        pid: Pid,
        delta: &MemoryDelta,
        bulk: &[u8],
        surroundings: &mut Surroundings<'_>,
    ) -> Result<usize, ReplicaError> {
        let leader = stopped.process(pid)?.leader();
        let wanted = delta.mappings.as_ref();
        if wanted.is_some() || !delta.voided.is_empty() {
            let steps = steps(
                &self.mappings,
                wanted.unwrap_or(&self.mappings),
                &delta.voided,
            );
            run_steps(stopped, leader, &steps, self.has_guards, surroundings)?;
            if let Some(wanted) = wanted {
                self.map_vdso(stopped, leader, wanted)?;
                self.mappings.clone_from(wanted);
            }
            // The kernel knows what it mapped.
            let is_file = |step: &Step| {
                matches!(
                    step,
                    Step::Map(Mapping {
                        backing: Backing::File { .. },
                        ..
                    })
                )
            };
            if steps.iter().any(is_file) {
                self.verify_files(stopped, pid)?;
            }
        }
        self.install_guards(stopped, leader, &delta.guards)?;
        if let Some(layout) = &delta.layout {
            let is_new = layout.executable != self.executable;
            set_layout(stopped, leader, layout, is_new.then_some(&*surroundings))?;
            self.executable = layout.executable;
        }
        self.write_pages(stopped, pid, delta, bulk, surroundings.shared)
    }

    fn install_guards(
        &mut self,
        stopped: &mut Stopped<'_>,
        leader: HostTid,
        guards: &[AddressRange],
    ) -> Result<(), ReplicaError> {
        self.has_guards |= !guards.is_empty();
        for_each(stopped, leader, guards, |calls, range| {
            advise(calls, *range, MADV_GUARD_INSTALL)
        })
    }

    /// Brings the kernel's own pages to where they are in the service. They are one block that
    /// begins with [vvar], and a process can have it once.
    fn map_vdso(
        &self,
        stopped: &mut Stopped<'_>,
        leader: HostTid,
        wanted: &[Mapping],
    ) -> Result<(), ReplicaError> {
        let start = |mappings: &[Mapping]| {
            let is_kernel =
                |mapping: &&Mapping| matches!(mapping.backing, Backing::Vdso | Backing::Vvar);
            mappings
                .iter()
                .find(is_kernel)
                .map(|mapping| mapping.range.start)
        };
        let Some(address) = start(wanted).filter(|&address| start(&self.mappings) != Some(address))
        else {
            return Ok(());
        };
        let mut calls = Calls::new(stopped, leader);
        // It answers with the length of the vDSO.
        calls.add(
            "arch_prctl(ARCH_MAP_VDSO_64)",
            libc::SYS_arch_prctl,
            &[ARCH_MAP_VDSO_64, address],
            Expect::Success,
        )?;
        calls.run().map(drop)
    }

    fn verify_files(&self, stopped: &Stopped<'_>, pid: Pid) -> Result<(), ReplicaError> {
        let mut found = Vec::new();
        MapReader::default().read(stopped.process(pid)?, &self.mappings, &mut found)?;
        let file_at = |mappings: &[Mapping], address: u64| {
            let mapping = mappings
                .iter()
                .find(|mapping| mapping.range.contains(address))?;
            match part(
                mapping,
                AddressRange {
                    start: address,
                    end: mapping.range.end,
                },
            )
            .backing
            {
                Backing::File {
                    identity,
                    offset_bytes,
                    ..
                } => Some((identity, offset_bytes)),
                _ => None,
            }
        };
        for mapping in &self.mappings {
            if let Backing::File {
                identity,
                offset_bytes,
                ..
            } = mapping.backing
                && file_at(&found, mapping.range.start) != Some((identity, offset_bytes))
            {
                return Err(ReplicaError::WrongFile { identity });
            }
        }
        Ok(())
    }

    fn write_pages(
        &self,
        stopped: &Stopped<'_>,
        pid: Pid,
        delta: &MemoryDelta,
        bulk: &[u8],
        shared: &SharedObjects,
    ) -> Result<usize, ReplicaError> {
        let process = stopped.process(pid)?;
        let mut done = 0;
        for run in &delta.pages {
            let length = (run.count * PAGE_SIZE) as usize;
            let content = bulk
                .get(done..done + length)
                .ok_or(ReplicaError::WrongLength)?;
            done += length;
            let end = run.address + length as u64;
            let mut at = run.address;
            while at < end {
                let next = self
                    .mappings
                    .partition_point(|mapping| mapping.range.end <= at);
                let mapping = self
                    .mappings
                    .get(next)
                    .filter(|mapping| mapping.range.contains(at));
                let mapping = mapping.ok_or(ReplicaError::UnmappedPage { pid, address: at })?;
                let until = end.min(mapping.range.end);
                let part = &content[(at - run.address) as usize..(until - run.address) as usize];
                match (mapping.sharing, &mapping.backing) {
                    (
                        Sharing::Shared,
                        Backing::SharedMemory {
                            identity,
                            offset_bytes,
                            ..
                        },
                    ) => {
                        let offset = offset_bytes + (at - mapping.range.start);
                        shared.write(*identity, part, offset)?;
                    }
                    // The file holds it, for both sides.
                    (Sharing::Shared, _) => {}
                    // This file of /proc writes private pages whatever their protection.
                    (Sharing::Private, _) => {
                        let written = process.memory().write_all_at(part, at);
                        written.map_err(ReplicaError::own("write pages"))?;
                    }
                }
                at = until;
            }
        }
        Ok(done)
    }

    /// What stands behind the mappings now.
    pub(super) fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Locks what is locked, which would be in the way while pages still come and go.
    pub(super) fn lock(
        &self,
        stopped: &mut Stopped<'_>,
        leader: HostTid,
    ) -> Result<(), ReplicaError> {
        let mappings = self.mappings.iter();
        let locked: Vec<&Mapping> = mappings.filter(|it| it.advice.locked).collect();
        for_each(stopped, leader, &locked, |calls, mapping| {
            let Mapping { range, advice, .. } = mapping;
            let on_fault = u64::from(libc::MLOCK_ONFAULT);
            let arguments = [range.start, range.length_bytes(), on_fault];
            calls.add("mlock2", libc::SYS_mlock2, &arguments, Expect::Success)?;
            if !advice.locked_on_fault {
                // It is locked by now. What can fail is to bring pages that nobody may read, such as
                // those of a stack's guard, or that a file does not have any more (mlock(2), ENOMEM).
                let arguments = &arguments[..2];
                calls.add("mlock", libc::SYS_mlock, arguments, Expect::Anything)?;
            }
            Ok(())
        })
    }
}

/// Unmaps everything but the blob.
pub(super) fn unmap_all(stopped: &mut Stopped<'_>, leader: HostTid) -> Result<(), ReplicaError> {
    let mut calls = Calls::new(stopped, leader);
    for range in [
        AddressRange {
            start: 0,
            end: blob::RANGE.start,
        },
        AddressRange {
            start: blob::RANGE.end,
            end: ADDRESSES_END,
        },
    ] {
        let arguments = [range.start, range.length_bytes()];
        calls.add("munmap", libc::SYS_munmap, &arguments, Expect::Success)?;
    }
    calls.run().map(drop)
}

fn run_steps(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    steps: &[Step],
    has_guards: bool,
    surroundings: &mut Surroundings<'_>,
) -> Result<(), ReplicaError> {
    // A batch runs after all its items were added, so what an item needs done here is done first.
    for step in steps {
        if let Step::Map(mapping) = step
            && let Backing::SharedMemory {
                identity,
                offset_bytes,
                name,
            } = &mapping.backing
        {
            let end = offset_bytes + mapping.range.length_bytes();
            surroundings.shared.provide(*identity, name, end)?;
        }
    }
    for_each(stopped, leader, steps, |calls, step| match step {
        Step::Unmap(range) => {
            let arguments = [range.start, range.length_bytes()];
            calls
                .add("munmap", libc::SYS_munmap, &arguments, Expect::Success)
                .map(drop)
        }
        Step::Discard(range) => {
            // Guards outlive their content.
            if has_guards {
                advise(calls, *range, MADV_GUARD_REMOVE)?;
            }
            advise(calls, *range, libc::MADV_DONTNEED)
        }
        Step::Protect(range, protection) => {
            let arguments = [range.start, range.length_bytes(), bits(*protection)];
            calls
                .add("mprotect", libc::SYS_mprotect, &arguments, Expect::Success)
                .map(drop)
        }
        Step::Advise(range, advice) => advise_all(calls, *range, *advice, true),
        Step::Map(mapping) => map(calls, mapping, surroundings),
    })
}

fn bits(protection: Protection) -> u64 {
    let bit = |on: bool, bit: i32| if on { bit as u64 } else { 0 };
    bit(protection.read, libc::PROT_READ)
        | bit(protection.write, libc::PROT_WRITE)
        | bit(protection.execute, libc::PROT_EXEC)
}

fn map(
    calls: &mut Calls<'_, '_>,
    mapping: &Mapping,
    surroundings: &mut Surroundings<'_>,
) -> Result<(), ReplicaError> {
    let (descriptor, offset, flags) = match &mapping.backing {
        // They come as one block, and the last has its address in every process.
        Backing::Vdso | Backing::Vvar | Backing::Vsyscall => return Ok(()),
        Backing::Anonymous => (u64::MAX, 0, libc::MAP_ANONYMOUS),
        Backing::File {
            identity,
            offset_bytes,
            writable,
        } => {
            let writable = *writable && mapping.sharing == Sharing::Shared;
            let file = surroundings.files.open(*identity, writable)?;
            give(calls, surroundings.channel, file.as_fd())?;
            (FIRST_FREE, *offset_bytes, 0)
        }
        Backing::SharedMemory {
            identity,
            offset_bytes,
            ..
        } => {
            let object = surroundings.shared.get(*identity);
            let object = object.ok_or(ReplicaError::UnknownMemory {
                identity: *identity,
            })?;
            give(calls, surroundings.channel, object)?;
            (FIRST_FREE, *offset_bytes, 0)
        }
    };
    let flag = |on: bool, flag: i32| if on { flag } else { 0 };
    let flags = flags
        | libc::MAP_FIXED
        | flag(mapping.sharing == Sharing::Private, libc::MAP_PRIVATE)
        | flag(mapping.sharing == Sharing::Shared, libc::MAP_SHARED)
        | flag(mapping.grows_down, libc::MAP_GROWSDOWN)
        | flag(mapping.advice.no_reserve, libc::MAP_NORESERVE);
    let AddressRange { start, .. } = mapping.range;
    let arguments = [
        start,
        mapping.range.length_bytes(),
        bits(mapping.protection),
        flags as u64,
        descriptor,
        offset,
    ];
    calls.add("mmap", libc::SYS_mmap, &arguments, Expect::Value(start))?;
    if descriptor == FIRST_FREE {
        calls.add("close", libc::SYS_close, &[FIRST_FREE], Expect::Success)?;
    }
    advise_all(calls, mapping.range, mapping.advice, false)
}

fn advise(calls: &mut Calls<'_, '_>, range: AddressRange, advice: i32) -> Result<(), ReplicaError> {
    let arguments = [range.start, range.length_bytes(), advice as u64];
    calls
        .add("madvise", libc::SYS_madvise, &arguments, Expect::Success)
        .map(drop)
}

/// Gives a range its advice. What is off is off already in a new mapping, and `also_off` undoes it
/// in another. Locks come later ([`Memory::lock`]).
fn advise_all(
    calls: &mut Calls<'_, '_>,
    range: AddressRange,
    advice: Advice,
    also_off: bool,
) -> Result<(), ReplicaError> {
    for (on, set, unset) in [
        (advice.dont_fork, libc::MADV_DONTFORK, libc::MADV_DOFORK),
        (advice.dont_dump, libc::MADV_DONTDUMP, libc::MADV_DODUMP),
        (
            advice.wipe_on_fork,
            libc::MADV_WIPEONFORK,
            libc::MADV_KEEPONFORK,
        ),
        (
            advice.mergeable,
            libc::MADV_MERGEABLE,
            libc::MADV_UNMERGEABLE,
        ),
    ] {
        if on {
            advise(calls, range, set)?;
        } else if also_off {
            // Undoing refuses mappings that cannot have the advice at all.
            let arguments = [range.start, range.length_bytes(), unset as u64];
            calls.add("madvise", libc::SYS_madvise, &arguments, Expect::Anything)?;
        }
    }
    // One call decides about both.
    let order = match (advice.sequential, advice.random) {
        (true, _) => Some(libc::MADV_SEQUENTIAL),
        (_, true) => Some(libc::MADV_RANDOM),
        _ => also_off.then_some(libc::MADV_NORMAL),
    };
    if let Some(order) = order {
        advise(calls, range, order)?;
    }
    // Huge pages change no content, and a kernel without them says EINVAL.
    let huge = match (advice.huge_page, advice.no_huge_page) {
        (true, _) => libc::MADV_HUGEPAGE,
        (_, true) => libc::MADV_NOHUGEPAGE,
        _ => return Ok(()),
    };
    let arguments = [range.start, range.length_bytes(), huge as u64];
    calls
        .add("madvise", libc::SYS_madvise, &arguments, Expect::Anything)
        .map(drop)
}

/// Sets the bounds that `PR_SET_MM_MAP` sets, and the link to the executable if it is another.
/// The single `PR_SET_MM_*` calls would need a capability that root may lack (KERNEL.md, Bounds of
/// a memory map).
fn set_layout(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    layout: &MemoryLayout,
    executable: Option<&Surroundings<'_>>,
) -> Result<(), ReplicaError> {
    let mut calls = Calls::new(stopped, leader);
    let auxiliary = calls.bytes(&layout.auxv)?;
    let descriptor = if executable.is_some() {
        FIRST_FREE
    } else {
        u64::from(u32::MAX)
    };
    // struct prctl_mm_map (linux/prctl.h)
    let map = calls.words(&[
        layout.start_code,
        layout.end_code,
        layout.start_data,
        layout.end_data,
        layout.start_brk,
        layout.brk,
        layout.start_stack,
        layout.arg_start,
        layout.arg_end,
        layout.env_start,
        layout.env_end,
        auxiliary.0,
        layout.auxv.len() as u64 | descriptor << 32,
    ])?;
    if let Some(Surroundings { files, channel, .. }) = executable {
        let file = files.open(layout.executable, false)?;
        give(&mut calls, channel, file.as_fd())?;
    }
    let arguments = [
        libc::PR_SET_MM as u64,
        libc::PR_SET_MM_MAP as u64,
        map.0,
        13 * 8,
        0,
    ];
    calls.add(
        "prctl(PR_SET_MM_MAP)",
        libc::SYS_prctl,
        &arguments,
        Expect::Success,
    )?;
    if executable.is_some() {
        calls.add("close", libc::SYS_close, &[FIRST_FREE], Expect::Success)?;
    }
    calls.run().map(drop)
}
