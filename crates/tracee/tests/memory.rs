//! Memory maps and written pages of live processes, and properties of the map's differences.

mod common;

use common::Guest;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use unbroken_image::{
    AddressRange, Advice, Backing, FileIdentity, Mapping, PAGE_SIZE, PageRun, Protection, Sharing,
};
use unbroken_tracee::memory_map::{self, MapReader, changed_ranges, insert_range};
use unbroken_tracee::{DirtyTracker, HostTid, Process, Tree};

/// Does to its memory what it is told on standard input, and says when it is done.
const GUEST: &str = r#"
import mmap, sys, ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
base = 0x700000000000
fd = os.memfd_create('shared')
os.ftruncate(fd, 1 << 20)
binary = os.open('/bin/ls', os.O_RDONLY)
def map_at(offset, pages, protection, flags, fd=-1):
    got = libc.mmap(base + offset, pages * 4096, protection, flags | 0x10, fd, 0)
    assert got == base + offset, ctypes.get_errno()
map_at(0, 64, 3, 0x22)               # private, anonymous
map_at(0x100000, 64, 3, 0x21)        # shared, anonymous
map_at(0x200000, 64, 3, 0x01, fd)    # memfd
map_at(0x300000, 16, 3, 0x02, binary)  # private file
print('ready', flush=True)
for line in sys.stdin:
    words = line.split()
    address = [int(word, 0) for word in words[1:]]
    if words[0] == 'write':
        for at in address: ctypes.memset(base + at, 0x41 + (at >> 12) % 26, 1)
    elif words[0] == 'read':
        for at in address: ctypes.string_at(base + at, 1)
    elif words[0] == 'protect': assert libc.mprotect(base + address[0], address[1], address[2]) == 0
    elif words[0] == 'advise': assert libc.madvise(base + address[0], address[1], address[2]) == 0
    elif words[0] == 'unmap': assert libc.munmap(base + address[0], address[1]) == 0
    elif words[0] == 'map': map_at(address[0], address[1], address[2], address[3])
    print('done', flush=True)
"#;

const BASE: u64 = 0x7000_0000_0000;

#[test]
fn guest() {}

struct Held {
    guest: Guest,
    tree: Tree,
    tracker: DirtyTracker,
    map: Vec<Mapping>,
}

impl Held {
    fn start() -> Held {
        Held::start_program(GUEST)
    }

    fn start_program(program: &str) -> Held {
        let mut command = std::process::Command::new("python3");
        command.args(["-c", program]);
        let guest = Guest::spawn(command);
        let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
        let mut map = Vec::new();
        let tracker = {
            let mut stopped = tree.stop().unwrap();
            let tid = HostTid(guest.pid());
            stopped.install_blob(tid).unwrap();
            let tracker = DirtyTracker::install(&mut stopped, tid).unwrap();
            let process = stopped.processes().next().unwrap();
            MapReader::default().survey(process, &mut map).unwrap();
            for mapping in &map {
                tracker.register(mapping, mapping.range).unwrap();
            }
            tracker
        };
        Held {
            guest,
            tree,
            tracker,
            map,
        }
    }

    fn tell(&mut self, line: &str) {
        self.guest.tell(&mut self.tree, line);
    }

    /// Written pages of the guest's own ranges, as offsets from BASE.
    fn written(&mut self) -> Vec<u64> {
        let mut pages = Vec::new();
        let stopped = self.tree.stop().unwrap();
        self.tracker.scan(&self.map, &mut pages).unwrap();
        stopped.resume().unwrap();
        own_pages(&pages)
    }
}

fn own_pages(pages: &[PageRun]) -> Vec<u64> {
    let each = pages
        .iter()
        .flat_map(|run| (0..run.count).map(|n| run.address + n * PAGE_SIZE));
    let own = |&page: &u64| (BASE..BASE + 0x1000_0000).contains(&page);
    each.filter(own).map(|page| page - BASE).collect()
}

#[test]
fn exactly_what_is_written_is_found() {
    let mut held = Held::start();
    held.written();
    assert_eq!(held.written(), []);
    let pages = [
        0, 0x3000, 0x3f000, 0x100000, 0x105000, 0x201000, 0x300000, 0x302000,
    ];
    let line = pages.map(|page| format!("{page:#x}")).join(" ");
    held.tell(&format!("write {line}"));
    assert_eq!(held.written(), pages);
    assert_eq!(held.written(), []);
    // Reading changes nothing, be it the zero page, a page of the file or a hole of the memfd.
    held.tell("read 0 0x8000 0x301000 0x305000 0x3000");
    assert_eq!(held.written(), []);
    held.tell("protect 0 0x10000 1");
    held.tell("protect 0 0x10000 3");
    held.tell("write 0x3000");
    assert_eq!(held.written(), [0x3000]);
}

#[test]
fn a_service_that_dropped_its_rights_is_followed_as_well() {
    let dropped = GUEST.replace(
        "base =",
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nbase =",
    );
    let mut held = Held::start_program(&dropped);
    held.written();
    held.tell("write 0x3000 0x201000");
    assert_eq!(held.written(), [0x3000, 0x201000]);
}

#[test]
fn a_failed_epoch_gives_its_pages_back() {
    let mut held = Held::start();
    held.written();
    held.tell("write 0x1000 0x2000 0x102000 0x300000");
    let mut first = Vec::new();
    let stopped = held.tree.stop().unwrap();
    held.tracker.scan(&held.map, &mut first).unwrap();
    held.tracker.mark_written(&first).unwrap();
    stopped.resume().unwrap();
    assert_eq!(own_pages(&first), held.written());
}

#[test]
fn everything_present_is_found_again_and_read_whatever_its_protection() {
    let mut held = Held::start();
    held.written();
    held.tell("write 0x1000 0x2000 0x5000");
    held.written();
    held.tell("protect 0x2000 0x1000 0");
    held.tell("write 0x5000");
    let stopped = held.tree.stop().unwrap();
    let range = AddressRange {
        start: BASE,
        end: BASE + 64 * PAGE_SIZE,
    };
    let mut pages = Vec::new();
    held.tracker
        .scan_present(&held.map, range, &mut pages)
        .unwrap();
    assert_eq!(own_pages(&pages), [0x1000, 0x2000, 0x5000]);
    let process = stopped.processes().next().unwrap();
    let mut bytes = vec![0xff; 3 * PAGE_SIZE as usize];
    held.tracker
        .read_pages(process.memory(), &pages, &mut bytes)
        .unwrap();
    for (page, expected) in bytes.chunks(PAGE_SIZE as usize).zip(*b"BCF") {
        assert_eq!(page[0], expected);
        assert!(page[1..].iter().all(|&byte| byte == 0));
    }
    stopped.resume().unwrap();
    assert_eq!(held.written(), []);
}

#[test]
fn voided_and_new_ranges_are_found_by_their_maps() {
    let mut held = Held::start();
    held.written();
    held.tell("unmap 0x4000 0x2000");
    held.tell("map 0x100000 2 3 0x22");
    held.tell("map 0x400000 4 3 0x22");
    held.tell("protect 0x8000 0x1000 1");
    let mut now = Vec::new();
    let stopped = held.tree.stop().unwrap();
    let process = stopped.processes().next().unwrap();
    MapReader::default()
        .read(process, &held.map, &mut now)
        .unwrap();
    assert_eq!(memory_map::verify(process, &now).unwrap(), None);
    assert!(memory_map::verify(process, &held.map).unwrap().is_some());
    stopped.resume().unwrap();
    let mut ranges = Vec::new();
    changed_ranges(&held.map, &now, &mut ranges);
    ranges.retain(|range| (BASE..BASE + 0x1000_0000).contains(&range.start));
    let range = |start, pages| AddressRange {
        start: BASE + start,
        end: BASE + start + pages * PAGE_SIZE,
    };
    assert_eq!(ranges, [range(0x100000, 2), range(0x400000, 4)]);
}

#[test]
fn a_map_says_what_stands_behind_each_mapping() {
    let held = Held::start();
    let find = |offset: u64| {
        held.map
            .iter()
            .find(|m| m.range.contains(BASE + offset))
            .unwrap()
    };
    assert_eq!(find(0).backing, Backing::Anonymous);
    assert_eq!(find(0).sharing, Sharing::Private);
    for shared in [0x100000, 0x200000] {
        assert!(matches!(find(shared).backing, Backing::SharedMemory { .. }));
        assert_eq!(find(shared).sharing, Sharing::Shared);
    }
    let Backing::File { writable, .. } = find(0x300000).backing else {
        panic!()
    };
    assert!(!writable);
    assert_eq!(
        held.map
            .iter()
            .filter(|m| m.backing == Backing::Vdso)
            .count(),
        1
    );
    assert_eq!(
        held.map
            .iter()
            .filter(|m| m.backing == Backing::Vvar)
            .count(),
        1
    );
    assert_eq!(held.map.iter().filter(|m| m.grows_down).count(), 1);
    assert!(
        held.map
            .iter()
            .all(|m| !m.range.contains(unbroken_tracee::blob::RANGE.start))
    );
    assert!(
        held.map
            .is_sorted_by(|one, two| one.range.end <= two.range.start)
    );
}

/// The whole memory, copied page by page as it changes, is the guest's memory.
#[test]
fn copies_of_written_pages_add_up_to_the_memory() {
    let mut held = Held::start();
    let mut copy: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut seed = 1_u64;
    for round in 0..30 {
        let mut pages = Vec::new();
        let stopped = held.tree.stop().unwrap();
        held.tracker.scan(&held.map, &mut pages).unwrap();
        let process = stopped.processes().next().unwrap();
        let count: u64 = pages.iter().map(|run| run.count).sum();
        let mut bytes = vec![0; (count * PAGE_SIZE) as usize];
        held.tracker
            .read_pages(process.memory(), &pages, &mut bytes)
            .unwrap();
        keep(&pages, &bytes, &mut copy);
        if round % 5 == 4 {
            compare(process, &held.map, &copy);
        }
        stopped.resume().unwrap();
        let mut line = String::from("write");
        for _ in 0..8 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let area = [0, 0x100000, 0x200000, 0x300000][(seed >> 60) as usize % 4];
            line += &format!(" {:#x}", area + (seed >> 40) % 0x10000);
        }
        held.tell(&line);
    }
}

fn keep(pages: &[PageRun], bytes: &[u8], copy: &mut BTreeMap<u64, Vec<u8>>) {
    let addresses = pages
        .iter()
        .flat_map(|run| (0..run.count).map(|n| run.address + n * PAGE_SIZE));
    for (address, page) in addresses.zip(bytes.chunks(PAGE_SIZE as usize)) {
        copy.insert(address, page.to_vec());
    }
}

fn compare(process: &Process, map: &[Mapping], copy: &BTreeMap<u64, Vec<u8>>) {
    for mapping in map {
        let is_content = matches!(
            mapping.backing,
            Backing::Anonymous | Backing::SharedMemory { .. }
        );
        if !is_content {
            continue;
        }
        let mut page = vec![0; PAGE_SIZE as usize];
        for address in (mapping.range.start..mapping.range.end).step_by(PAGE_SIZE as usize) {
            process.memory().read_exact_at(&mut page, address).unwrap();
            match copy.get(&address) {
                Some(copied) => assert!(*copied == page, "page {address:x} differs"),
                None => assert!(
                    page.iter().all(|&byte| byte == 0),
                    "page {address:x} was missed"
                ),
            }
        }
    }
}

/// A map of a small address space: pages 0..40, each a possible mapping.
fn map_of(pages: &[u8]) -> Vec<Mapping> {
    let mut map: Vec<Mapping> = Vec::new();
    for (page, &kind) in pages.iter().enumerate() {
        if kind == 0 {
            continue;
        }
        let start = page as u64 * PAGE_SIZE;
        let identity = FileIdentity {
            device: 1,
            inode: u64::from(kind),
        };
        map.push(Mapping {
            range: AddressRange {
                start,
                end: start + PAGE_SIZE,
            },
            protection: Protection {
                read: true,
                write: kind % 2 == 0,
                execute: false,
            },
            sharing: if kind == 5 {
                Sharing::Shared
            } else {
                Sharing::Private
            },
            grows_down: false,
            backing: match kind {
                1 | 2 => Backing::Anonymous,
                _ => Backing::SharedMemory {
                    identity,
                    offset_bytes: start,
                    name: String::new(),
                },
            },
            advice: Advice::default(),
        });
    }
    map
}

proptest! {
    #[test]
    fn changed_ranges_are_the_pages_whose_backing_changed(
        old in proptest::collection::vec(0_u8..6, 40),
        new in proptest::collection::vec(0_u8..6, 40),
    ) {
        let mut ranges = Vec::new();
        changed_ranges(&map_of(&old), &map_of(&new), &mut ranges);
        let found: BTreeSet<u64> = ranges
            .iter()
            .flat_map(|range| (range.start..range.end).step_by(PAGE_SIZE as usize))
            .map(|address| address / PAGE_SIZE)
            .collect();
        // 1 and 2 differ only in protection.
        let content = |kind: u8| if kind == 2 { 1 } else { kind };
        let expected: BTreeSet<u64> = (0..40_u64)
            .filter(|&page| {
                let (before, after) = (old[page as usize], new[page as usize]);
                after != 0 && content(before) != content(after)
            })
            .collect();
        prop_assert_eq!(found, expected);
        prop_assert!(ranges.is_sorted_by(|one, two| one.end < two.start));
    }

    #[test]
    fn inserted_ranges_are_a_union(extras in proptest::collection::vec((0_u64..60, 0_u64..9), 12)) {
        let mut ranges = Vec::new();
        let mut expected = BTreeSet::new();
        for (start, length) in extras {
            insert_range(&mut ranges, AddressRange { start, end: start + length });
            expected.extend(start..start + length);
        }
        let found: BTreeSet<u64> =
            ranges.iter().flat_map(|range| range.start..range.end).collect();
        prop_assert_eq!(found, expected);
        prop_assert!(ranges.is_sorted_by(|one, two| one.end < two.start));
    }
}
