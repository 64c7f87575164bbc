//! Every kind but sockets and epoll: captured, restored, and then behaving as the original would.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use unbroken_image::Pid;
use unbroken_image::object::{FileLock, LockOwner, PipeEnd};
use unbroken_objects::file::CutBack;
use unbroken_objects::{
    Error, Kind, Scratch, classify, device, directory, eventfd, file, memfd, pipe, signalfd,
};
use unbroken_sys::{descriptor, event, fdinfo, lock, memfd as sys_memfd, pipe as sys_pipe};

/// A directory of one test's own, removed with it.
struct Scene(PathBuf);

impl Scene {
    fn new(name: &str) -> Scene {
        let path = std::env::temp_dir().join(format!("unbroken-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("make a directory for the test");
        Scene(path)
    }

    fn open(&self, name: &str, flags: i32) -> OwnedFd {
        let path = self.0.join(name);
        if !path.exists() {
            fs::write(&path, b"0123456789").expect("make a file for the test");
        }
        let path = std::ffi::CString::new(path.to_str().expect("UTF-8")).expect("no NUL");
        descriptor::open(None, &path, flags | libc::O_CLOEXEC).expect("open the file")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn reference(of: impl AsFd) -> OwnedFd {
    fdinfo::reopen(of.as_fd(), libc::O_PATH).expect("refer to a file")
}

fn read_some(fd: BorrowedFd<'_>, most: usize) -> Vec<u8> {
    let mut buffer = vec![0; most];
    let count = descriptor::read(fd, &mut buffer).expect("read");
    buffer.truncate(count);
    buffer
}

fn read_error(fd: BorrowedFd<'_>) -> Option<i32> {
    descriptor::read(fd, &mut [0; 128])
        .err()
        .and_then(|error| error.raw_os_error())
}

fn write_all(fd: BorrowedFd<'_>, bytes: &[u8]) {
    assert_eq!(descriptor::write(fd, bytes).expect("write"), bytes.len());
}

#[test]
fn a_file_keeps_position_flags_and_path() {
    let scene = Scene::new("file");
    let original = scene.open("a", libc::O_RDWR | libc::O_APPEND | libc::O_NONBLOCK);
    descriptor::seek(original.as_fd(), 4, libc::SEEK_SET).expect("seek");
    assert_eq!(
        classify(original.as_fd()).expect("classify"),
        Kind::RegularFile
    );
    let state = file::capture(original.as_fd()).expect("capture");
    assert_eq!((state.position, state.length_bytes), (4, Some(10)));
    let copy = file::restore(&state, Some(reference(&original).as_fd())).expect("restore");
    assert_eq!(
        file::capture(copy.as_fd()).expect("capture the copy"),
        state
    );
    assert_eq!(read_some(copy.as_fd(), 3), b"456");
    // The copy is a description of its own.
    assert_eq!(
        descriptor::seek(original.as_fd(), 0, libc::SEEK_CUR).expect("seek"),
        4
    );
}

#[test]
fn a_file_that_was_replaced_and_deleted_is_still_the_same() {
    let scene = Scene::new("rename");
    for flags in [0, libc::O_NOFOLLOW] {
        let original = scene.open("a", libc::O_RDWR | flags);
        let reference = reference(&original);
        let restored = |state| file::restore(state, Some(reference.as_fd())).expect("restore");
        let state = file::capture(original.as_fd()).expect("capture");
        fs::rename(scene.0.join("a"), scene.0.join("b")).expect("rename");
        fs::write(scene.0.join("a"), b"another").expect("put another file there");
        let copy = restored(&state);
        assert_eq!(read_some(copy.as_fd(), 10), b"0123456789");
        // A flag that an open sets, and that nothing clears.
        let kept = descriptor::status_flags(copy.as_fd()).expect("flags") & libc::O_NOFOLLOW;
        assert_eq!(kept, flags);
        fs::remove_file(scene.0.join("b")).expect("delete");
        fs::remove_file(scene.0.join("a")).expect("delete the other");
        let kind = classify(original.as_fd()).expect("classify");
        assert_eq!(kind, Kind::RegularFile);
        let deleted = file::capture(original.as_fd()).expect("capture");
        assert_eq!(deleted.identity, state.identity);
        assert_eq!(read_some(restored(&deleted).as_fd(), 3), b"012");
    }
}

#[test]
fn a_file_is_never_looked_for_by_its_name() {
    let scene = Scene::new("unreferred");
    let original = scene.open("a", libc::O_RDONLY);
    let state = file::capture(original.as_fd()).expect("capture");
    let error = file::restore(&state, None).expect_err("nothing refers to it");
    assert!(matches!(error, Error::Differs { .. }), "{error}");
}

#[test]
fn a_removed_directory_is_still_the_same() {
    let scene = Scene::new("removed");
    let path = scene.0.join("d");
    fs::create_dir(&path).expect("make a directory");
    let original = OwnedFd::from(File::open(&path).expect("open"));
    let reference = reference(&original);
    fs::remove_dir(&path).expect("remove");
    let state = directory::capture(original.as_fd()).expect("capture");
    let copy = directory::restore(&state, Some(reference.as_fd())).expect("restore");
    assert_eq!(directory::capture(copy.as_fd()).expect("capture"), state);
}

#[test]
fn a_file_is_cut_back_only_when_its_writer_is_sequential() {
    let scene = Scene::new("cut");
    let append = scene.open("a", libc::O_WRONLY | libc::O_APPEND);
    let state = file::capture(append.as_fd()).expect("capture");
    write_all(append.as_fd(), b"after the commit");
    let copy = file::restore(&state, Some(reference(&append).as_fd())).expect("restore");
    let cut = file::cut_back(copy.as_fd(), &state).expect("cut back");
    assert_eq!(
        cut,
        CutBack::Cut {
            from_bytes: 26,
            to_bytes: 10
        }
    );
    assert_eq!(
        file::cut_back(copy.as_fd(), &state).expect("cut back"),
        CutBack::Unchanged
    );

    let middle = scene.open("b", libc::O_RDWR);
    let state = file::capture(middle.as_fd()).expect("capture");
    fs::write(scene.0.join("b"), b"01234567890123456789").expect("grow");
    let kept = file::cut_back(middle.as_fd(), &state).expect("cut back");
    assert_eq!(
        kept,
        CutBack::LongerKept {
            committed_bytes: 10,
            now_bytes: 20
        }
    );
    fs::write(scene.0.join("b"), b"0").expect("shrink");
    let short = file::cut_back(middle.as_fd(), &state).expect("cut back");
    assert_eq!(
        short,
        CutBack::Shorter {
            committed_bytes: 10,
            now_bytes: 1
        }
    );
}

#[test]
fn locks_of_the_description_are_taken_again() {
    let scene = Scene::new("locks");
    let original = scene.open("a", libc::O_RDWR);
    lock::flock(original.as_fd(), true).expect("flock");
    lock::description_lock(original.as_fd(), false, 3, 4).expect("OFD lock");
    let state = file::capture(original.as_fd()).expect("capture");
    let expected = [
        FileLock {
            owner: LockOwner::Description,
            exclusive: true,
            start: 0,
            length_bytes: 0,
        },
        FileLock {
            owner: LockOwner::DescriptionRange,
            exclusive: false,
            start: 3,
            length_bytes: 4,
        },
    ];
    assert_eq!(state.locks, expected);
    let copy = file::restore(&state, Some(reference(&original).as_fd())).expect("restore");
    // The original holds the lock.
    assert!(!file::lock_again(copy.as_fd(), &state).expect("try to lock"));
    drop(original);
    assert!(file::lock_again(copy.as_fd(), &state).expect("lock again"));
    assert_eq!(
        file::capture(copy.as_fd()).expect("capture the copy").locks,
        expected
    );
    let stranger = scene.open("a", libc::O_RDWR);
    assert!(
        lock::flock(stranger.as_fd(), false).is_err(),
        "the copy holds the lock"
    );
}

#[test]
fn locks_of_a_process_show_in_its_fdinfo() {
    let scene = Scene::new("posix");
    let original = scene.open("a", libc::O_RDWR);
    lock::process_lock(original.as_fd(), true, 2, 0).expect("POSIX lock");
    let mut state = file::capture(original.as_fd()).expect("capture");
    state.locks.clear();
    let info = format!("/proc/self/fdinfo/{}", original.as_raw_fd());
    let text = fs::read(info).expect("read fdinfo");
    file::add_locks(&text, Pid(5), &mut state).expect("parse");
    let expected = FileLock {
        owner: LockOwner::Process(Pid(5)),
        exclusive: true,
        start: 2,
        length_bytes: 0,
    };
    assert_eq!(
        file::process_locks(&state, Pid(5)).collect::<Vec<_>>(),
        [&expected]
    );
    assert_eq!(file::process_locks(&state, Pid(6)).count(), 0);
}

#[test]
fn signal_driven_input_is_refused() {
    let (read, _write) = sys_pipe::pipe(0).expect("pipe");
    descriptor::set_status_flags(read.as_fd(), libc::O_ASYNC).expect("O_ASYNC");
    let mut scratch = Scratch::new().expect("scratch");
    let error = pipe::capture(read.as_fd(), &mut scratch).expect_err("O_ASYNC");
    assert!(error.to_string().contains("O_ASYNC"), "{error}");
}

#[test]
fn a_directory_goes_on_listing_where_it_was() {
    let scene = Scene::new("directory");
    for name in ["a", "b", "c"] {
        drop(scene.open(name, libc::O_RDONLY));
    }
    let path = std::ffi::CString::new(scene.0.to_str().expect("UTF-8")).expect("no NUL");
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let original = descriptor::open(None, &path, flags).expect("open");
    descriptor::each_name(original.as_fd(), |_| ()).expect("list to the end");
    assert_eq!(
        classify(original.as_fd()).expect("classify"),
        Kind::Directory
    );
    let state = directory::capture(original.as_fd()).expect("capture");
    let copy = directory::restore(&state, Some(reference(&original).as_fd())).expect("restore");
    let mut rest = 0;
    descriptor::each_name(copy.as_fd(), |_| rest += 1).expect("list");
    assert_eq!(rest, 0, "the listing was at its end");
    assert_eq!(directory::capture(copy.as_fd()).expect("capture"), state);
}

#[test]
fn devices_without_state_are_opened_again_and_others_refused() {
    for path in [c"/dev/null", c"/dev/zero", c"/dev/urandom"] {
        let original = descriptor::open(None, path, libc::O_RDWR).expect("open");
        assert_eq!(
            classify(original.as_fd()).expect("classify"),
            Kind::CharacterDevice
        );
        let state = device::capture(original.as_fd()).expect("capture");
        let copy = device::restore(&state).expect("restore");
        assert_eq!(device::capture(copy.as_fd()).expect("capture"), state);
    }
    let terminal = descriptor::open(None, c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY);
    if let Ok(terminal) = terminal {
        assert!(
            classify(terminal.as_fd())
                .expect("classify")
                .require_support()
                .is_err()
        );
    }
}

#[test]
fn a_memfd_keeps_holes_position_and_seals() {
    let original = sys_memfd::create(c"cache", libc::MFD_ALLOW_SEALING).expect("memfd_create");
    descriptor::truncate(original.as_fd(), 1 << 30).expect("size");
    descriptor::write_at(original.as_fd(), b"far", 1 << 29).expect("write");
    descriptor::seek(original.as_fd(), 77, libc::SEEK_SET).expect("seek");
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    sys_memfd::add_seals(original.as_fd(), seals).expect("seal");
    assert_eq!(
        classify(original.as_fd()).expect("classify"),
        Kind::MemoryFile
    );
    let state = memfd::capture(original.as_fd()).expect("capture");
    assert_eq!(
        (state.name.as_str(), state.position, state.content.len()),
        ("cache", 77, 1)
    );
    assert_eq!(
        descriptor::seek(original.as_fd(), 0, libc::SEEK_CUR).expect("seek"),
        77
    );

    let copy = memfd::restore(&state, None).expect("restore");
    memfd::seal(copy.as_fd(), &state).expect("seal");
    let mut again = memfd::capture(copy.as_fd()).expect("capture the copy");
    again.identity = state.identity;
    assert_eq!(again, state);
    assert!(
        descriptor::truncate(copy.as_fd(), 0).is_err(),
        "sealed against shrinking"
    );

    let second = memfd::restore(&state, Some(copy.as_fd())).expect("a second description");
    memfd::seal(second.as_fd(), &state).expect("sealed already");
    descriptor::write_at(second.as_fd(), b"near", 0).expect("write");
    let mut bytes = [0; 4];
    descriptor::read_at(copy.as_fd(), &mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"near", "both descriptions are one memfd");
}

#[test]
fn a_read_only_memfd_is_filled_and_sealed_all_the_same() {
    let writable = sys_memfd::create(c"x", libc::MFD_ALLOW_SEALING).expect("memfd_create");
    write_all(writable.as_fd(), b"content");
    let original = unbroken_sys::fdinfo::reopen(writable.as_fd(), libc::O_RDONLY).expect("reopen");
    drop(writable);
    let all = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    let again = unbroken_sys::fdinfo::reopen(original.as_fd(), libc::O_RDWR).expect("reopen");
    sys_memfd::add_seals(again.as_fd(), all).expect("seal");
    let state = memfd::capture(original.as_fd()).expect("capture");
    let copy = memfd::restore(&state, None).expect("restore");
    memfd::seal(copy.as_fd(), &state).expect("seal");
    assert_eq!(sys_memfd::seals(copy.as_fd()).expect("seals"), all);
    assert_eq!(read_some(copy.as_fd(), 20), b"content");
    assert!(descriptor::write(copy.as_fd(), b"x").is_err());
}

fn pipe_pair(flags: i32) -> (OwnedFd, OwnedFd, Scratch) {
    let (read, write) = sys_pipe::pipe(flags).expect("pipe");
    (read, write, Scratch::new().expect("scratch"))
}

fn restore_both(ends: &[PipeEnd; 2], fifo: Option<BorrowedFd<'_>>) -> Result<[OwnedFd; 2], Error> {
    let restored = pipe::restore_group(&[&ends[0], &ends[1]], fifo)?;
    Ok(restored.try_into().expect("as many ends as were asked for"))
}

#[test]
fn a_pipe_keeps_content_flags_and_capacity() {
    let (read, write, mut scratch) = pipe_pair(0);
    sys_pipe::set_capacity(write.as_fd(), 1 << 18).expect("enlarge");
    let content: Vec<u8> = (0..200_000u32).map(|number| number as u8).collect();
    write_all(write.as_fd(), &content);
    descriptor::set_status_flags(read.as_fd(), libc::O_NONBLOCK).expect("set flags");
    assert_eq!(classify(read.as_fd()).expect("classify"), Kind::Pipe);
    let states =
        [&read, &write].map(|end| pipe::capture(end.as_fd(), &mut scratch).expect("capture"));
    assert_eq!(
        descriptor::unread_bytes(read.as_fd()).expect("FIONREAD"),
        content.len()
    );
    let [copy_read, copy_write] = restore_both(&states, None).expect("restore");
    for (end, state) in [(&copy_read, &states[0]), (&copy_write, &states[1])] {
        let mut again = pipe::capture(end.as_fd(), &mut scratch).expect("capture the copy");
        again.identity = state.identity;
        assert_eq!(&again, state);
    }
    write_all(copy_write.as_fd(), b"more");
    drop(copy_write);
    let mut all = Vec::new();
    File::from(copy_read)
        .read_to_end(&mut all)
        .expect("read to the end of file");
    assert!(all.ends_with(b"more") && all.starts_with(&content));
}

#[test]
fn packets_keep_their_borders() {
    for packets in [&[&b"one"[..], b"two", b"three"][..], &[b"single"]] {
        let (read, write, mut scratch) = pipe_pair(libc::O_DIRECT);
        packets
            .iter()
            .for_each(|packet| write_all(write.as_fd(), packet));
        let state = pipe::capture(read.as_fd(), &mut scratch).expect("capture");
        let content = state.pipe.as_ref().expect("a read end has content");
        assert!(content.packets);
        assert_eq!(content.content, packets);
        // The write end is closed meanwhile: the borders must not hang on it.
        drop(write);
        let copy = pipe::restore_group(&[&state], None)
            .expect("restore")
            .remove(0);
        for packet in packets {
            // A short read of a packet loses its rest.
            assert_eq!(read_some(copy.as_fd(), 2), packet[..2]);
        }
        assert_eq!(read_some(copy.as_fd(), 2), b"", "end of file");
    }
}

#[test]
fn a_stream_is_not_taken_for_a_packet() {
    let (read, write, mut scratch) = pipe_pair(0);
    write_all(write.as_fd(), b"single");
    let state = pipe::capture(read.as_fd(), &mut scratch).expect("capture");
    assert!(!state.pipe.expect("content").packets);
}

#[test]
fn a_write_end_alone_breaks_as_the_original_does() {
    let (read, write, mut scratch) = pipe_pair(libc::O_NONBLOCK);
    drop(read);
    let state = pipe::capture(write.as_fd(), &mut scratch).expect("capture");
    let copy = pipe::restore_group(&[&state], None)
        .expect("restore")
        .remove(0);
    let error = descriptor::write(copy.as_fd(), b"x").expect_err("EPIPE");
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
}

#[test]
fn ends_opened_twice_share_one_pipe_and_keep_their_own_flags() {
    let (read, write, mut scratch) = pipe_pair(0);
    let second = unbroken_sys::fdinfo::reopen(write.as_fd(), libc::O_WRONLY).expect("reopen");
    descriptor::set_status_flags(second.as_fd(), libc::O_NONBLOCK).expect("set flags");
    let states = [&read, &write, &second]
        .map(|end| pipe::capture(end.as_fd(), &mut scratch).expect("capture"));
    let ends = pipe::restore_group(&[&states[0], &states[1], &states[2]], None).expect("restore");
    let flags = |end: &OwnedFd| descriptor::status_flags(end.as_fd()).expect("flags");
    assert_eq!(flags(&ends[1]) & libc::O_NONBLOCK, 0);
    assert_ne!(flags(&ends[2]) & libc::O_NONBLOCK, 0);
    write_all(ends[2].as_fd(), b"second");
    assert_eq!(read_some(ends[0].as_fd(), 10), b"second");
}

#[test]
fn a_fifo_is_opened_again_whatever_its_name() {
    let scene = Scene::new("fifo");
    let path = scene.0.join("fifo");
    let made = std::process::Command::new("mkfifo")
        .arg(&path)
        .status()
        .expect("run mkfifo");
    assert!(made.success());
    let read = scene.open("fifo", libc::O_RDONLY | libc::O_NONBLOCK);
    let write = scene.open("fifo", libc::O_WRONLY);
    write_all(write.as_fd(), b"unread");
    assert_eq!(classify(read.as_fd()).expect("classify"), Kind::Fifo);
    let mut scratch = Scratch::new().expect("scratch");
    let states =
        [&read, &write].map(|end| pipe::capture(end.as_fd(), &mut scratch).expect("capture"));
    let reference = reference(&read);
    fs::rename(&path, scene.0.join("renamed")).expect("rename");
    fs::write(&path, b"no FIFO").expect("put a file there");
    let error = restore_both(&states, Some(reference.as_fd())).expect_err("held open");
    assert!(matches!(error, Error::Differs { .. }), "{error}");
    drop((read, write));
    fs::remove_file(scene.0.join("renamed")).expect("remove");
    let [copy, other] = restore_both(&states, Some(reference.as_fd())).expect("restore");
    write_all(other.as_fd(), b", new");
    assert_eq!(read_some(copy.as_fd(), 20), b"unread, new");
}

#[test]
fn an_eventfd_keeps_its_count_and_mode() {
    for (count, semaphore) in [(0, false), (7, true), (u64::MAX - 1, false)] {
        let flags = libc::EFD_NONBLOCK | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
        let original = event::counter(flags).expect("eventfd");
        if count > 0 {
            write_all(original.as_fd(), &count.to_ne_bytes());
        }
        assert_eq!(
            classify(original.as_fd()).expect("classify"),
            Kind::EventCounter
        );
        let state = eventfd::capture(original.as_fd()).expect("capture");
        assert_eq!((state.count, state.semaphore), (count, semaphore));
        let copy = eventfd::restore(&state).expect("restore");
        assert_eq!(eventfd::capture(copy.as_fd()).expect("capture"), state);
        if count == 0 {
            assert_eq!(read_error(copy.as_fd()), Some(libc::EAGAIN));
        } else {
            let value: u64 = if semaphore { 1 } else { count };
            assert_eq!(read_some(copy.as_fd(), 8), value.to_ne_bytes());
        }
    }
}

#[test]
fn a_signalfd_keeps_its_mask() {
    let mask = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGRTMIN() - 1);
    let original = event::signals(mask, libc::SFD_NONBLOCK).expect("signalfd");
    assert_eq!(classify(original.as_fd()).expect("classify"), Kind::Signals);
    let state = signalfd::capture(original.as_fd()).expect("capture");
    assert_eq!(state.mask, mask);
    let copy = signalfd::restore(&state).expect("restore");
    assert_eq!(signalfd::capture(copy.as_fd()).expect("capture"), state);
    assert_eq!(read_error(copy.as_fd()), Some(libc::EAGAIN));
}

#[test]
fn a_file_of_proc_is_opened_again_whatever_its_inode() {
    let mut original = File::open("/proc/self/status").expect("open");
    let mut start = [0; 5];
    original.read_exact(&mut start).expect("read");
    let state = file::capture(original.as_fd()).expect("capture");
    let mut copy = File::from(file::restore(&state, None).expect("restore"));
    let mut rest = String::new();
    copy.read_to_string(&mut rest).expect("read");
    assert!(rest.starts_with('\t'), "{rest:?}");
    assert_eq!(&start, b"Name:");
}
