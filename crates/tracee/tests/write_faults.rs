//! What is heard of a process's page faults, against what a scan of all its memory finds.

mod common;

use common::Guest;
use unbroken_image::{AddressRange, Mapping, PAGE_SIZE, PageRun};
use unbroken_sys::affinity;
use unbroken_tracee::memory_map::MapReader;
use unbroken_tracee::write_faults::{BLOCK_BYTES, WriteFaults};
use unbroken_tracee::{DirtyTracker, HostTid, Tree};

/// Writes to its memory in every way that it is told to, and says when it is done.
const GUEST: &str = r#"
import ctypes, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
libc.syscall.argtypes = [ctypes.c_long] * 7
base = 0x700000000000
length = 64 << 20
assert libc.mmap(base, length, 3, 0x100022, -1, 0) == base
assert libc.madvise(base, length, 15) == 0          # no huge pages
assert libc.madvise(base + (32 << 20), 16 << 20, 14) == 0  # but there
file = os.open('/bin/ls', os.O_RDONLY)
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[:1])
def write(at):
    ctypes.memset(base + at, 7, 1)
def in_thread(at):
    thread = threading.Thread(target=write, args=(at,))
    thread.start()
    thread.join()
def on_another_core(at):
    os.sched_setaffinity(0, cores[1:] or cores)
    write(at)
    os.sched_setaffinity(0, cores[:1])
def in_fork(at):
    if os.fork() == 0:
        write(at)
        os._exit(0)
    os.wait()
def in_select(at):
    seconds = (ctypes.c_long * 2).from_address(base + at)
    seconds[0] = 60
    pselect = lambda: libc.syscall(270, 0, 0, 0, 0, base + at, 0)
    threading.Thread(target=pselect, daemon=True).start()
def advise(at, pages, advice):
    assert libc.madvise(base + at, pages << 12, advice) == 0
deeds = {
    'write': write,
    'fill': lambda at, pages: ctypes.memset(base + at, 7, pages << 12),
    'copy': lambda at: libc.pread(file, base + at, 9000, 0),
    'thread': in_thread,
    'core': on_another_core,
    'fork': in_fork,
    'select': in_select,
    'read': lambda at: ctypes.string_at(base + at, 1),
    'drop': lambda at, pages: advise(at, pages, 4),
    'populate': lambda at, pages: advise(at, pages, 23),
    'futex': lambda at: libc.syscall(202, base + at, 6, 0, 0, 0, 0),
}
print('ready', flush=True)
for line in sys.stdin:
    for deed in line.split(';'):
        words = deed.split()
        deeds[words[0]](*[int(word, 0) for word in words[1:]])
    print('done', flush=True)
"#;

const AREA: AddressRange = AddressRange {
    start: 0x7000_0000_0000,
    end: 0x7000_0400_0000,
};

struct Held {
    guest: Guest,
    tree: Tree,
    tracker: DirtyTracker,
    faults: WriteFaults,
    map: Vec<Mapping>,
}

/// What one look gave: the pages of the area that a scan found, as offsets.
struct Look {
    all_was_heard: bool,
    found: Vec<u64>,
}

impl Held {
    fn start() -> Held {
        let mut command = std::process::Command::new("python3");
        command.args(["-c", GUEST]);
        let guest = Guest::spawn(command);
        let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
        let mut map = Vec::new();
        let mut stopped = tree.stop().unwrap();
        let tid = HostTid(guest.pid());
        stopped.install_blob(tid).unwrap();
        let tracker = DirtyTracker::install(&mut stopped, tid).unwrap();
        let process = stopped.processes().next().unwrap();
        MapReader::default().survey(process, &mut map).unwrap();
        for mapping in &map {
            tracker.register(mapping, mapping.range).unwrap();
        }
        let core = affinity::cores(0).unwrap()[0];
        let faults = WriteFaults::follow(process, WriteFaults::prepare(core).unwrap()).unwrap();
        stopped.resume().unwrap();
        let mut held = Held {
            guest,
            tree,
            tracker,
            faults,
            map,
        };
        assert!(!held.look().all_was_heard, "nobody listened before");
        held
    }

    fn tell(&mut self, line: &str) {
        self.guest.tell(&mut self.tree, line);
    }

    /// Scans all, and checks that nothing was written where nothing was heard if it says so.
    fn look(&mut self) -> Look {
        let stopped = self.tree.stop().unwrap();
        let process = stopped.processes().next().unwrap();
        let heard = self
            .faults
            .take(process)
            .unwrap()
            .map(<[AddressRange]>::to_vec);
        let mut pages = Vec::new();
        self.tracker
            .scan_ranges(&self.map, &[AREA], &mut pages)
            .unwrap();
        stopped.resume().unwrap();
        let each = |run: &PageRun| (0..run.count).map(|n| n * PAGE_SIZE).collect::<Vec<_>>();
        let found: Vec<u64> = pages
            .iter()
            .flat_map(|run| {
                each(run)
                    .into_iter()
                    .map(|offset| run.address + offset - AREA.start)
            })
            .collect();
        if let Some(heard) = &heard {
            let unheard = found.iter().find(|page| {
                let address = AREA.start + **page;
                !heard.iter().any(|range| range.contains(address))
            });
            assert_eq!(unheard, None, "of {found:x?}, heard {heard:x?}");
        }
        Look {
            all_was_heard: heard.is_some(),
            found,
        }
    }

    /// As [`Held::expect`] where not all is heard; nor is, then, what comes next.
    fn expect_doubt(&mut self, line: &str, found: &[u64]) {
        self.expect(line, false, found);
        assert!(!self.look().all_was_heard, "after {line}");
    }

    fn expect(&mut self, line: &str, all_was_heard: bool, found: &[u64]) {
        self.tell(line);
        let look = self.look();
        assert_eq!(look.found, found, "{line}");
        assert_eq!(look.all_was_heard, all_was_heard, "{line}");
    }
}

#[test]
fn what_a_program_writes_is_heard() {
    let mut held = Held::start();
    held.expect("read 0x5000", true, &[]);
    held.expect("write 0x5000", true, &[0x5000]);
    held.expect("write 0x5000; write 0x5000", true, &[0x5000]);
    held.expect(
        "thread 0x1800000; write 0x200000",
        true,
        &[0x20_0000, 0x180_0000],
    );
    held.expect("copy 0x7ff000", true, &[0x7f_f000, 0x80_0000, 0x80_1000]);
    held.expect("drop 0x200000 16; write 0x201000", true, &[0x20_1000]);
    // What the child wrote is its own.
    held.expect_doubt("write 0x5000; fork 0x5000", &[0x5000]);
    held.expect("write 0x5000", true, &[0x5000]);
}

#[test]
fn what_the_kernel_writes_for_a_program_is_known_not_to_have_been_heard() {
    let mut held = Held::start();
    held.expect_doubt("populate 0x200000 2", &[0x20_0000, 0x20_1000]);
    held.expect_doubt("futex 0x400000", &[0x40_0000]);
    held.expect("write 0x200000", true, &[0x20_0000]);
    if affinity::cores(0).unwrap().len() > 1 {
        held.expect_doubt("core 0x200000", &[0x20_0000]);
        held.expect("write 0x200000", true, &[0x20_0000]);
    }
}

/// The time that is left of a call that our stop ended stands in the program's memory.
#[test]
fn what_we_write_for_a_program_is_heard() {
    let mut held = Held::start();
    held.tell("select 0x5000");
    // From the second stop of the call on nobody but us writes there.
    while held.look().found != [0x5000] {}
    for _ in 0..3 {
        let look = held.look();
        assert!(look.all_was_heard);
        assert_eq!(look.found, [0x5000]);
    }
}

/// One fault fills it; afterwards each page of it is written by itself.
#[test]
fn a_huge_page_is_heard_as_a_whole() {
    let mut held = Held::start();
    held.tell("write 0x2012000");
    let look = held.look();
    assert!(look.all_was_heard);
    let pages = look.found.len() as u64;
    assert!(pages == 1 || pages == BLOCK_BYTES / PAGE_SIZE, "{pages}");
    held.expect("write 0x2100000", true, &[0x210_0000]);
    held.expect("write 0x2012000", true, &[0x201_2000]);
}

/// More faults than the ring has room for.
#[test]
fn a_flood_is_known_not_to_have_been_heard() {
    let mut held = Held::start();
    held.tell(&["drop 0 0x2000; fill 0 0x2000"; 6].join(";"));
    let look = held.look();
    assert!(!look.all_was_heard);
    assert_eq!(look.found.len(), 0x2000);
    assert!(!held.look().all_was_heard, "what follows");
    held.expect("write 0x5000", true, &[0x5000]);
}
