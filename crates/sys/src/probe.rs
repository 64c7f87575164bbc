//! What this kernel lets us do, found out by doing it on ourselves. Every function here is quick,
//! needs no other process, and leaves nothing behind; the error is the kernel's own.
//!
//! The blocks rely on: each call gets pointers to live values of the sizes that its man page or
//! header names; descriptors and mappings made here are owned here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The kernel's answer to a raw call, as std gives it.
fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// `Ok` when a call that cannot succeed failed for the reason that proves it is there.
fn proves(result: io::Result<libc::c_long>, expected: i32) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(expected) => Ok(()),
        Err(error) => Err(error),
    }
}

/// `struct uffdio_api` (linux/userfaultfd.h).
#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdRegister {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct pm_scan_arg` (linux/fs.h, since 6.7).
#[derive(Default)]
#[repr(C)]
struct PagemapScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vector: u64,
    vector_length: u64,
    pages_max: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

// linux/userfaultfd.h and linux/fs.h
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_BYTES: usize = 4096;
const PROBE_PAGES: usize = 4;

/// Four anonymous pages, unmapped on drop.
struct ProbePages(*mut u8);

impl ProbePages {
    fn new() -> io::Result<ProbePages> {
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PROBE_PAGES * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(ProbePages(address.cast()))
    }

    fn touch(&self, page: usize) {
        assert!(page < PROBE_PAGES);
        // SAFETY: inside the mapping, which nothing else refers to.
        unsafe { self.0.add(page * PAGE_BYTES).write_volatile(1) };
    }
}

impl Drop for ProbePages {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping of `new`.
        unsafe { libc::munmap(self.0.cast(), PROBE_PAGES * PAGE_BYTES) };
    }
}

/// Whether dirty pages can be tracked: userfaultfd WP_ASYNC and PAGEMAP_SCAN (Linux 6.7), tried on
/// four pages of our own: one that is written to after a scan must be the only one that the next
/// scan finds.
///
/// # Errors
/// The kernel's, or `InvalidData` when the scan finds other pages than it must.
pub fn dirty_tracking() -> io::Result<()> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: no pointers.
    let fault = checked(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let fault = unsafe { OwnedFd::from_raw_fd(fault as i32) };
    let mut api = UffdApi {
        api: UFFD_API,
        features: UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API reads and writes one struct uffdio_api.
    checked(unsafe { libc::ioctl(fault.as_raw_fd(), UFFDIO_API, &raw mut api) }.into())?;
    let pages = ProbePages::new()?;
    let mut register = UffdRegister {
        start: pages.0 as u64,
        length: (PROBE_PAGES * PAGE_BYTES) as u64,
        mode: UFFDIO_REGISTER_MODE_WP,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_REGISTER reads and writes one struct uffdio_register; the range is ours.
    checked(unsafe { libc::ioctl(fault.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) }.into())?;
    let pagemap = File::open("/proc/self/pagemap")?;
    (0..PROBE_PAGES).for_each(|page| pages.touch(page));
    written_pages(&pagemap, &pages)?;
    pages.touch(2);
    let expected = pages.0 as u64 + 2 * PAGE_BYTES as u64;
    match written_pages(&pagemap, &pages)?.as_slice() {
        [region] if region.start == expected && region.end == expected + PAGE_BYTES as u64 => {
            Ok(())
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The written regions of the pages, which are write-protected again in the same step.
fn written_pages(pagemap: &File, pages: &ProbePages) -> io::Result<Vec<PageRegion>> {
    let mut regions = [PageRegion::default(); PROBE_PAGES];
    let mut scan = PagemapScan {
        size: size_of::<PagemapScan>() as u64,
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start: pages.0 as u64,
        end: pages.0 as u64 + (PROBE_PAGES * PAGE_BYTES) as u64,
        vector: regions.as_mut_ptr() as u64,
        vector_length: regions.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..PagemapScan::default()
    };
    // SAFETY: PAGEMAP_SCAN reads and writes one struct pm_scan_arg and at most `vector_length`
    // regions; both outlive the call.
    let count =
        checked(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) }.into())?;
    Ok(regions[..(count as usize).min(regions.len())].to_vec())
}

/// Whether TCP_REPAIR may be switched on (tcp(7): CAP_NET_ADMIN, CONFIG_CHECKPOINT_RESTORE).
pub fn tcp_repair() -> io::Result<()> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    let socket = checked(unsafe { libc::socket(libc::AF_INET, kind, 0) }.into())?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket as i32) };
    let on: libc::c_int = 1;
    // SAFETY: an int option, read during the call.
    checked(
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_REPAIR,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        }
        .into(),
    )?;
    Ok(())
}

/// Whether a seccomp filter may ask another process (SECCOMP_RET_USER_NOTIF, seccomp(2)).
pub fn seccomp_notification() -> io::Result<()> {
    let action: u32 = libc::SECCOMP_RET_USER_NOTIF;
    // SAFETY: SECCOMP_GET_ACTION_AVAIL reads one u32 and changes nothing.
    checked(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    })?;
    Ok(())
}

/// Whether descriptors can be taken from another process (pidfd_getfd(2)), tried on ourselves.
pub fn pidfd_getfd() -> io::Result<()> {
    let own = File::open("/dev/null")?;
    // SAFETY: no pointers.
    let pidfd = checked(unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) })?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    // SAFETY: no pointers.
    let taken = checked(unsafe {
        libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), own.as_raw_fd(), 0)
    })?;
    // SAFETY: as above.
    drop(unsafe { OwnedFd::from_raw_fd(taken as i32) });
    Ok(())
}

/// Whether kernel objects of two processes can be compared (kcmp(2), CONFIG_KCMP).
pub fn kcmp() -> io::Result<()> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: no pointers.
    let own = unsafe { libc::getpid() };
    // SAFETY: no pointers.
    checked(unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_VM, 0, 0) })?;
    Ok(())
}

/// Whether processes may be made with chosen pids (clone3(2) set_tid). Asks for pid 1, which is
/// always taken: rights are checked before that (kernel/pid.c: alloc_pid), so EEXIST says yes and
/// no process is ever made.
pub fn chosen_pid() -> io::Result<()> {
    let taken_pid: libc::pid_t = 1;
    // SAFETY: an all-zero struct clone_args is what clone3(2) calls a fork without flags.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.set_tid = &raw const taken_pid as u64;
    arguments.set_tid_size = 1;
    // SAFETY: the structure and the pid that it points to outlive the call.
    let result = checked(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    });
    if matches!(result, Ok(0)) {
        // SAFETY: a child that should not exist does nothing but end.
        unsafe { libc::_exit(0) };
    }
    proves(result, libc::EEXIST)
}

/// Whether the vDSO can be put at a chosen address (arch_prctl(2) ARCH_MAP_VDSO_64, built with
/// CONFIG_CHECKPOINT_RESTORE). We have one already, so EEXIST says yes (arch/x86/entry/vdso).
pub fn map_vdso() -> io::Result<()> {
    const ARCH_MAP_VDSO_64: libc::c_int = 0x2003;
    // SAFETY: refused before anything is mapped, because this process has a vDSO.
    let result = checked(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0_usize) });
    proves(result, libc::EEXIST)
}

/// Whether a process's memory layout can be set at once (PR_SET_MM_MAP, CONFIG_CHECKPOINT_RESTORE).
pub fn memory_layout() -> io::Result<()> {
    let mut size: libc::c_uint = 0;
    // SAFETY: PR_SET_MM_MAP_SIZE writes one unsigned int and changes nothing.
    checked(
        unsafe {
            libc::prctl(
                libc::PR_SET_MM,
                libc::PR_SET_MM_MAP_SIZE,
                &raw mut size,
                0,
                0,
            )
        }
        .into(),
    )?;
    Ok(())
}

/// Whether network devices can be made by /dev/net/tun; makes none.
pub fn tun() -> io::Result<()> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map(drop)
}

/// Whether this process may make the namespaces that a service lives in; made by a thread that
/// ends at once, and they with it.
pub fn namespaces() -> io::Result<()> {
    let made = std::thread::Builder::new().spawn(|| {
        let flags =
            libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID;
        // SAFETY: no pointers; changes the calling thread alone.
        checked(unsafe { libc::unshare(flags) }.into()).map(drop)
    })?;
    made.join().map_err(|_| io::ErrorKind::Other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These run as root on the kernels that are supported: all must say yes, again and again.
    #[test]
    fn this_machine_has_everything_and_probing_leaves_nothing() {
        let descriptors = || std::fs::read_dir("/proc/self/fd").expect("fd").count();
        let probe_all = || {
            dirty_tracking().expect("dirty tracking");
            tcp_repair().expect("TCP_REPAIR");
            seccomp_notification().expect("seccomp");
            pidfd_getfd().expect("pidfd_getfd");
            kcmp().expect("kcmp");
            chosen_pid().expect("clone3 set_tid");
            map_vdso().expect("ARCH_MAP_VDSO_64");
            memory_layout().expect("PR_SET_MM_MAP");
            tun().expect("/dev/net/tun");
            namespaces().expect("namespaces");
        };
        probe_all();
        // Tests of other files open descriptors in the same process, so this only bounds a leak.
        let before = descriptors();
        (0..50).for_each(|_| probe_all());
        assert!(descriptors() < before + 50);
    }
}
