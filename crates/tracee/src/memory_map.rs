//! The memory map of a process, as the image wants it, and what changed between two of them.

use crate::host::HostPid;
use crate::thread::Process;
use crate::{TraceError, blob};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use unbroken_image::{AddressRange, Advice, Backing, FileIdentity, Mapping, Protection, Sharing};

/// Reads memory maps; keeps its buffer from one to the next.
#[derive(Default)]
pub struct MapReader {
    text: String,
    files: Vec<(FileIdentity, AddressRange)>,
}

impl MapReader {
    /// Reads the map of `process` into `map`, without the blob. What `/proc/PID/maps` does not
    /// show (advice) is taken from `previous`, mapping by mapping; a first map needs
    /// [`MapReader::survey`].
    ///
    /// Fails on a mapping that cannot be replicated: devices, rings, huge pages of hugetlbfs.
    pub fn read(
        &mut self,
        process: &Process,
        previous: &[Mapping],
        map: &mut Vec<Mapping>,
    ) -> Result<(), TraceError> {
        self.load(process.host_pid, "maps")?;
        parse(&self.text, process.host_pid, previous, map, &mut self.files)
    }

    /// As [`MapReader::read`], with the advice that is in force. Walks the page tables of the whole
    /// process: about a millisecond for each 100 MB.
    pub fn survey(&mut self, process: &Process, map: &mut Vec<Mapping>) -> Result<(), TraceError> {
        self.load(process.host_pid, "smaps")?;
        parse(&self.text, process.host_pid, &[], map, &mut self.files)
    }

    /// The files in the map that was read last, each with a mapping of the kernel's that shows it: a
    /// name in `/proc/PID/map_files`. A file may be among them more than once.
    pub fn files(&self) -> &[(FileIdentity, AddressRange)] {
        &self.files
    }

    fn load(&mut self, host_pid: HostPid, file: &str) -> Result<(), TraceError> {
        let path = format!("/proc/{host_pid}/{file}");
        self.text.clear();
        File::open(&path)
            .and_then(|mut file| file.read_to_string(&mut self.text))
            .map(drop)
            .map_err(|source| TraceError::Proc { path, source })
    }
}

fn parse(
    text: &str,
    host_pid: HostPid,
    previous: &[Mapping],
    map: &mut Vec<Mapping>,
    files: &mut Vec<(FileIdentity, AddressRange)>,
) -> Result<(), TraceError> {
    map.clear();
    files.clear();
    let mut waiting: Option<Mapping> = None;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(mapping) = &mut waiting {
                apply_flags(mapping, flags)?;
            }
            continue;
        }
        // The other lines of smaps begin with a capital letter, headers with a hexadecimal digit
        // (which is lower case).
        if line.starts_with(|first: char| first.is_ascii_uppercase()) {
            continue;
        }
        let mapping = parse_line(line, host_pid)?;
        if let Backing::File { identity, .. } = mapping.backing
            && files.last().is_none_or(|(last, _)| *last != identity)
        {
            files.push((identity, mapping.range));
        }
        if let Some(finished) = waiting.take() {
            push_merged(map, finished);
        }
        if mapping.range.intersection(blob::RANGE).is_none() {
            waiting = Some(with_advice_of(mapping, previous));
        }
    }
    if let Some(finished) = waiting {
        push_merged(map, finished);
    }
    Ok(())
}

/// `start-end perms offset major:minor inode          path`
fn parse_line(line: &str, host_pid: HostPid) -> Result<Mapping, TraceError> {
    let malformed = || TraceError::ProcFormat {
        path: format!("/proc/{host_pid}/maps"),
        what: "a line",
    };
    let mut fields = line.splitn(6, ' ');
    let mut field = || fields.next().ok_or_else(malformed);
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).map_err(|_| malformed());
    let (start, end) = field()?.split_once('-').ok_or_else(malformed)?;
    let range = AddressRange {
        start: hexadecimal(start)?,
        end: hexadecimal(end)?,
    };
    let permissions = field()?.as_bytes();
    let [read, write, execute, shared] = permissions else {
        return Err(malformed());
    };
    let offset_bytes = hexadecimal(field()?)?;
    let (major, minor) = field()?.split_once(':').ok_or_else(malformed)?;
    let device = libc::makedev(hexadecimal(major)? as u32, hexadecimal(minor)? as u32);
    let inode = field()?.parse().map_err(|_| malformed())?;
    let name = fields.next().unwrap_or("").trim_start();

    let sharing = if *shared == b's' {
        Sharing::Shared
    } else {
        Sharing::Private
    };
    let protection = Protection {
        read: *read == b'r',
        write: *write == b'w',
        execute: *execute == b'x',
    };
    let identity = FileIdentity { device, inode };
    let mut backing = backing_of(name, identity, offset_bytes)
        .map_err(|reason| unsupported(range, name, reason))?;
    if let Backing::File { writable, .. } = &mut backing
        && sharing == Sharing::Shared
    {
        *writable = protection.write || was_opened_for_writing(host_pid, range);
    }
    Ok(Mapping {
        range,
        protection,
        sharing,
        grows_down: name == "[stack]",
        backing,
        advice: Advice::default(),
    })
}

fn unsupported(range: AddressRange, name: &str, reason: &'static str) -> TraceError {
    TraceError::UnsupportedMapping {
        start: range.start,
        end: range.end,
        name: name.to_owned(),
        reason,
    }
}

fn backing_of(
    name: &str,
    identity: FileIdentity,
    offset_bytes: u64,
) -> Result<Backing, &'static str> {
    match name {
        "[vdso]" => return Ok(Backing::Vdso),
        "[vsyscall]" => return Ok(Backing::Vsyscall),
        // The clock pages are a mapping of their own since Linux 6.13; the pair moves together.
        "[vvar]" | "[vvar_vclock]" => return Ok(Backing::Vvar),
        _ => {}
    }
    if identity.inode == 0 {
        return if name.starts_with("[uprobes]") || name.starts_with('/') {
            Err("it is a mapping of the kernel's or of a device")
        } else {
            // Unnamed, [heap], [stack], [anon:name].
            Ok(Backing::Anonymous)
        };
    }
    if name.starts_with("/anon_hugepage") || name.starts_with("/dev/hugepages") {
        return Err("it is made of huge pages (MAP_HUGETLB), whose writes are not tracked by page");
    }
    // What never had a name is called deleted.
    let unnamed = name.strip_suffix(" (deleted)").unwrap_or_default();
    let memfd = unnamed.strip_prefix("/memfd:");
    // The first is MAP_SHARED | MAP_ANONYMOUS.
    if unnamed == "/dev/zero"
        || memfd.is_some()
        || unnamed.starts_with("/SYSV")
        || name.starts_with("[anon_shmem:")
    {
        return Ok(Backing::SharedMemory {
            identity,
            offset_bytes,
            name: unescape(memfd.unwrap_or_default()),
        });
    }
    if !name.starts_with('/') || unnamed.starts_with("/[aio]") {
        return Err(
            "it belongs to a kernel object that cannot be replicated (io_uring, perf, AIO)",
        );
    }
    if name.starts_with("/dev/") && !name.starts_with("/dev/shm/") && name != "/dev/zero" {
        return Err("it is a device");
    }
    Ok(Backing::File {
        identity,
        offset_bytes,
        writable: false,
    })
}

/// The kernel writes a newline in a path as `\012` (fs/proc/task_mmu.c, show_map_vma).
fn unescape(path: &str) -> String {
    path.replace("\\012", "\n")
}

fn was_opened_for_writing(host_pid: HostPid, range: AddressRange) -> bool {
    let path = format!(
        "/proc/{host_pid}/map_files/{:x}-{:x}",
        range.start, range.end
    );
    // The link's mode is that of the open file. If it is gone the process is, too.
    std::fs::symlink_metadata(path).is_ok_and(|link| link.permissions().mode() & 0o200 != 0)
}

/// `VmFlags` of smaps (Documentation/filesystems/proc.rst).
fn apply_flags(mapping: &mut Mapping, flags: &str) -> Result<(), TraceError> {
    let advice = &mut mapping.advice;
    for flag in flags.split_ascii_whitespace() {
        match flag {
            "gd" => mapping.grows_down = true,
            "dc" => advice.dont_fork = true,
            "dd" => advice.dont_dump = true,
            "hg" => advice.huge_page = true,
            "nh" => advice.no_huge_page = true,
            "wf" => advice.wipe_on_fork = true,
            "mg" => advice.mergeable = true,
            "sr" => advice.sequential = true,
            "rr" => advice.random = true,
            "lo" => advice.locked = true,
            "lf" => advice.locked_on_fault = true,
            "nr" => advice.no_reserve = true,
            "ht" => return Err(unsupported(mapping.range, "", "it is made of huge pages")),
            "ss" => return Err(unsupported(mapping.range, "", "it is a shadow stack")),
            "dp" => return Err(unsupported(mapping.range, "", "it is droppable memory")),
            "io" | "pf" if !is_of_the_kernel(&mapping.backing) => {
                return Err(unsupported(mapping.range, "", "it is memory of a device"));
            }
            _ => {}
        }
    }
    // The vDSO carries flags that nobody gave it.
    if is_of_the_kernel(&mapping.backing) {
        mapping.advice = Advice::default();
    }
    Ok(())
}

fn is_of_the_kernel(backing: &Backing) -> bool {
    matches!(backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall)
}

fn with_advice_of(mut mapping: Mapping, previous: &[Mapping]) -> Mapping {
    let after = previous.partition_point(|old| old.range.start <= mapping.range.start);
    // The stack grows downward, so its old mapping begins later.
    let candidates = previous[after.saturating_sub(1)..].iter().take(2);
    for old in candidates {
        if old.range.intersection(mapping.range).is_some() && continues(old, &mapping) {
            mapping.advice = old.advice;
            mapping.grows_down |= old.grows_down;
            break;
        }
    }
    mapping
}

/// Whether two mappings show the same thing at every address, whichever of them it is in.
fn continues(one: &Mapping, other: &Mapping) -> bool {
    // Where the backing's first byte would be. Wraps for a mapping below its offset.
    let origin = |mapping: &Mapping, offset: u64| mapping.range.start.wrapping_sub(offset);
    one.sharing == other.sharing
        && match (&one.backing, &other.backing) {
            (
                Backing::File {
                    identity: a,
                    offset_bytes: at_a,
                    ..
                },
                Backing::File {
                    identity: b,
                    offset_bytes: at_b,
                    ..
                },
            ) => a == b && origin(one, *at_a) == origin(other, *at_b),
            (
                Backing::SharedMemory {
                    identity: a,
                    offset_bytes: at_a,
                    ..
                },
                Backing::SharedMemory {
                    identity: b,
                    offset_bytes: at_b,
                    ..
                },
            ) => a == b && origin(one, *at_a) == origin(other, *at_b),
            (a, b) => a == b,
        }
}

fn is_writable_file(mapping: &Mapping) -> bool {
    matches!(mapping.backing, Backing::File { writable: true, .. })
}

fn push_merged(map: &mut Vec<Mapping>, mapping: Mapping) {
    if let Some(last) = map.last_mut()
        && last.range.end == mapping.range.start
        && last.protection == mapping.protection
        && last.grows_down == mapping.grows_down
        && last.advice == mapping.advice
        && is_writable_file(last) == is_writable_file(&mapping)
        && continues(last, &mapping)
    {
        last.range.end = mapping.range.end;
    } else {
        map.push(mapping);
    }
}

/// What is mapped in `new` that was not the same in `old`: new ranges, and ranges with another
/// backing or sharing. The replica must forget what it has there, write tracking must be registered
/// there, and every present page is news. Changed protection or advice alone does not count.
///
/// What was unmapped and mapped again alike between the two maps cannot be seen here; the
/// announcements of the calls say it. Both maps are sorted; `ranges` is cleared first.
pub fn changed_ranges(old: &[Mapping], new: &[Mapping], ranges: &mut Vec<AddressRange>) {
    ranges.clear();
    let mut position = 0;
    for mapping in new {
        while position < old.len() && old[position].range.end <= mapping.range.start {
            position += 1;
        }
        let mut start = mapping.range.start;
        for before in &old[position..] {
            if before.range.start >= mapping.range.end {
                break;
            }
            if let Some(common) = before.range.intersection(mapping.range)
                && continues(before, mapping)
            {
                add_range(
                    ranges,
                    AddressRange {
                        start,
                        end: common.start,
                    },
                );
                start = common.end;
            }
        }
        add_range(
            ranges,
            AddressRange {
                start,
                end: mapping.range.end,
            },
        );
    }
}

/// Adds `extra` to sorted, disjoint `ranges`, which stay so.
pub fn insert_range(ranges: &mut Vec<AddressRange>, extra: AddressRange) {
    if extra.start >= extra.end {
        return;
    }
    let first = ranges.partition_point(|range| range.end < extra.start);
    let last = ranges.partition_point(|range| range.start <= extra.end);
    let mut whole = extra;
    if first < last {
        whole.start = whole.start.min(ranges[first].start);
        whole.end = whole.end.max(ranges[last - 1].end);
    }
    ranges.splice(first..last, [whole]);
}

/// Appends a range that does not lie before the last one.
fn add_range(ranges: &mut Vec<AddressRange>, range: AddressRange) {
    match ranges.last_mut() {
        _ if range.start >= range.end => {}
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Compares a map that was kept up to date with the kernel's; the first difference is returned.
/// For tests: it takes a survey.
///
/// Hints are not compared ([`Advice::without_hints`]): `mmap(MAP_STACK)` gives one since Linux 6.7,
/// for the stack of every new thread, and memory where an arena of the allocator was has another.
pub fn verify(process: &Process, kept: &[Mapping]) -> Result<Option<String>, TraceError> {
    let mut now = Vec::new();
    MapReader::default().survey(process, &mut now)?;
    let merges_all = merges_all_memory(process.host_pid);
    let [kept, now] = [kept, now.as_slice()].map(|map| without_hints(map, merges_all));
    let mut pairs = kept.iter().zip(&now);
    if let Some((kept, now)) = pairs.find(|(kept, now)| kept != now) {
        return Ok(Some(format!("kept {kept:?}, is {now:?}")));
    }
    Ok((kept.len() != now.len()).then(|| format!("kept {}, are {}", kept.len(), now.len())))
}

/// Whether the kernel offers all memory of a process for merging (PR_SET_MEMORY_MERGE), new mappings
/// too, which no call tells.
fn merges_all_memory(host_pid: HostPid) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{host_pid}/ksm_stat"));
    text.is_ok_and(|text| text.contains("ksm_merge_any: yes"))
}

/// The map as if nobody had given hints: what differed in those alone is one mapping.
fn without_hints(map: &[Mapping], merges_all: bool) -> Vec<Mapping> {
    let mut merged = Vec::with_capacity(map.len());
    for mapping in map {
        let mut mapping = mapping.clone();
        mapping.advice = mapping.advice.without_hints();
        mapping.advice.mergeable &= !merges_all;
        push_merged(&mut merged, mapping);
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_alone_make_no_difference_and_other_advice_does() {
        let text = "1000-2000 ---p 00000000 00:00 0 \nVmFlags: mr mw me nh\n\
                    2000-3000 ---p 00000000 00:00 0 \nVmFlags: mr mw me\n\
                    3000-4000 ---p 00000000 00:00 0 \nVmFlags: mr mw me lo\n";
        let map = parsed(text).unwrap();
        assert_eq!(map.len(), 3);
        let ends: Vec<u64> = without_hints(&map, false)
            .iter()
            .map(|mapping| mapping.range.end)
            .collect();
        assert_eq!(ends, [0x3000, 0x4000]);
    }

    fn parsed(text: &str) -> Result<Vec<Mapping>, TraceError> {
        let mut map = Vec::new();
        // No process has this number, so no file is found to be open for writing.
        parse(text, HostPid(i32::MAX), &[], &mut map, &mut Vec::new())?;
        Ok(map)
    }

    #[test]
    fn adjacent_mappings_that_continue_each_other_are_one() {
        let map = parsed(
            "1000-3000 r--p 00000000 fe:00 77      /lib/x.so\n\
             3000-4000 r--p 00002000 fe:00 77      /lib/x.so\n\
             4000-5000 r--p 00005000 fe:00 77      /lib/x.so\n\
             5000-6000 rw-p 00000000 00:00 0       [heap]\n\
             6000-7000 rw-p 00000000 00:00 0       [anon:malloc]\n\
             7000-8000 ---p 00000000 00:00 0       \n\
             8000-9000 r--p 00000000 00:00 0       [vvar]\n\
             9000-a000 r--p 00000000 00:00 0       [vvar_vclock]\n\
             a000-c000 r-xp 00000000 00:00 0       [vdso]\n\
             d000-e000 rw-p 00000000 00:00 0       [stack]\n",
        )
        .unwrap();
        let ends: Vec<u64> = map.iter().map(|mapping| mapping.range.end).collect();
        assert_eq!(
            ends,
            [0x4000, 0x5000, 0x7000, 0x8000, 0xa000, 0xc000, 0xe000]
        );
        assert_eq!(map[4].backing, Backing::Vvar);
        assert!(map[6].grows_down);
        let Backing::File {
            identity, writable, ..
        } = &map[0].backing
        else {
            panic!()
        };
        assert_eq!((identity.inode, *writable), (77, false));
        assert_eq!(identity.device, libc::makedev(0xfe, 0));
    }

    #[test]
    fn memory_that_never_had_a_path_is_shared_memory() {
        let map = parsed(
            "1000-2000 rw-s 00000000 00:01 5       /dev/zero (deleted)\n\
             2000-3000 rw-s 00001000 00:01 6       /memfd:a b (deleted)\n\
             3000-4000 rw-s 00000000 00:01 7       /SYSV00000000 (deleted)\n\
             4000-5000 rw-s 00000000 00:01 8       [anon_shmem:pool]\n",
        )
        .unwrap();
        assert_eq!(map.len(), 4);
        assert!(
            map.iter()
                .all(|m| matches!(m.backing, Backing::SharedMemory { .. }))
        );
    }

    #[test]
    fn a_file_is_the_same_one_whatever_its_name_becomes() {
        let called = |name: &str| {
            parsed(&format!(
                "1000-2000 r-xp 00000000 fe:00 9       {name}\n\
                 2000-3000 rw-s 00001000 fe:00 9       {name}\n"
            ))
            .unwrap()
        };
        let before = called("/lib/x.so");
        assert!(matches!(before[0].backing, Backing::File { .. }));
        for name in ["/lib/y.so", "/lib/x.so (deleted)", "/SYSV", "/memfd:x"] {
            assert_eq!(called(name), before, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_replicated_is_refused_by_name() {
        for line in [
            "1000-2000 rw-s 00000000 00:0e 5       anon_inode:[io_uring]\n",
            "1000-2000 rw-s 00000000 00:0e 5       /[aio] (deleted)\n",
            "1000-2000 rw-s 00000000 00:05 5       /dev/dri/card0\n",
            "1000-2000 rw-p 00000000 00:0f 5       /anon_hugepage (deleted)\n",
            "1000-2000 rw-p 00000000 00:00 0       \nVmFlags: rd wr mr mw me ht \n",
            "1000-2000 rw-p 00000000 00:00 0       \nVmFlags: rd wr mr mw me io pf \n",
        ] {
            let refused = parsed(line);
            assert!(
                matches!(refused, Err(TraceError::UnsupportedMapping { .. })),
                "{line}"
            );
        }
        assert!(matches!(
            parsed("nonsense\n"),
            Err(TraceError::ProcFormat { .. })
        ));
    }

    #[test]
    fn advice_comes_from_a_survey_and_stays() {
        let survey = "1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr nh dd lo \n\
                      2000-3000 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr \n";
        let first = parsed(survey).unwrap();
        assert_eq!(first.len(), 2);
        let advice = Advice {
            no_huge_page: true,
            dont_dump: true,
            locked: true,
            ..Advice::default()
        };
        assert_eq!(first[0].advice, advice);
        let maps = "1000-2000 r--p 00000000 00:00 0 \n2000-3000 rw-p 00000000 00:00 0 \n";
        let mut second = Vec::new();
        let files = &mut Vec::new();
        parse(maps, HostPid(i32::MAX), &first, &mut second, files).unwrap();
        assert_eq!(second[0].advice, advice);
        assert_eq!(second[1].advice, Advice::default());
    }

    #[test]
    fn fuzz_proc_maps() {
        let text = "1000-2000 ---p 00000000 00:00 0 \nVmFlags: mr mw me nh\n\
                    2000-3000 rw-s 00000000 00:01 7   /memfd:x (deleted)\nVmFlags: rd wr gd lo\n";
        let before = parsed(text).unwrap();
        unbroken_fuzz::text("proc-maps", &[text], |text| {
            let mut map = Vec::new();
            let files = &mut Vec::new();
            if parse(text, HostPid(i32::MAX), &before, &mut map, files).is_ok() {
                let mut ranges = Vec::new();
                changed_ranges(&before, &map, &mut ranges);
                changed_ranges(&map, &before, &mut ranges);
            }
        });
    }
}
