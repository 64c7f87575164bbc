//! What shared memory holds, whoever has touched it.
//!
//! A page of shared memory lives in the object, not in the page tables of its mappers: a replica
//! that has just come to life maps memory that none of its page tables show, and so does a program
//! after `MADV_DONTNEED`. The object itself tells which of its pages exist.

use crate::TraceError;
use crate::thread::Process;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use unbroken_image::{AddressRange, Backing, Mapping, PAGE_SIZE, PageRun};
use unbroken_sys::descriptor;

/// Adds the pages of every mapping of shared memory in `map` that hold anything, where `pages`
/// lacks them. Both are ascending.
pub fn add_shared_pages(
    process: &Process,
    map: &[Mapping],
    pages: &mut Vec<PageRun>,
) -> Result<(), TraceError> {
    let is_shared = |mapping: &&Mapping| matches!(mapping.backing, Backing::SharedMemory { .. });
    if !map.iter().any(|mapping| is_shared(&mapping)) {
        return Ok(());
    }
    let mut found = Vec::new();
    let path = format!("/proc/{}/map_files", process.host_pid);
    let failed = |source| TraceError::Proc {
        path: path.clone(),
        source,
    };
    for entry in std::fs::read_dir(&path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // The kernel divides what we see as one mapping as it likes.
        let Some(range) = entry.file_name().to_str().and_then(parse_range) else {
            continue;
        };
        let mut mappings = map.iter().filter(is_shared);
        let Some(mapping) = mappings.find(|mapping| mapping.range.contains(range.start)) else {
            continue;
        };
        let Backing::SharedMemory { offset_bytes, .. } = mapping.backing else {
            continue;
        };
        let offset = offset_bytes + (range.start - mapping.range.start);
        let file = File::open(entry.path()).map_err(failed)?;
        extents(&file, offset, range, &mut found).map_err(failed)?;
    }
    if found.is_empty() {
        return Ok(());
    }
    merge(pages, found);
    Ok(())
}

/// `start-end` in hexadecimal.
fn parse_range(name: &str) -> Option<AddressRange> {
    let (start, end) = name.split_once('-')?;
    Some(AddressRange {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
    })
}

/// Where `file`, mapped at `range` from `offset` on, has data.
fn extents(
    file: &File,
    offset: u64,
    range: AddressRange,
    found: &mut Vec<PageRun>,
) -> io::Result<()> {
    let end = offset + range.length_bytes();
    let mut at = offset;
    while at < end {
        let start = match descriptor::seek(file.as_fd(), at as i64, libc::SEEK_DATA) {
            Ok(start) if start < end => start,
            // No more data, or none before the end of the file.
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => return Err(error),
            _ => return Ok(()),
        };
        let stop = descriptor::seek(file.as_fd(), start as i64, libc::SEEK_HOLE)?.min(end);
        let first = start / PAGE_SIZE * PAGE_SIZE;
        found.push(PageRun {
            address: range.start + (first - offset),
            count: (stop - first).div_ceil(PAGE_SIZE),
        });
        at = stop;
    }
    Ok(())
}

/// Makes `pages` the union of both.
fn merge(pages: &mut Vec<PageRun>, mut more: Vec<PageRun>) {
    more.append(pages);
    more.sort_unstable_by_key(|run| run.address);
    for run in more {
        let end = run.address + run.count * PAGE_SIZE;
        match pages.last_mut() {
            Some(last) if last.address + last.count * PAGE_SIZE >= run.address => {
                let reached = last.address + last.count * PAGE_SIZE;
                last.count = (reached.max(end) - last.address) / PAGE_SIZE;
            }
            _ => pages.push(run),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(address: u64, count: u64) -> PageRun {
        PageRun {
            address: address * PAGE_SIZE,
            count,
        }
    }

    #[test]
    fn runs_become_their_union() {
        let mut pages = vec![run(1, 2), run(8, 1), run(20, 3)];
        merge(
            &mut pages,
            vec![run(2, 2), run(9, 1), run(21, 1), run(30, 1)],
        );
        assert_eq!(pages, [run(1, 3), run(8, 2), run(20, 3), run(30, 1)]);
    }

    #[test]
    fn only_extents_inside_the_mapping_count() {
        let memory = unbroken_sys::memfd::create(c"extents", 0).expect("memfd");
        let page = PAGE_SIZE as usize;
        descriptor::truncate(memory.as_fd(), 40 * PAGE_SIZE).expect("size");
        for at in [0, 5, 6, 11, 30] {
            descriptor::write_at(memory.as_fd(), &vec![1; page], at * PAGE_SIZE).expect("write");
        }
        let file = File::from(memory);
        let range = AddressRange {
            start: 100 * PAGE_SIZE,
            end: 110 * PAGE_SIZE,
        };
        let mut found = Vec::new();
        extents(&file, 5 * PAGE_SIZE, range, &mut found).expect("extents");
        assert_eq!(found, [run(100, 2), run(106, 1)]);
    }

    #[test]
    fn fuzz_map_file_names() {
        unbroken_fuzz::text("map-file-name", &["7f0000001000-7f0000002000"], |name| {
            let _ = parse_range(name);
        });
    }
}
